"""Compare the files of a checkpoint with those that its record knows, by name and by SHA-256."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from grace_plugin.export.layout import CONFIG
from grace_plugin.export.processor import is_processor_file
from grace_plugin.export.record import files_below

__all__ = ["compare_files"]

_WEIGHTS = (".safetensors", ".safetensors.index.json")


def compare_files(folder: Path, record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Compare names and hashes of all files, and config.json field by field.

    Processor files that a user has saved after `model.save_pretrained` are not proven: they are named and do not fail.

    Returns:
        The result so far, with the names of failed proofs under `failed`, and a sentence for each failure.
    """
    known, unproven = dict(record["files"]), dict(record["unproven"])
    own_processor = bool(unproven)
    found = files_below(folder)
    changed = sorted(name for name, sha in known.items() if name in found and found[name] != sha)
    missing = sorted(known.keys() - found.keys())
    unknown = sorted(found.keys() - known.keys() - unproven.keys())
    not_proven = sorted(name for name in found if own_processor and name not in known and is_processor_file(name))
    unknown = [name for name in unknown if name not in not_proven]
    told: list[tuple[str, list[str], str]] = [
        ("processor_files_changed", _processor(changed), "changed after the run: {}"),
        ("processor_files_changed", _processor(missing), "missing: {}"),
        ("weights_changed", [n for n in changed if _is_weights(n)], "changed after the run: {}"),
        (
            "files_changed",
            [n for n in changed if not _is_weights(n) and not is_processor_file(n)],
            "changed after the run: {}",
        ),
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
        "processor_files": len(processor),
        "processor_files_changed": sorted({*_processor(changed), *_processor(missing), *altered}),
    }, sentences


def _processor(names: list[str]) -> list[str]:
    return [name for name in names if is_processor_file(name)]


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS) and "/" not in name


def _config(folder: Path, recorded: dict[str, Any]) -> str:
    """What differs between config.json and the recorded one."""
    try:
        found = json.loads((folder / CONFIG).read_text())
    except (OSError, ValueError, RecursionError) as error:
        return f"{CONFIG} cannot be read: {str(error)[:200]}"
    differing = list(_fields(recorded, found, ""))
    if not differing:
        return f"{CONFIG} says the same in other words"
    return f"{CONFIG} differs in {', '.join(differing[:5])}" + (
        f" and {len(differing) - 5} more" if len(differing) > 5 else ""
    )


def _fields(recorded: Any, found: Any, name: str) -> list[str]:
    if isinstance(recorded, dict) and isinstance(found, dict):
        nested = []
        for key in sorted(recorded.keys() | found.keys()):
            nested += _fields(recorded.get(key, _ABSENT), found.get(key, _ABSENT), f"{name}.{key}" if name else key)
        return nested
    if type(recorded) is type(found) and recorded == found:
        return []
    return [f"{name or 'all of it'} (recorded {_shown(recorded)}, found {_shown(found)})"]


_ABSENT = object()


def _shown(value: Any) -> str:
    return "nothing" if value is _ABSENT else json.dumps(value)[:60]
