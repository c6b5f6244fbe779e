"""Read the quantization formats of a recipe from upstream's resolved config, and refuse those whose scales are not learned.

Learned are integer weights of 2 to 8 bits, symmetric, with one scale per group of input channels or per output channel, and no
activation quantization. 8 bits need `scales.stored_dtype: float16`: code * scale does not fit into bfloat16, the dtype of most
students. On CUDA vLLM serves 4 and 8 bits by itself and 2 to 8 bits with the package humming-kernels; its CPU build serves 4.
"""

from __future__ import annotations

import difflib
import json
import subprocess
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat
from grace_plugin.quantizer.format import FORMATS
from grace_plugin.recipe import check_pattern, shown
from grace_plugin.upstream import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationMetadata,
    QuantizationStrategy,
    QuantizationType,
    is_preset_scheme,
    match_named_modules,
)
from grace_plugin.vlm import family_of, matches

__all__ = [
    "check_fused",
    "check_groups",
    "check_patterns",
    "check_preset",
    "clear_schemes",
    "format_of",
    "layers_by_format",
    "read_formats",
    "stored_dtype",
]

_HOW_TO_FIX = "use scheme: W4A16, or config_groups with symmetric integer weights per group or channel and nothing else"

_LEARNED_PRESETS = tuple(name for name in (f"W{bits}A16" for bits in range(2, 9)) if is_preset_scheme(name))
_TYPES: dict[str, tuple[type, ...]] = {
    "num_bits": (int,), "type": (str,), "symmetric": (bool,), "group_size": (int,), "strategy": (str,), "dynamic": (bool, str),
    "actorder": (str, bool), "observer": (str,), "observer_kwargs": (dict,), "block_structure": (list, str),
}  # fmt: skip
_KINDS = {int: "a whole number", bool: "true or false", str: "a name", dict: "a mapping", list: "a list"}
_MATCH_SECONDS = 5.0
_MATCH = """
import json, re, sys
patterns, names = json.load(sys.stdin)
for number, pattern in enumerate(patterns):
    print(number, flush=True)
    for name in names:
        re.match(pattern, name)
"""


def check_preset(scheme: Any) -> Any:
    """Refuse a scheme that is no preset of compressed-tensors, or a mapping whose keys are none; else return it.

    Raises:
        ValueError: names the scheme, the nearest preset and those that are learned.
    """
    if scheme is None:
        return scheme
    if not isinstance(scheme, str | Mapping) or not scheme:
        raise ValueError(f"scheme must be the name of a preset, for instance W4A16, got {shown(scheme)}")
    for name in [scheme] if isinstance(scheme, str) else scheme:
        if not isinstance(name, str) or not is_preset_scheme(name):
            near = difflib.get_close_matches(str(name)[:80].upper(), _LEARNED_PRESETS, 1)
            raise ValueError(
                f"scheme {shown(name)} is no preset of compressed-tensors; {''.join(f'did you mean {n!r}? ' for n in near)}"
                f"learned: {', '.join(_LEARNED_PRESETS)}, or the same in config_groups"
            )
    if isinstance(scheme, str):
        return scheme
    # copied: upstream writes lists into the caller's mapping
    return {name: _names(f"scheme.{name}", targets) for name, targets in scheme.items()}


def _names(where: str, targets: Any) -> list[str]:
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{where} must be a list of layer names or classes, got {shown(targets)}")
    for name in names:
        try:
            check_pattern(name)
        except ValueError as error:
            raise ValueError(f"{where} {error}") from None
    return names


def check_groups(groups: Any) -> Any:
    """Check the types of config_groups before compressed-tensors does, which compares and calls values of any type.

    Raises:
        ValueError: names the key, what it takes and what it was given.
    """
    for name, group in groups.items() if isinstance(groups, Mapping) else ():
        where = f"config_groups.{shown(name) if not isinstance(name, str) else name}"
        if not isinstance(group, Mapping):
            continue
        if "targets" in group:
            _names(f"{where}.targets", group["targets"])
        for part in ("weights", "input_activations", "output_activations"):
            asked = group.get(part)
            for key, value in asked.items() if isinstance(asked, Mapping) else ():
                kinds = _TYPES.get(key)
                if kinds is None or value is None:
                    continue
                if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
                    wanted = " or ".join(_KINDS[kind] for kind in kinds)
                    raise ValueError(f"{where}.{part}.{key} must be {wanted}, got {shown(value)}")
    return groups


def check_patterns(asked: Mapping[str, Iterable[str]], model: nn.Module, seconds: float = _MATCH_SECONDS) -> None:
    """Refuse a regular expression that takes too long on the names of this model's modules and parameters.

    Nested repetitions take exponential time on some names, and Python cannot interrupt a match in any thread but the main one.
    So all patterns are matched once in a second interpreter, which is ended after five seconds. Without regular expressions
    none is started.

    Args:
        asked: patterns by the recipe's key.
        model: whose names are matched.
        seconds: how long all of them may take.

    Raises:
        ValueError: names the key and the pattern.
    """
    patterns = [(key, pattern) for key, several in asked.items() for pattern in several if pattern.startswith("re:")]
    if not patterns or not sys.executable:
        return
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    given = json.dumps([[pattern[3:] for _, pattern in patterns], sorted(names)])
    command = [sys.executable, "-I", "-S", "-c", _MATCH]
    try:
        subprocess.run(command, input=given.encode(), capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as late:
        number = int((late.stdout or b"0").split()[-1])
        key, pattern = patterns[number]
        raise ValueError(
            f"{key} {shown(pattern)} takes more than {seconds:.0f} s to match with the layers' names (nested or "
            "repeated * and + try every way to split a name); write it without them, for instance re:.*mlp.*"
        ) from None


def read_formats(config: QuantizationConfig, stored_dtype: torch.dtype = torch.float16) -> dict[str, QuantFormat]:
    """Return the format of each group of a resolved config; the one place where schemes that are not learned are refused.

    Args:
        config: upstream's resolved config.
        stored_dtype: of the checkpoint; float16, which holds every format, while it is not known.

    Raises:
        ValueError: names the group, the field, its value, and what is learned instead.
    """
    problems = [] if config.kv_cache_scheme is None else ["kv_cache_scheme is set"]
    learned: dict[str, tuple[Any, ...]] = {
        "type": (QuantizationType.INT,),
        "symmetric": (True,),
        "strategy": (QuantizationStrategy.GROUP, QuantizationStrategy.CHANNEL),
        "dynamic": (False,),
        "actorder": (None,),
        "num_bits": tuple(sorted({bits for row in FORMATS for bits in row.num_bits})),
    }
    for name, scheme in config.config_groups.items():
        activations = ("input_activations", "output_activations")
        problems += [f"{name}.{field} is quantized" for field in activations if getattr(scheme, field) is not None]
        if scheme.weights is None:
            problems.append(f"{name}.weights is missing")
            continue
        for field, allowed in learned.items():
            value = getattr(scheme.weights, field)
            if value not in allowed:
                options = ", ".join(str(getattr(one, "value", one)) for one in allowed)
                problems.append(f"{name}.weights.{field} is {getattr(value, 'value', value)}, learned: {options}")
    if problems:
        raise ValueError(f"GraceModifier does not learn this scheme: {'; '.join(problems)}; {_HOW_TO_FIX}")
    formats = {name: format_of(scheme.weights, stored_dtype) for name, scheme in config.config_groups.items()}
    for fmt in formats.values():
        _ = fmt.quantizer  # raises where the codes would not survive being saved
    return formats


def format_of(weights: QuantizationArgs, stored_dtype: torch.dtype) -> QuantFormat:
    """Return the format that compressed-tensors' arguments describe, learned or not."""
    group_size = weights.group_size if weights.strategy == QuantizationStrategy.GROUP else None
    return QuantFormat(weights.num_bits, group_size, stored_dtype, weights.symmetric)


def layers_by_format(
    config: QuantizationConfig, matched: dict[str, nn.Module], stored_dtype: torch.dtype
) -> dict[QuantFormat, dict[str, nn.Linear]]:
    """Sort the matched layers by their format.

    Raises:
        ValueError: a format is not learned, a matched module is no torch.nn.Linear, or two groups of different format claim the
            same layer.
    """
    formats, found = read_formats(config, stored_dtype), dict[QuantFormat, dict[str, nn.Linear]]()
    for name, module in matched.items():
        if not isinstance(module, nn.Linear):
            raise ValueError(f"{name} is a {type(module).__name__}; GRACE quantizes torch.nn.Linear, add it to ignore")
        groups = config.config_groups.items()
        claims = {formats[group] for group, scheme in groups if _targets(scheme.targets, name, module)}
        if len(claims) != 1:
            raise ValueError(f"{name} is claimed by {len(claims)} formats of config_groups; let exactly one target it")
        found.setdefault(claims.pop(), {})[name] = module
    return found


def check_fused(formats: Mapping[QuantFormat, Mapping[str, nn.Linear]], model: nn.Module) -> None:
    """Refuse linears that vLLM merges into one matrix (`Family.fused`) and the recipe quantizes differently.

    Raises:
        ValueError: lists every such set of layers; vLLM could not load the checkpoint.
    """
    chosen = {name: fmt for fmt, linears in formats.items() for name in linears}
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    problems, fused = [], family_of(model).fused
    for parent in sorted({name.rpartition(".")[0] for name in chosen}):
        for parts in fused:
            members = [f"{parent}.{part}" for part in parts if f"{parent}.{part}" in names]
            if len({chosen.get(member) for member in members}) > 1:
                each = (f"{member.rpartition('.')[2]}: {chosen.get(member, 'not quantized')}" for member in members)
                problems.append(f"{parent} ({', '.join(each)})")
    if problems:
        raise ValueError(
            f"vLLM merges these linears of a layer into one matrix, so they need one format: {'; '.join(problems)}. "
            "Target or ignore them together"
        )


def _targets(targets: list[str], name: str, module: nn.Module) -> bool:
    return matches(name, targets) or any(target in {c.__name__ for c in type(module).__mro__} for target in targets)


def stored_dtype(model: nn.Module, asked: str) -> torch.dtype:
    """Return the dtype of the written checkpoint: as asked, or that of the source checkpoint on disk, or of the loaded weights.

    Raises:
        ValueError: the source is stored in float32, which no INT4 kernel reads, and the recipe says "auto".
    """
    if asked != "auto":
        return getattr(torch, asked)
    found = _source_dtype(model) or next(model.parameters()).dtype
    if found not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"the source checkpoint is stored as {found}; INT4 kernels take bfloat16 or float16 scales. "
            "Set scales.stored_dtype: bfloat16 in the recipe"
        )
    return found


def _source_dtype(model: nn.Module) -> torch.dtype | None:
    from transformers import AutoConfig

    source = getattr(model, "name_or_path", "")
    if not source:
        return None
    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError):
        return None
    dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def clear_schemes(model: nn.Module, targets: Iterable[str], ignore: Iterable[str]) -> None:
    """Undo upstream's `initialize_quantization`: remove schemes, their parameters, forwards and marks; weights stay."""
    for _, layer in match_named_modules(model, targets, ignore):
        QuantizationMetadata.clear_quantization(layer)
        if getattr(layer.forward, "__func__", None) is type(layer).forward:
            layer.__dict__.pop("forward", None)
        layer.__dict__.pop("quantization_status", None)
    for module in model.modules():
        module.__dict__.pop("quantization_enabled", None)
