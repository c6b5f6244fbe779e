"""A/B of parts whose gain was never measured alone: each step as it is against the same step without one part, by turns.

    python -m benchmarks.speed.simplify [--small] [--out FILE]

Parts and what replaces them:
    launch_cache     `quantizer.fake_quant_triton.Kernel`: Triton's own start of a kernel
    unrounded        the second float32 multiplication of two logits of a row: both as they were written
    target_rows      target rows of the head's gradient added last: added with all others
    barrier          `tl.debug_barrier` before a second store: a selection before one store
    copy_threads     threads that copy cached states: copies one after the other

Every pair is measured three times in one process. `gain` is the share of a step that the part saves: what is below 3 % in each
of the three goes. For `unrounded` and `target_rows` the errors of value and gradients against float64 are written as well. On a
CPU, and with --small, sizes shrink; the launch cache and the barrier need a GPU or TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.cached import cached_teacher
from benchmarks.speed.head import _Case, _errors
from benchmarks.speed.step import IMAGE, STUDENT, TEACHER, Variant, _batch, _free, _grace, _trainable, shaped
from benchmarks.speed.timing import paired_ms
from grace_plugin.export.record import environment
from grace_plugin.losses import fused_head, fused_head_triton
from grace_plugin.quantizer import fake_quant_triton
from grace_plugin.teacher import cached

RESULTS = Path(__file__).parents[1] / "results" / "speed"
ROUNDS = 3
FULL = {"tokens": 4096, "vocabulary": 151936, "student": 2048, "teacher": 4096}
SMALL = {"tokens": 8, "vocabulary": 4096, "student": 64, "teacher": 128}
KERNELS = fused_head_triton.triton is not None and (torch.cuda.is_available() or fake_quant_triton.INTERPRETED)


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Set an attribute for the length of a block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def start_by_triton(
    self: Any, programs: int, arguments: tuple[Any, ...], constants: tuple[Any, ...], warps: int
) -> None:
    """Start a kernel as Triton's users do."""
    self._function[programs,](*arguments, *constants, num_warps=warps)


def without_product(losses: Callable[..., None]) -> Callable[..., None]:
    """`losses_in_place` that takes all logits as they were written."""
    return lambda *arguments: losses(*arguments[:7])


SELECTION = [
    ("        tl.store(at + local, grad, mask=inside)\n", ""),
    ("            tl.debug_barrier()  # another thread has just written there; the later write must win\n", ""),
    (
        "            tl.store(at + tl.program_id(1) * BLOCK + y, tl.load(target_grads + row))\n",
        "            grad = tl.where(tl.arange(0, BLOCK) == y, tl.load(target_grads + row), grad)\n",
    ),
    ("                tl.debug_barrier()  # as above\n", ""),
    (
        "                tl.store(at + tl.program_id(1) * BLOCK + best, grad_best)\n",
        "                grad = tl.where(tl.arange(0, BLOCK) == best, grad_best, grad)\n",
    ),
    (
        "        if TEACHER == 2:\n            tl.store(gaps",
        "        tl.store(at + local, grad, mask=inside)\n        if TEACHER == 2:\n            tl.store(gaps",
    ),
]
"""Changes to the text of `losses.fused_head_triton` that put selections in the place of barriers."""


@cache
def selecting() -> Any:
    """The kernels' module with a selection before one store; from a file, because Triton reads a kernel's source."""
    source = Path(str(fused_head_triton.__file__)).read_text()
    for old, new in SELECTION:
        assert source.count(old) == 1, f"the kernel has changed: {old!r}"
        source = source.replace(old, new)
    path = Path(tempfile.mkdtemp(prefix="grace-simplify-")) / "selecting_triton.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location("selecting_triton", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.TeacherSlices = (
        fused_head_triton.TeacherSlices
    )  # callers make the original's, and the function asks for its type
    return module


class Inline:
    """In the place of a pool: the calling thread copies."""

    map = staticmethod(map)


def step_variants() -> dict[str, Variant]:
    """The parts of a whole step that this machine can leave out."""
    if not KERNELS:
        return {}
    plain = without_product(fused_head_triton.losses_in_place)
    return {
        "launch_cache": lambda: replaced(fake_quant_triton.Kernel, "start", start_by_triton),
        "unrounded": lambda: replaced(fused_head_triton, "losses_in_place", plain),
        "barrier": lambda: replaced(fused_head_triton, "losses_in_place", selecting().losses_in_place),
    }


def gains(rounds: list[dict[str, float]]) -> dict[str, Any]:
    """Milliseconds of each round as it is and without each part, and the share of a step that the part saves."""
    found: dict[str, Any] = {"ms": [one["ms"] for one in rounds]}
    for name in rounds[0].keys() - {"ms"}:
        shares = [one[name] / one["ms"] - 1 for one in rounds]
        found[name] = {"ms": [one[name] for one in rounds], "gain": shares, "median": statistics.median(shares)}
    return found


def steps(device: str, small: bool) -> dict[str, Any]:
    """Whole steps with a resident and with a cached teacher."""
    sizes, shrink = ({"rows": 1, "length": 640}, 8) if small else ({"rows": 4, "length": 2048}, 1)
    teacher = shaped(TEACHER, device, torch.bfloat16, shrink).eval().requires_grad_(False)
    student = _trainable(shaped(STUDENT, device, torch.float32, shrink))
    batch: dict[str, Any] = _batch(vocabulary=student.config.text_config.vocab_size, device=device, **sizes)

    def rounds(of: Any, variants: dict[str, Variant]) -> dict[str, Any]:
        timed = [_grace(student, of, batch, device, variants=variants) for _ in range(ROUNDS)]
        return gains([{name: one[name] for name in ("ms", *variants)} for one in timed])

    found = {"resident": rounds(teacher, step_variants())} if KERNELS else {}
    _free(student)
    with tempfile.TemporaryDirectory(prefix="grace-cached-") as folder:
        states = cached_teacher(teacher.config, batch, IMAGE, Path(folder), device)
        found["cached"] = rounds(states, {"copy_threads": lambda: replaced(cached, "_copiers", Inline)})
    return found


def heads(device: str, small: bool) -> dict[str, Any]:
    """The head alone with a gradient summed in its own dtype: milliseconds, and errors against float64."""
    sizes = SMALL if small else FULL
    names = ("tokens", "vocabulary", "student", "teacher")
    case = _Case(*(sizes[name] for name in names), device, torch.bfloat16)
    work, variants = partial(case.ours, weight_grad_dtype=torch.bfloat16), step_variants()
    variants.pop("launch_cache", None)
    variants["target_rows"] = lambda: replaced(fused_head, "defers_target_rows", lambda *_: False)

    def within(variant: Variant) -> tuple[torch.Tensor, ...]:
        with variant():
            return work()

    works = {"ms": work, **{name: partial(within, variant) for name, variant in variants.items()}}
    exact = case.exact()
    errors = {name: _errors(one(), exact) for name, one in works.items()}
    same = "barrier" not in works or all(map(torch.equal, work(), works["barrier"]()))
    rounds = [paired_ms(works, 20) for _ in range(ROUNDS)]
    return {"sizes": sizes, **gains(rounds), "errors": errors, "barrier_has_equal_bits": same}


def main() -> None:
    """Measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument(
        "--out", type=Path, default=None, help="default: benchmarks/results/speed/simplify_<device>.json"
    )
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    small = given.small or device == "cpu"
    found = {"heads": heads(device, small), "steps": steps(device, small)}
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    out = given.out or RESULTS / f"simplify_{device}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": environment(), "device": name, **found}, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
