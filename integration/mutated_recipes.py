"""Damage recipes at random and check that each is either read or refused in a sentence of this package.

    python -m integration.mutated_recipes --count 1000000 --processes 16

A mutant is one of the recipes of recipes/, or one that names every field, with one to four changes: of characters and lines, or
of keys and values. It is made from its number alone, so a number that a report names can be made again:

    python -m integration.mutated_recipes --show 4711

What must hold: `read_recipe` returns, or raises a ValueError of at most 10 lines and 2,000 characters without pydantic's text,
a link to it or a traceback; and it takes at most two seconds. The result goes to benchmarks/results/mutated_recipes.json.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import platform
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import yaml

__all__ = ["LONGEST", "check", "mutant"]

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutated_recipes.json"
DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
LONGEST = 2.0  # seconds
SEED = 20261130
BLOCK = 1000
COMPLETE = """
grace_stage:
  grace_modifiers:
    GraceModifier:
      config_groups:
        decoder:
          targets: ["re:.*layers.*_proj"]
          weights: {num_bits: 4, type: int, symmetric: true, strategy: group, group_size: 128, dynamic: false}
        head:
          targets: [Linear]
          weights: {num_bits: 8, type: int, symmetric: true, strategy: channel, actorder: null}
      ignore: [lm_head, "re:.*vision.*"]
      quantize: true
      teacher: {kind: cached, model: some/teacher, revision: main, dtype: bfloat16, cache: states, check_cache: false}
      distill: {enabled: true, temperature: 2.0, alpha: 1.0, beta: 4.0, gate_sharpness: 1.0, chunk: 512}
      relational: {enabled: true, weight: 3.0, warmup_steps: 400, warmup_share: 0.05}
      controller: {enabled: true, beta_min: 0.1, beta_max: 1.0, beta_start: 0.5, ema_decay: 0.99, tau: 2.0, eta: 0.001}
      scales: {learning_rate_multiplier: 10.0, candidates: 20, search_low: 0.3, search_high: 1.2, stored_dtype: auto}
      serving: {tensor_parallel_size: 2}
      training:
        method: lora
        norms: true
        lora: {rank: 16, alpha: 32.0, targets: ["re:.*q_proj"], seed: 3}
        freeze: ["re:.*layers.0.*"]
        master_weights: float32
        max_nonfinite_steps: 10
      oneshot:
        {epochs: 1, learning_rate: 2.0e-5, warmup_share: 0.05, scheduler: cosine, gradient_accumulation_steps: 2,
         weight_decay: 0.1, max_grad_norm: 1.0, optim: adafactor, seed: 1}
"""
TWO = """
first_stage:
  first_modifiers:
    SmoothQuantModifier: {smoothing_strength: 0.8}
    GPTQModifier: {scheme: W4A16, targets: [Linear], ignore: [lm_head], block_size: 128}
second_stage:
  grace_modifiers:
    GraceModifier: {scheme: {W4A16: [Linear]}, teacher: some/teacher}
"""
VALUES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 1.5, -0.0, 1e-300, 1e308, math.nan, math.inf, -math.inf, 10**30, -(10**400), 2**63, "", " ",
    "yes", "2.0", "1e-5", "0,0001", "nan", "auto", "W4A16", "W8A8", "FP8", "no/such/model", "re:", "re:(", "re:(a+)+$", "re:.*",
    "re:[", "re:(?P<a>b)(?P=c)", "x" * 5000, "\u0000", "\u202e", "[/x]", "[bold]", "{{ x }}", "${HOME}", "\\", "'", "https://a.b",
    [], {}, [None], [[]], [1, 2], ["Linear"], ["re:("], {"a": 1}, {"": ""}, {"self": 1}, {"model": None}, {1: 2}, [{"x": []}],
    {"targets": ["Linear"]}, {"num_bits": "four"}, {"kind": "cached"}, {"weights": []},
)  # fmt: skip
KEYS: tuple[Any, ...] = (
    "self", "cls", "type_", "allow_registered", "group", "index", "start", "initialized_", "args", "kwargs", "model", "scheme",
    "targets", "x_stage", "x_modifiers", "GraceModifier", "QuantizationModifier", "Modifier", "", " ", "model_config", "copy",
    "__class__", "<<", 1, 1.5, None, True, "teacher", "lora", "weights", "kv_cache_scheme", "observer", "config_groups",
)  # fmt: skip
PIECES = (
    "\t", "\n", " ", ":", ": ", "- ", "-", "{", "}", "[", "]", "'", '"', "#", "&a ", "*a", "---\n", "...\n", "|\n", ">\n",
    "<<: ", "!!int ", "!!python/object:os.system ", "!!binary ", "!!set ", "?", "%", "@", "`", ",", "\x00", "\x07", "\ufeff",
    "\\", "\U0001f600", "\ud800", "2026-01-01", "0x1F", "1_000", "1:30", ".nan", ".inf", "~", "null", "no", "&b [*b]",
    "9" * 5000, "[" * 200,
)  # fmt: skip


@lru_cache
def bases() -> tuple[str, ...]:
    """Return the texts to damage: every recipe of the folder, and two with the fields that those leave out."""
    return (*(path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))), *[COMPLETE] * 8, *[TWO] * 4)


@lru_cache
def _parsed(text: str) -> Any:
    return yaml.safe_load(text)


def _loaded(text: str) -> Any:
    return copy.deepcopy(_parsed(text))


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield at
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _places(part, (*at, key))


def _change_value(values: Any, draw: random.Random) -> Any:
    """Return the structure with one change of a key or a value."""
    *above, last = draw.choice([place for place in _places(values) if place] or [(None,)])
    holder = values
    for key in above:
        holder = holder[key]
    if last is None:
        return draw.choice(VALUES)
    kind = draw.randrange(8)
    if kind < 4 or isinstance(holder, list):
        holder[last] = copy.deepcopy(draw.choice(VALUES))
    elif kind == 4:
        del holder[last]
    elif kind == 5:
        holder[draw.choice(KEYS)] = holder.pop(last)
    elif kind == 6:
        name, place = str(last), draw.randrange(len(str(last)) + 1)
        holder[draw.choice((name[:place] + name[place + 1 :], name.upper(), name + "s", name[:place]))] = holder.pop(
            last
        )
    else:
        holder[draw.choice(KEYS)] = copy.deepcopy(draw.choice(VALUES))
    return values


def _change_text(text: str, draw: random.Random) -> str:
    """Return the text with one change of characters or lines."""
    lines, place = text.split("\n"), draw.randrange(len(text) + 1)
    line, other = draw.randrange(len(lines)), draw.randrange(len(lines))
    kinds: tuple[Callable[[], str], ...] = (
        lambda: text[:place] + draw.choice(PIECES) + text[place:],
        lambda: text[:place] + text[place + draw.randrange(1, 5) :],
        lambda: text[:place],
        lambda: "\n".join([*lines[:line], *lines[line + 1 :]]),
        lambda: "\n".join([*lines[:line], lines[other], *lines[line:]]),
        lambda: "\n".join([*lines[:line], " " * draw.randrange(9) + lines[line].strip(), *lines[line + 1 :]]),
        lambda: text[:place] + chr(draw.randrange(1, 0x3000)) + text[place + 1 :],
        lambda: text.replace(draw.choice((":", " ", "}", "\n", "_")), draw.choice(PIECES), draw.randrange(1, 3)),
    )
    return draw.choice(kinds)()


def mutant(number: int) -> str:
    """Return the text of a mutant; equal for equal numbers."""
    draw = random.Random(f"{SEED} {number}")
    text = draw.choice(bases())
    kind = draw.random()
    if kind < 0.6:
        values = _loaded(text)
        for _ in range(draw.randrange(1, 4)):
            values = _change_value(values, draw)
        text = yaml.dump(values, Dumper=DUMPER, sort_keys=False, default_flow_style=draw.choice((None, True, False)))
    if kind > 0.45:
        for _ in range(draw.randrange(1, 3)):
            text = _change_text(text, draw)
    return text


def check(given: Any) -> str:
    """Read a recipe; returns "read", "refused" or "refused, a list", or what is wrong, which begins with "FAULT"."""
    from grace_plugin.run.inputs import read_recipe

    start = time.process_time()  # of this process: other ones on the machine do not count
    try:
        read_recipe(given)
        found = "read"
    except ValueError as error:
        text = str(error)
        found = "refused, a list" if "\n" in text else "refused"
        if len(text) > 2000 or text.count("\n") > 9:
            found = f"FAULT: {len(text)} characters in {text.count(chr(10)) + 1} lines"
        elif not text.strip():
            found = "FAULT: nothing said"
        for word in ("pydantic", "Traceback", "validation error", "Value error", "object at 0x"):
            if word in text:
                found = f"FAULT: {word}: {text[:300]}"
    except Exception as error:
        found = f"FAULT: {type(error).__name__}: {str(error)[:300]}"
    took = time.process_time() - start
    return found if took <= LONGEST else f"FAULT: {took:.1f} s"


def _warm() -> None:
    """Import what the first recipe of a process would import within its time."""
    from loguru import logger

    logger.remove()
    check(mutant(0))


def _block(first: int, count: int) -> tuple[Counter[str], list[tuple[int, str]], float]:
    counts: Counter[str] = Counter()
    faults, longest = [], 0.0
    for number in range(first, first + count):
        text, start = mutant(number), time.process_time()
        found = check(text)
        longest = max(longest, time.process_time() - start)
        counts[found.split(":")[0]] += 1
        if found.startswith("FAULT"):
            faults.append((number, found))
    return counts, faults, longest


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", type=int, help="print one mutant and what becomes of it")
    args = parser.parse_args()
    if args.show is not None:
        print(mutant(args.show), check(mutant(args.show)), sep="\n")
        return 0
    started = time.monotonic()
    blocks = [
        (first, min(BLOCK, args.first + args.count - first))
        for first in range(args.first, args.first + args.count, BLOCK)
    ]
    counts: Counter[str] = Counter()
    faults: list[tuple[int, str]] = []
    longest = 0.0
    with ProcessPoolExecutor(args.processes, mp_context=get_context("spawn"), initializer=_warm) as pool:
        for done, (some, bad, took) in enumerate(pool.map(_block, *zip(*blocks, strict=True)), start=1):
            counts, longest = counts + some, max(longest, took)
            faults += bad
            if done % 50 == 0:
                print(
                    f"{done * BLOCK:,} in {time.monotonic() - started:.0f} s, {len(faults)} faults",
                    file=sys.stderr,
                    flush=True,
                )
    result = {
        "command": " ".join(["python -m integration.mutated_recipes", *sys.argv[1:]]),
        "environment": {
            "python": platform.python_version(), "machine": platform.machine(), "cpus": os.cpu_count(),
            **{name: version(name) for name in ("pydantic", "pyyaml", "llmcompressor", "compressed-tensors")},
        },
        "seed": SEED, "mutants": args.count, "seconds": round(time.monotonic() - started, 1),
        "longest_cpu_seconds": round(longest, 3), "outcomes": dict(counts.most_common()),
        "faults": [{"mutant": number, "found": found} for number, found in faults[:100]],
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
