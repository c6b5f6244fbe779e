"""Read and check a checkpoint's small files before a weight is loaded: config, quantization, adapter, index of the shards.

A student is trained from unquantized weights. A teacher may be quantized by a method whose stored weights transformers
restores exactly; other methods are refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

__all__ = [
    "DEQUANTIZED",
    "check_adapter",
    "check_quantization",
    "checkpoint_file",
    "excerpt",
    "first_names",
    "open_safetensors",
    "quantization_of",
    "read_config",
    "tensors_of",
]

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

DEQUANTIZED = ("compressed-tensors", "fp8")
"""Methods whose weights are dequantized as they are loaded, so that every kind of teacher computes with the same ones."""


@dataclass(frozen=True)
class _Method:
    """A quantization method: the `package` that must be installed, and whether layers can be offloaded."""

    package: str | None = None
    offload: bool = True


# transformers drops scales of methods that it does not know and computes with the remaining tensors, hence a list.
_TEACHERS = {
    "compressed-tensors": _Method(),
    "fp8": _Method(),
    "bitsandbytes": _Method("bitsandbytes"),
    "gptq": _Method("gptqmodel", offload=False),
    "awq": _Method("gptqmodel", offload=False),
}
_ELSEWHERE = "take the BF16 checkpoint that it was made of"


def excerpt(value: Any, limit: int = 200) -> str:
    """Return a value or an error as text for a message: on one line, cut to `limit` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= limit else f"{text[:limit]}..."


def checkpoint_file(source: str, name: str, revision: str = "main") -> Path | None:
    """Return the local path of a checkpoint's file, or None if the checkpoint has no file of that name."""
    from transformers.utils import cached_file

    try:
        # a private argument of transformers; without it a missing optional file raises
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def _read_json(path: Path | None) -> dict[str, Any]:
    """Read a JSON file that holds an object; empty for any other content."""
    if path is None:
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def read_config(source: str, role: str, revision: str = "main", *, verb: str = "load") -> Any:
    """Read a checkpoint's config, of a class that transformers knows.

    Args:
        source: a folder or a hub id.
        role: "student" or "teacher", for the message.
        verb: "load" or "read", for the message.

    Raises:
        ValueError: no config there, or one that cannot be read.
    """
    from transformers import AutoConfig

    # transformers takes a path that does not exist for a hub id, and its message speaks of the hub and of tokens
    if not Path(source).exists() and (source.startswith(("/", ".", "~")) or source.count("/") > 1):
        raise ValueError(f"cannot {verb} the {role} {excerpt(source)!r}: there is no such folder")
    if Path(source).is_file():
        raise ValueError(
            f"cannot {verb} the {role} {excerpt(source)!r}: it is a file; name the folder of the checkpoint"
        )
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(
            f"cannot {verb} the {role} {excerpt(source)!r}: the folder has no config.json; name the folder that "
            "save_pretrained wrote, or download the checkpoint again"
        )
    try:
        # False, because transformers would otherwise prompt whether the checkpoint's own code may run
        return AutoConfig.from_pretrained(source, revision=revision, trust_remote_code=False)
    except Exception as error:  # a malformed config can raise any error in the class that reads it
        raise ValueError(f"cannot {verb} the {role} {excerpt(source)!r}: {excerpt(error, 300)}") from error


def quantization_of(source: str, revision: str = "main") -> dict[str, Any] | None:
    """Return the `quantization_config` of a checkpoint or of its decoder, or that of modelopt's own file; None without one."""
    config = _read_json(checkpoint_file(source, "config.json", revision))
    text = config.get("text_config")
    # Multimodal checkpoints state the quantization at the top or in the decoder's config; older versions of compressed-tensors
    # call it compression_config.
    for holder in (config, text if isinstance(text, Mapping) else {}):
        for key in ("quantization_config", "compression_config"):
            if holder.get(key):
                found = holder[key]
                return dict(found) if isinstance(found, Mapping) else {"quant_method": found}
    # modelopt leaves config.json unchanged in older versions, and transformers would read packed weights as plain ones
    written = checkpoint_file(source, "hf_quant_config.json", revision)
    if written is None:
        return None
    algorithm = _read_json(written).get("quantization")
    name = algorithm.get("quant_algo") if isinstance(algorithm, Mapping) else None
    return {"quant_method": "modelopt", "quant_algo": name, "file": "hf_quant_config.json"}


def _method(quantization: Mapping[str, Any]) -> str:
    return excerpt(quantization.get("quant_method") or "unknown (no quant_method)", 60)


def check_quantization(
    source: str, quantization: Mapping[str, Any] | None, role: str, *, kind: str = "resident", revision: str = "main"
) -> None:
    """Refuse a quantized student, and a teacher whose method its kind cannot use.

    Args:
        source: a folder or a hub id.
        quantization: of `quantization_of`.
        role: "student" or "teacher".
        kind: the recipe's `teacher.kind`; not read for a student.

    Raises:
        ValueError: names the method and what to use instead.
    """
    if quantization is None:
        return
    method, shown = _method(quantization), excerpt(source)
    detail = f" ({excerpt(quantization['quant_algo'], 40)})" if quantization.get("quant_algo") else ""
    where = quantization.get("file", "the quantization_config of its config.json")
    if role == "student":
        raise ValueError(_student_refusal(source, f"{method}{detail}", where, revision))
    supported = _TEACHERS.get(method)
    if supported is None:
        raise ValueError(
            f"the teacher {shown!r} is quantized with {method}{detail} (says {where}), whose scales transformers would leave "
            f"out or which was not tried here; {_ELSEWHERE}, or one quantized with {', '.join(_TEACHERS)}"
        )
    if supported.package is not None and find_spec(supported.package) is None:
        raise ValueError(
            f"the teacher {shown!r} is quantized with {method}, which transformers reads with the package {supported.package}, "
            f"and that is not installed; install it, or {_ELSEWHERE}"
        )
    if kind == "offload" and not supported.offload:
        raise ValueError(
            f"the teacher {shown!r} is quantized with {method}, whose layers cannot be streamed from host memory; use "
            f"teacher.kind: resident or cached, or {_ELSEWHERE}"
        )


def _student_refusal(source: str, method: str, where: str, revision: str) -> str:
    shown, record = excerpt(source), _read_json(checkpoint_file(source, "grace/record.json", revision))
    if record:
        student = record.get("student")
        made_of = excerpt((student.get("name") if isinstance(student, Mapping) else None) or "its BF16 student")
        return (
            f"the student {shown!r} is a finished GRACE checkpoint, quantized with {method}: its codes cannot be trained "
            f"further; train from the BF16 checkpoint that it was made of ({made_of})"
        )
    return (
        f"the student {shown!r} is quantized with {method} (says {where}); GRACE quantizes a student itself and trains from "
        f"unquantized weights: {_ELSEWHERE}"
    )


def check_adapter(source: str, role: str, revision: str = "main") -> None:
    """Refuse a folder with a PEFT adapter: transformers applies it only where peft is installed.

    Raises:
        ValueError: names the file and how to merge the adapter.
    """
    path = checkpoint_file(source, "adapter_config.json", revision)
    if path is None:
        return
    base = excerpt(_read_json(path).get("base_model_name_or_path") or "its base model")
    # A folder of an adapter alone has no config.json; one next to a model's weights has both.
    if checkpoint_file(source, "config.json", revision) is None:
        raise ValueError(
            f"the {role} {excerpt(source)!r} is a PEFT adapter of {base}, not a model; load it with peft, call "
            "merge_and_unload(), save_pretrained and processor.save_pretrained into one folder, and name that folder"
        )
    raise ValueError(
        f"the {role} {excerpt(source)!r} holds adapter_config.json next to its weights, and transformers would load an adapter "
        f"of {base} onto them where peft is installed; if the adapter is merged (merge_and_unload()), remove "
        "adapter_config.json and adapter_model.safetensors, else merge it first"
    )


def open_safetensors(path: Path, role: str) -> Any:
    """Open a safetensors file, which compares its length with its header.

    Raises:
        ValueError: it is cut short, no safetensors file, or a Git LFS pointer.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        # git clone without git-lfs leaves a text file of 130 bytes in the place of the weights
        with path.open("rb") as content:
            pointer = content.read(40).startswith(b"version https://git-lfs")
        reason = "a Git LFS pointer, not the weights: run git lfs pull" if pointer else excerpt(error)
        raise ValueError(f"cannot read {path} of the {role}: {reason}; fetch or save it again") from error


def tensors_of(folder: Path, role: str) -> dict[str, tuple[list[int], str]] | None:
    """Return shape and safetensors dtype of every tensor of a local checkpoint, by name, from the headers alone.

    None if the folder holds no safetensors weights under transformers' names.

    Raises:
        ValueError: an index that cannot be read, shards that it names and that are not there, or a file that is cut short.
    """
    if (folder / WEIGHTS).is_file():
        files: dict[str, set[str] | None] = {WEIGHTS: None}
    elif (folder / INDEX).is_file():
        files = _sharded(folder, role)
    else:
        return None
    found: dict[str, tuple[list[int], str]] = {}
    for name, named in files.items():
        with open_safetensors(folder / name, role) as opened:
            for key in opened.keys():
                part = opened.get_slice(key)
                found[key] = part.get_shape(), part.get_dtype()
        absent = sorted((named or set()) - found.keys())
        if absent:
            raise ValueError(
                f"cannot load the {role}: {folder / name} lacks {len(absent)} tensor(s) that {INDEX} names in it "
                f"({first_names(absent)}); fetch or save the checkpoint again"
            )
    return found


def _sharded(folder: Path, role: str) -> dict[str, set[str] | None]:
    """Return the names of tensors by shard, and refuse missing shards."""
    index = _read_json(folder / INDEX).get("weight_map")
    if not isinstance(index, dict) or not all(isinstance(name, str) for name in index.values()):
        raise ValueError(f"cannot read {folder / INDEX} of the {role}: it holds no weight_map; fetch or save it again")
    files: dict[str, set[str] | None] = {}
    for tensor, name in index.items():
        named = files.setdefault(name, set())
        assert named is not None
        named.add(tensor)
    absent = sorted(name for name in files if not (folder / name).is_file())
    if absent:
        raise ValueError(
            f"cannot load the {role} {excerpt(folder)!r}: it lacks {len(absent)} of {len(files)} weights files "
            f"({first_names(absent)}), so the download or copy is incomplete; fetch it again"
        )
    return files


def first_names(names: list[str], count: int = 3) -> str:
    """Return the first names of a list for a message."""
    return ", ".join(excerpt(name, 120) for name in names[:count]) + (", ..." if len(names) > count else "")
