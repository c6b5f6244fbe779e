"""The record of a run in its checkpoint, and the comparison of a checkpoint's files with it.

config.json, model*.safetensors    pack-quantized compressed-tensors, written by llm-compressor
tokenizer and processor files      those of the processor that the run trained with (the source's byte for byte, if it is that)
generation_config.json             the source's, byte for byte
recipe.yaml                        the recipe with inferred values, without local paths
run.yaml                           what `train` was given (`grace_plugin.run.manifest`), without local paths
grace/record.json                  hashes of the final codes and scales, of all other weights, of every file; environment
grace/probe.safetensors            a batch of seeded noise, or one that the user gave, and the trained model's logits on it
verification.json                  what `verify` found

The two JSON files hold the SHA-256 of their own content and must be, byte for byte, the text that this module writes. That
finds edits, not forgers: who edits can compute a new hash as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace_plugin.digest import file_digest, tensor_digest, value_digest
from grace_plugin.export.processor import is_processor_file
from grace_plugin.teacher.checkpoint import open_checkpoint

RECORD, PROBE, VERIFICATION = "grace/record.json", "grace/probe.safetensors", "verification.json"
RECIPE, GENERATION, CONFIG, RUN_FILE = "recipe.yaml", "generation_config.json", "config.json", "run.yaml"

_SEAL = "sha256"
_LARGEST = 2**28  # bytes of a record
#: what git, the hub and its client add to a folder, and license texts, which a publisher has to add
_DESCRIPTION = re.compile(
    r"\.git(/.*)?|\.cache/huggingface/.*|\.gitattributes|README\.md"
    # by their whole names: servers read every *.safetensors of a folder, so LICENSE.safetensors would be weights
    r"|(LICENSE|NOTICE)[\w -]*(\.(txt|md|rst|html|pdf))?"
)
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ABSENT = object()


def dense_digests(model: nn.Module, quantized: set[str]) -> dict[str, str]:
    """Return hashes by name of all parameters but codes and scales: tower, projector, embeddings, norms, biases, head."""
    packed = {"weight", "weight_packed", "weight_scale", "weight_shape"}
    found = {}
    for name, parameter in model.named_parameters():
        module, _, leaf = name.rpartition(".")
        if module not in quantized or leaf not in packed:
            found[name] = tensor_digest(parameter)
    return found


def environment() -> dict[str, str]:
    """Return the versions and the device on which it depends whether two runs give the same bits."""
    # threads and capability: they change the order in which oneDNN sums, and so the last bits
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or platform.machine()
    packages = ("torch", "transformers", "compressed-tensors", "llmcompressor")
    return {
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "device": device,
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
    }


def is_local(name: str) -> bool:
    """Whether a model's name is a path on this machine rather than a hub id."""
    return name.startswith((".", "~", os.sep)) or os.path.isabs(name) or Path(name).exists()


def provenance(name: str | None, *, paths: bool) -> dict[str, Any]:
    """Return what a record says of a model: hub id or folder name, and the fingerprint of its files (None without files).

    Args:
        name: hub id or path; None for a model that was passed loaded and has no name.
        paths: whether a local path is kept.
    """
    if not name:
        return {}
    local = is_local(name)
    found: dict[str, Any] = {"name": Path(name).resolve().name if local else name, "fingerprint": fingerprint(name)}
    return found | ({"path": name} if local and paths else {})


def fingerprint(source: str | Path, revision: str = "main") -> dict[str, str] | None:
    """Return the commit of a hub snapshot or the digests of a folder's config and weights; None where it has neither."""
    try:
        return open_checkpoint(str(source), revision).fingerprint()
    except (OSError, ValueError, KeyError, TypeError, AssertionError):  # not a reason to lose a trained model
        return None


def checkpoint_digest(source: str | Path, revision: str = "main") -> str | None:
    """Return one digest of `fingerprint`, None where there is none."""
    found = fingerprint(source, revision)
    return None if found is None else value_digest(found)


def seal(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file that holds the hash of its content."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    own_hash = hashlib.sha256(_text(plain).encode()).hexdigest()
    return _text(plain | {_SEAL: own_hash}) + "\n"


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True)


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that holds the hash of its content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(seal(content).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Read what `write_sealed` wrote.

    Raises:
        ValueError: unreadable, no JSON, without its hash, or edited.
    """
    try:
        # before it is read: a large file under this name must not fill the memory
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.name} is larger than any record ({path.stat().st_size} bytes)")
        text = path.read_bytes().decode()  # not `read_text`, for which another line ending is the same text
        content = json.loads(text)
    except OSError as error:
        raise ValueError(f"{path.name} cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{path.name} is not JSON any more: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is not what GRACE writes: it holds a {type(content).__name__}")
    if _SEAL not in content:
        raise ValueError(f"{path.name} holds no hash of itself: an earlier version wrote it, or it was edited")
    if seal(content) != text:
        raise ValueError(f"{path.name} was edited after the run: its content and its own hash differ")
    return content


def files_below(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a checkpoint, by relative name; "" where one cannot be read.

    Record, verification and descriptions of a repository are left out.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        # a link to a folder counts as a file, so that it is reported as unknown
        if name in (RECORD, VERIFICATION) or is_description(name) or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            found[name] = file_digest(path) if path.is_file() else ""
        except OSError:
            found[name] = ""
    return found


def is_description(name: str) -> bool:
    """Whether a file only describes the repository: a model card, a license, what git and the hub's client keep."""
    return _DESCRIPTION.fullmatch(name) is not None


def files_not_covered(folder: Path) -> list[str]:
    """Return the files of a checkpoint that no proof covers; those of git and of the hub's client by their folder."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())
    described = (name for name in names if is_description(name))
    return sorted({re.sub(r"^(\.git|\.cache/huggingface)/.*", r"\1/*", name, flags=re.DOTALL) for name in described})


def compare_files(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare names and hashes of all files, and config.json field by field.

    Returns:
        The result so far, with the names of failed proofs under `failed`, and a sentence for each failure. Processor files that
        a user has saved after `model.save_pretrained` are under `files_not_proven`, what describes the repository under
        `files_not_covered`; both fail nothing.
    """
    known, unproven = dict(record["files"]), dict(record["unproven"])
    own_processor = bool(unproven)
    found = files_below(folder)
    changed = sorted(name for name, sha in known.items() if name in found and found[name] != sha)
    missing = sorted(known.keys() - found.keys())
    unknown = sorted(found.keys() - known.keys() - unproven.keys())
    not_proven = sorted(name for name in found if own_processor and name not in known and is_processor_file(name))
    unknown = [name for name in unknown if name not in not_proven]
    edited = "changed after the run: {}"
    others = [n for n in changed if not _is_weights(n) and not is_processor_file(n)]
    told: list[tuple[str, list[str], str]] = [
        ("processor_files_changed", _processor(changed), edited),
        ("processor_files_changed", _processor(missing), "missing: {}"),
        ("weights_changed", [n for n in changed if _is_weights(n)], edited),
        ("files_changed", others, edited),
        ("files_missing", [n for n in missing if not is_processor_file(n)], "missing: {}"),
        ("files_unknown", unknown, "not written by the run: {}"),
    ]
    failed, sentences = [], []
    for name, files, sentence in told:
        if files:
            failed += [name] if name not in failed else []
            more = f" and {len(files) - 5} more" if len(files) > 5 else ""
            sentences.append(sentence.format(", ".join(files[:5]) + more))
    if CONFIG in changed:
        sentences.append(_config(folder, record["config"]))
    processor = [name for name in {**known, **unproven} if is_processor_file(name)]
    altered = {n for n, sha in unproven.items() if found.get(n) != sha}
    return {
        "failed": failed,
        "files": len(found),
        "files_not_proven": not_proven,
        "files_not_covered": files_not_covered(folder),
        "processor_files": len(processor),
        "processor_files_changed": sorted({*_processor(changed), *_processor(missing), *altered}),
    }, sentences


def _processor(names: list[str]) -> list[str]:
    return [name for name in names if is_processor_file(name)]


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) and "/" not in name


def _config(folder: Path, recorded: dict[str, Any]) -> str:
    """Return a sentence on what differs between config.json and the recorded one."""
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{CONFIG} cannot be read: {str(error)[:200]}"
    differing = list(_fields(recorded, found, ""))
    if not differing:
        return f"{CONFIG} holds the same values in other text"
    return f"{CONFIG} differs in {', '.join(differing[:5])}" + (
        f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    )


def _fields(recorded: Any, found: Any, name: str) -> list[str]:
    if isinstance(recorded, dict) and isinstance(found, dict):
        nested = []
        for key in sorted(recorded.keys() | found.keys()):
            nested += _fields(recorded.get(key, _ABSENT), found.get(key, _ABSENT), f"{name}.{key}" if name else key)
        return nested
    # types too: 1, 1.0 and True are equal in Python, and not to those who read the file
    if type(recorded) is type(found) and recorded == found:
        return []
    return [f"{name or 'all of it'} (recorded {_shown(recorded)}, found {_shown(found)})"]


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)[:60]
