"""`run.yaml`: all inputs of a training run, so that it can be repeated.

The file is written into the run folder when the run begins, and without local paths into the checkpoint. It contains the
arguments of `train` that differ from their defaults, the recipe, the training arguments, the sources of model, teacher and
dataset with a fingerprint of each, and the versions. Python objects (a loaded model, a list of samples) cannot be written:
their entry is `given: true`, and they have to be given again.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from torch import nn

from grace_plugin.data import is_scannable, processor_settings
from grace_plugin.data.bounded_yaml import YamlTextError, read_yaml
from grace_plugin.data.mix import Samples
from grace_plugin.data.shown import shortened, shown
from grace_plugin.digest import value_digest
from grace_plugin.export.record import RUN_FILE, checkpoint_digest, environment
from grace_plugin.run.settings import arguments_to_record
from grace_plugin.upstream import Recipe

__all__ = [
    "RUN_FILE",
    "RunInputs",
    "changed",
    "dataset_digest",
    "read_run_file",
    "read_yaml_mapping",
    "run_text",
    "started_with",
    "without_paths",
    "write_run_file",
]

VERSION = 1
_FIRST = 256  # samples of a sequence that makes them when asked for
_LARGEST, _MOST_VALUES = 2**20, 100_000  # bytes of a run file, and values in it
logger = logging.getLogger(__name__)


# ---- fingerprints -------------------------------------------------------------------------------------------------------


def _media(value: Any) -> Any:
    """Replace each path of media by the name and size of its file, so that a folder can be moved."""
    if isinstance(value, (str, os.PathLike)):
        name = os.fspath(value)
        return [os.path.basename(name), os.path.getsize(name) if os.path.isfile(name) else None]
    if isinstance(value, Mapping):
        return {key: _media(entry) if key == "path" and entry is not None else entry for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_media(entry) for entry in value]
    return value


def _samples(dataset: Any) -> Iterator[Any]:
    """Yield the samples of a dataset, their media undecoded where possible."""
    if hasattr(dataset, "with_format") and not isinstance(
        dataset, Samples
    ):  # a datasets.Dataset would decode its images
        for batch in dataset.with_format("arrow").iter(batch_size=256):
            yield from batch.to_pylist()
    else:
        count = len(dataset) if is_scannable(dataset) else min(len(dataset), _FIRST)
        yield from (dataset[number] for number in range(count))


def dataset_digest(dataset: Any) -> str | None:
    """Return a digest of a dataset's samples in their order and of the weights of its sets; None for a stream.

    Fields count with their content, media in files with name and size of the file, so a dataset that was copied or touched has
    the same digest. Of a sequence that makes its samples when asked for, the first 256 count.
    """
    if not hasattr(dataset, "__len__"):
        return None
    found = hashlib.sha256(str(len(dataset)).encode())
    if isinstance(dataset, Samples):
        found.update(json.dumps([[one.weight, len(one)] for one in dataset.sets]).encode())
    for sample in _samples(dataset):
        if isinstance(sample, Mapping):
            keys = ("image", "images", "video", "videos")
            sample = {key: _media(entry) if key in keys else entry for key, entry in sample.items()}
        found.update(value_digest(sample).encode())
    return found.hexdigest()


# ---- what a run was given -----------------------------------------------------------------------------------------------


def _place(source: str | os.PathLike[str]) -> str:
    """Return a local path as an absolute one, so that the run can be repeated from another folder; a hub id as it is."""
    text = os.fspath(source)
    return os.path.abspath(text) if os.path.exists(text) else text


def _object(value: Any) -> dict[str, Any]:
    """Return the entry of a Python object."""
    found = {"given": True, "class": type(value).__name__}
    if getattr(value, "name_or_path", None):
        found["name"] = os.path.basename(str(value.name_or_path).rstrip("/"))
    return found


@dataclass
class RunInputs:
    """The inputs of `train`.

    recipe: read, with the teacher that was passed, before anything is inferred. asked: of `read_arguments`. objects: objects of
    Python by the name of their argument. limits: further arguments of `train` that differ from their defaults.
    """

    model: Any
    recipe: Recipe
    dataset: Any
    asked: Mapping[str, Any]
    teacher: Any = None
    objects: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, Any] = field(default_factory=dict)
    world_size: int = 1

    @cached_property
    def content(self) -> dict[str, Any]:
        """The content of `run.yaml`, plain values."""
        given = {name: _object(value) for name, value in self.objects.items() if value is not None and value != ()}
        if "processor" in given:
            given["processor"]["fingerprint"] = value_digest(processor_settings(self.objects["processor"]))
        recipe = self._recipe()
        return {
            "version": VERSION,
            "model": self._model(),
            **self._teacher(recipe),
            "recipe": recipe,
            "dataset": self._dataset(),
            **given,
            **self.limits,
            "arguments": arguments_to_record(self.asked),
            "environment": {**environment(), "processes": self.world_size},
        }

    def _teacher(self, recipe: dict[str, Any]) -> dict[str, Any]:
        if self.teacher is not None and not isinstance(self.teacher, (str, os.PathLike)):
            return {"teacher": _object(self.teacher)}
        asked = teacher_block(recipe)
        if not asked.get("model"):
            return {}
        found = checkpoint_digest(asked["model"], asked.get("revision") or "main")
        return {"teacher": {"path": asked["model"], "fingerprint": found}}

    def _model(self) -> dict[str, Any]:
        if isinstance(self.model, nn.Module):
            return _object(self.model)
        return {"path": _place(self.model), "fingerprint": checkpoint_digest(os.fspath(self.model))}

    def _dataset(self) -> dict[str, Any]:
        source = getattr(self.dataset, "source", None)
        found: dict[str, Any] = _object(self.dataset) if source is None else dict(source)
        for key in ("path", "images"):
            if found.get(key):
                found[key] = _place(found[key])
        if hasattr(self.dataset, "__len__"):
            found["samples"] = len(self.dataset)
        return found | {"fingerprint": dataset_digest(self.dataset)}

    def _recipe(self) -> dict[str, Any]:
        """Return the whole recipe, teacher and cache by absolute paths."""
        recipe = yaml.safe_load(self.recipe.yaml())
        asked = teacher_block(recipe)
        asked |= {key: _place(asked[key]) for key in ("model", "cache") if asked.get(key)}
        return recipe


def teacher_block(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the teacher block of a recipe as llm-compressor writes it: stages of groups of modifiers."""
    for stage in recipe.values():
        for modifiers in stage.values() if isinstance(stage, Mapping) else ():
            if isinstance(modifiers, Mapping) and "GraceModifier" in modifiers:
                return (modifiers["GraceModifier"] or {}).get("teacher") or {}
    return {}


def changed(function: Callable[..., Any], **values: Any) -> dict[str, Any]:
    """Return the values that differ from the defaults of a function's parameters."""
    defaults = inspect.signature(function).parameters
    return {name: value for name, value in values.items() if value != defaults[name].default}


# ---- the file -----------------------------------------------------------------------------------------------------------


def without_paths(content: Any) -> Any:
    """Return the content with each absolute path replaced by its last component."""
    if isinstance(content, Mapping):
        return {key: without_paths(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [without_paths(value) for value in content]
    if isinstance(content, str) and os.path.isabs(content):
        return os.path.basename(content.rstrip("/"))
    return content


def run_text(content: Mapping[str, Any]) -> str:
    """Return the text of a run file."""
    head = "# what this run was given; again: grace train --from run.yaml --output_dir NEW\n"
    return head + yaml.safe_dump(dict(content), sort_keys=False, allow_unicode=True, width=120)


def write_run_file(folder: Path, content: Mapping[str, Any]) -> None:
    """Write `run.yaml` completely or not at all; a disk error is a warning and does not end the run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial = (
            folder / f".{RUN_FILE}"
        )  # and a rename: a kill must not leave half a file, which no run can be repeated from
        partial.write_text(run_text(content), encoding="utf-8")
        partial.replace(folder / RUN_FILE)
    except OSError as error:
        logger.warning("%s was not written: %s", folder / RUN_FILE, error)


def started_with(folder: Path, content: dict[str, Any], *, resumed: bool) -> dict[str, Any]:
    """Return the content for a run's file: that of its start where it is resumed without changes, else `content`."""
    if resumed:
        try:
            return read_run_file(folder)
        except ValueError as error:  # the run goes on; its file is a record, which no step reads
            logger.warning("what the run was started with is lost (%s); this call's arguments are recorded", error)
    return content


def read_yaml_mapping(path: str | os.PathLike[str], what: str) -> dict[str, Any]:
    """Read a small YAML file that contains a mapping.

    Args:
        path: the file.
        what: what it is, for messages.

    Raises:
        ValueError: missing, too large, no YAML, or no mapping.
    """
    file = Path(path)
    if not file.is_file():
        raise ValueError(f"no {what} at {file}")
    if file.stat().st_size > _LARGEST:
        raise ValueError(f"{file} is no {what}: it has more than {_LARGEST} bytes")
    try:
        read = read_yaml(file.read_text(encoding="utf-8"), values=_MOST_VALUES, what=f"a {what}")
    except (OSError, UnicodeDecodeError, YamlTextError) as error:
        raise ValueError(f"{file} is not a readable YAML file: {shortened(error)}") from error
    if not isinstance(read, dict):
        raise ValueError(f"{file} is no {what}: it holds a {type(read).__name__}, not names with values")
    return read


def read_run_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a run file, given by its path, its run folder or its checkpoint.

    Raises:
        ValueError: unreadable, or not what a run writes.
    """
    file = Path(path)
    file = file / RUN_FILE if file.is_dir() else file
    read = read_yaml_mapping(file, "run file")
    missing = {"version", "model", "recipe", "dataset", "arguments"} - set(read)
    if missing or not isinstance(read.get("arguments"), dict):
        raise ValueError(f"{file} is no run file: it has no {', '.join(sorted(missing)) or 'mapping of arguments'}")
    for name in ("model", "teacher", "recipe", "dataset", "environment"):
        entry = read.get(name, {})
        if not isinstance(entry, dict):
            raise ValueError(f"{file}: {name} takes a mapping, as a run writes it, got {shown(entry)}")
        if name not in ("recipe", "environment") and not isinstance(entry.get("path"), str | None):
            raise ValueError(f"{file}: path of {name} takes a path, got {shown(entry['path'])}")
    if read["version"] != VERSION:
        raise ValueError(f"{file} has version {read['version']!r}; this version of grace_plugin reads {VERSION}")
    return read
