"""The record that a run leaves in its checkpoint, and the verdict: JSON files that notice when they are edited.

Each holds the SHA-256 of its own content, and must be the text that this module writes: another byte anywhere is another
content or another text. That finds edits, not forgers: who edits can compute a new hash as well.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from grace_plugin.export.layout import RECORD, VERIFICATION, file_digest

__all__ = ["files_below", "is_description", "read_sealed", "seal", "write_sealed"]

_SEAL = "sha256"
_LARGEST = 2**28
#: by their whole names: servers read every *.safetensors of a folder, so LICENSE.safetensors would be weights
_DESCRIPTION = re.compile(r"\.gitattributes|\.gitignore|README\.md|(LICENSE|NOTICE)[\w -]*(\.(txt|md|rst|html|pdf))?")


def seal(content: Mapping[str, Any]) -> str:
    """Text of a sealed JSON file: the content with its own hash."""
    plain = {key: value for key, value in content.items() if key != _SEAL}
    text = json.dumps(plain, indent=1, sort_keys=True, ensure_ascii=True)
    return (
        json.dumps(
            plain | {_SEAL: hashlib.sha256(text.encode()).hexdigest()}, indent=1, sort_keys=True, ensure_ascii=True
        )
        + "\n"
    )


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write a sealed JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(seal(content).encode())


def read_sealed(path: Path) -> dict[str, Any]:
    """Read a sealed JSON file.

    Raises:
        ValueError: unreadable, no JSON, without a seal or edited; the message names the file in one sentence.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError(f"{path.name} is larger than any record ({path.stat().st_size} bytes)")
        text = path.read_bytes().decode()  # `read_text` takes another line ending for the same text
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
    """SHA-256 of every file of a checkpoint by relative name, but the record, the verdict and descriptions of a repository.

    Files that cannot be read have an empty hash.
    """
    found: dict[str, str] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name in (RECORD, VERIFICATION) or is_description(name) or (path.is_dir() and not path.is_symlink()):
            continue
        try:
            found[name] = file_digest(path) if path.is_file() else ""
        except OSError:
            found[name] = ""
    return found


def is_description(name: str) -> bool:
    """Whether a file only describes the repository: a model card, a license, what git and the hub's client keep."""
    first = name.split("/", 1)[0]
    return first in (".git", ".cache") or _DESCRIPTION.fullmatch(name) is not None
