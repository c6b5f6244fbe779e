"""Tokenizer, processor and template files of a checkpoint: those of the processor that the run trained with.

Where that is the student's own, its files are copied byte for byte. Another one (a changed chat template or image size, added
tokens) is saved as it was before the first step: a model must be served with the prompts that it was trained on.
"""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

_TEMPLATES = "additional_chat_templates"
# what transformers and vLLM read tokenizers, processors and chat templates from
_KNOWN = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|tekken\.json"
    r"|vocab\.(json|txt)|merges\.txt|[^/]*\.(model|tiktoken)"
    r"|chat_template\.(jinja|json)|" + _TEMPLATES + r"/[^/]*\.jinja"
    r"|(pre|image_pre|video_pre|audio_pre)?processor_config\.json"
)
# files that every save writes, or that describe a repository and not a model
_EXPECTED = re.compile(
    r".*\.(safetensors|bin|pt|pth|h5|msgpack|onnx|gguf|index\.json|md|png|jpg|jpeg|gif|svg|py)|(generation_)?config\.json"
    r"|\..*|LICENSE.*|NOTICE.*"
)
# fields that depend on where a tokenizer was loaded from, not on what it does
_ORIGIN = ("is_local", "local_files_only", "name_or_path", "model_specific_special_tokens")
_SETTINGS = ("truncation", "padding")  # in tokenizer.json, set by every use of a fast tokenizer


class ProcessorFiles(NamedTuple):
    """kind: "source" (the student's own files), "given" or "none". files: contents by name, relative to the checkpoint."""

    kind: str
    files: dict[str, bytes]


def source_folder(source: str | Path) -> Path:
    """Return the local folder of a source checkpoint; for a hub id that of its snapshot, without weights.

    Raises:
        ValueError: no source at all, or neither a folder nor a model of the hub cache.
    """
    if not str(source) or str(source) == ".":
        raise ValueError(
            "the student has no name_or_path, so its processor files cannot be found; load it from a checkpoint"
        )
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        patterns = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken"]
        return Path(snapshot_download(str(source), allow_patterns=patterns))
    except Exception as error:
        raise ValueError(f"cannot find the processor files of {str(source)!r}: {error}") from error


def is_processor_file(name: str) -> bool:
    """Whether a file of that name, relative to the checkpoint, is of the tokenizer or the processor."""
    return _KNOWN.fullmatch(name) is not None


def processor_files(folder: Path) -> list[Path]:
    """Return the tokenizer, processor and template files of a folder, by their names."""
    found = [*folder.iterdir(), *(folder / _TEMPLATES).glob("*")]
    return sorted(p for p in found if p.is_file() and is_processor_file(p.relative_to(folder).as_posix()))


def left_out(folder: Path) -> list[str]:
    """Return the names of a student's files that are not copied: logs, adapters, settings of other tools."""
    names = [path.name for path in folder.iterdir() if path.is_file()]
    return sorted(name for name in names if not (is_processor_file(name) or _EXPECTED.fullmatch(name)))


def plan_processor(source: Path, processor: Any, rows: int) -> ProcessorFiles:
    """Choose the files that the checkpoint gets.

    Args:
        source: the student's folder.
        processor: what the run trains with, a processor or a tokenizer; None for the student's own.
        rows: number of rows of the student's embedding.

    Raises:
        ValueError: files that cannot be read or saved, or tokens that the embedding has no row for.
    """
    try:
        own = {p.relative_to(source).as_posix(): p.read_bytes() for p in processor_files(source)}
    except OSError as error:
        raise ValueError(f"cannot read the processor files of {source}: {error}") from error
    if processor is None:
        return ProcessorFiles("source" if own else "none", own)
    # compared as the files that they save, because processors define no equality
    given, loaded = saved_files(processor, "processor"), _loaded(source, processor)
    expected = saved_files(loaded, "processor") if loaded is not None else {}
    if loaded is not None and _comparable(given) == _comparable(expected):
        return ProcessorFiles("source", own)
    _check_rows(processor, loaded, rows)
    files = {name: content for name, content in given.items() if is_processor_file(name)}
    if not hasattr(processor, "tokenizer"):  # a tokenizer alone: the image processor stays the student's
        kept = {name: content for name, content in own.items() if "processor_config" in name}
        files = kept | files
    return ProcessorFiles("given", _with_settings(files, expected))


def _loaded(source: Path, processor: Any) -> Any:
    """Load the student's own processor, or tokenizer where one was given; None where there is none."""
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return (AutoProcessor if hasattr(processor, "tokenizer") else AutoTokenizer).from_pretrained(source)
    except Exception:  # no processor there, or one that this transformers cannot read: the given one is saved
        return None


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def saved_files(holder: Any, name: str) -> dict[str, bytes]:
    """Return what `holder.save_pretrained` writes, by relative name.

    Raises:
        ValueError: transformers refuses to write it; the sentence calls it `name`.
    """
    with tempfile.TemporaryDirectory(prefix="grace-saved-") as folder:
        try:
            holder.save_pretrained(folder)
        except Exception as error:
            raise ValueError(f"the {name} cannot be saved: {first_line(error)}; repair it first") from error
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def _comparable(files: dict[str, bytes]) -> dict[str, Any]:
    """Return the contents without fields that use or loading changes."""
    found: dict[str, Any] = {}
    for name, content in files.items():
        if not name.endswith(".json"):
            found[name] = content
            continue
        value = json.loads(content)
        drop = _SETTINGS if name == "tokenizer.json" else _ORIGIN
        found[name] = {k: v for k, v in value.items() if k not in drop} if isinstance(value, dict) else value
    return found


def _with_settings(files: dict[str, bytes], expected: dict[str, bytes]) -> dict[str, bytes]:
    """Return the files with truncation and padding as they were before the run."""
    # A truncation length in tokenizer.json cuts image tokens off a prompt when the checkpoint is served.
    tokenizer = json.loads(files["tokenizer.json"]) if "tokenizer.json" in files else {}
    before = json.loads(expected["tokenizer.json"]) if "tokenizer.json" in expected else {}
    if tokenizer and any(tokenizer.get(key) != before.get(key) for key in _SETTINGS):
        tokenizer |= {key: before.get(key) for key in _SETTINGS}
        files = files | {"tokenizer.json": (json.dumps(tokenizer, indent=2, ensure_ascii=False) + "\n").encode()}
    if "tokenizer_config.json" in files:
        config = {k: v for k, v in json.loads(files["tokenizer_config.json"]).items() if k not in _ORIGIN[:3]}
        files = files | {"tokenizer_config.json": (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()}
    return files


def _check_rows(processor: Any, loaded: Any, rows: int) -> None:
    """Refuse tokens of the given tokenizer that the embedding has no row for; those of the student's own are let through."""
    known = _vocabulary(loaded) if loaded is not None else {}
    beyond = [(i, token) for token, i in _vocabulary(processor).items() if i >= rows and known.get(token) != i]
    if beyond:
        named = ", ".join(f"{token[:60]!r} ({i})" for i, token in sorted(beyond)[:5])
        raise ValueError(
            f"the processor has {len(beyond)} tokens beyond the {rows} rows of the student's embedding: {named}; resize the "
            "embedding and save the student before the run, or take these tokens out"
        )


def _vocabulary(processor: Any) -> dict[str, int]:
    return dict(getattr(processor, "tokenizer", processor).get_vocab())
