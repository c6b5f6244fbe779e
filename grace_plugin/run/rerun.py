"""Repeat a training from the `run.yaml` that it wrote: with the same bits, on the same machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import yaml

from grace_plugin.data import load_samples, stream_samples
from grace_plugin.data.shown import shown
from grace_plugin.deprecation import renamed_arguments
from grace_plugin.export.record import checkpoint_digest, environment
from grace_plugin.run.grace_run import TrainResult
from grace_plugin.run.manifest import dataset_digest, read_run_file
from grace_plugin.run.train import train

__all__ = ["train_from"]

logger = logging.getLogger(__name__)
_COUNT, _SWITCH = ((int, type(None)), "a whole number"), ((bool,), "true or false")
#: what a run file may say of train() in addition to models, recipe, data and training arguments: types, and how to name them
_LIMITS: dict[str, tuple[tuple[type, ...], str]] = {
    "max_length": _COUNT,
    "max_pixels": _COUNT,
    "max_bad_samples": ((float, int), "a number"),
    "packing": _SWITCH,
    "activation_offloading": _SWITCH,
    "record_paths": _SWITCH,
    "special_tokens": ((list,), "a list of tokens"),
}


def _given_again(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to repeat a run that needs Python objects which are not given.

    Raises:
        ValueError: names them.
    """
    missing = [
        f"{name}= ({entry.get('class')}{' of ' + entry['name'] if entry.get('name') else ''})"
        for name, entry in recorded.items()
        if isinstance(entry, Mapping) and entry.get("given") is True and name not in given
    ]
    if missing:
        raise ValueError(
            f"the run was given objects that a file cannot hold; call grace_plugin.train_from with {', '.join(missing)}"
        )


def _check_same(what: str, place: Any, recorded: Any, now: Any, *, given: bool) -> None:
    """Compare fingerprints; a difference of what the user gives is a warning.

    Raises:
        ValueError: what is read from the recorded place is another one, or none.
    """
    if recorded is None or recorded == now:
        return
    if given:
        logger.warning("%s is not the one of the run: this is another training", what)
        return
    found = "another one is there" if now is not None else "nothing readable is there"
    raise ValueError(
        f"the {what} of the run was read from {shown(place, 200)}, and {found} now; give {what}= (--{what})"
    )


def _say_environment(recorded: Mapping[str, Any], processes: int) -> None:
    """Warn where versions, device, threads or processes differ, because the last bits may differ too."""
    now = {**environment(), "processes": processes}
    differing = [f"{key} {value} -> {now.get(key)}" for key, value in recorded.items() if now.get(key) != value]
    if differing:
        logger.warning("not the environment of the run, so the bits may differ: %s", ", ".join(differing))


def _check_entries(run_file: str | os.PathLike[str], options: Mapping[str, Any]) -> None:
    """Refuse entries that no run writes, and values of a wrong type: a run file may be edited by hand.

    Raises:
        ValueError: names them.
    """
    unknown = [name for name in options if name not in _LIMITS]
    if unknown:
        raise ValueError(f"{os.fspath(run_file)} has entries that no run writes: {', '.join(unknown)[:200]}")
    for name, value in options.items():
        takes, said = _LIMITS[name]
        tokens = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        if type(value) not in takes or (takes == (list,) and not tokens):
            raise ValueError(f"{os.fspath(run_file)}: {name} takes {said}, got {shown(value)}")


@renamed_arguments(max_bad_rows="max_bad_samples")
def train_from(run_file: str | os.PathLike[str], *, output_dir: str | os.PathLike[str], **given: Any) -> TrainResult:
    """Repeat a training.

    Args:
        run_file: `run.yaml`, or the run folder or checkpoint that holds one. That of a checkpoint has no local paths: give
            `model=`, `dataset=` and, where the recipe names a local teacher, `teacher=`.
        output_dir: where the checkpoint appears; must not hold anything.
        given: arguments of `train` that replace what is recorded. Without any, the run is the same, bit for bit on the same
            machine with as many processes and threads.

    Returns:
        The result of `train`.

    Raises:
        ValueError: no run file; a model, teacher or dataset that is not the recorded one any more; objects that have to be
            given again.
    """
    recorded = read_run_file(run_file)
    _given_again(recorded, given)
    options = {
        name: value
        for name, value in recorded.items()
        if name not in ("version", "model", "teacher", "recipe", "dataset", "arguments", "environment")
        and not (isinstance(value, Mapping) and value.get("given") is True)
    }
    if "max_bad_rows" in options:  # its name in run files of 0.1
        options["max_bad_samples"] = options.pop("max_bad_rows")
    _check_entries(run_file, options)
    options |= recorded["arguments"]
    if "max_steps" in given or "num_train_epochs" in given:  # one of the two stands for the length
        options = {name: value for name, value in options.items() if name not in ("max_steps", "num_train_epochs")}
    if "recipe" not in given:
        options["recipe"] = yaml.safe_dump(recorded["recipe"], sort_keys=False)
        _checkpoint("teacher", recorded.get("teacher") or {}, given)
    options["model"] = _checkpoint("model", recorded["model"], given)
    if options["model"] is None:
        raise ValueError(f"{os.fspath(run_file)}: model has no path; give model= (--model)")
    options["dataset"] = _dataset(recorded["dataset"], given)
    _say_environment(recorded.get("environment") or {}, int(os.environ.get("WORLD_SIZE", "1")))
    return train(**{**options, **given, "output_dir": output_dir})


def _checkpoint(what: str, recorded: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Return the model or teacher of the run, or the given one, after comparing its fingerprint."""
    place = given.get(what, recorded.get("path"))
    if isinstance(place, (str, os.PathLike)):
        found = checkpoint_digest(os.fspath(place))
        _check_same(what, place, recorded.get("fingerprint"), found, given=what in given)
    return place


def _dataset(recorded: Mapping[str, Any], given: Mapping[str, Any]) -> Any:
    """Return the dataset of the run, read again, or the given one, after comparing its fingerprint."""
    dataset, place = given.get("dataset"), recorded.get("path")
    if "dataset" not in given:
        try:
            dataset = (stream_samples if recorded.get("streaming") else load_samples)(
                str(place), recorded.get("images")
            )
        except ValueError as error:
            raise ValueError(f"the dataset of the run cannot be read: {error}; give dataset= (--dataset)") from error
    if recorded.get("fingerprint") is not None:
        found = dataset_digest(dataset)
        _check_same("dataset", place, recorded["fingerprint"], found, given="dataset" in given)
    return dataset
