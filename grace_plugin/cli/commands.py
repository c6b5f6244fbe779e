"""What the commands do once they run; arguments are declared in `register_grace.py`, which stays import-light."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["run"]

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
_LONGEST = 4000  # characters of a message


def run(name: str, args: Namespace) -> int:
    """Exit status of a command: 0, 2 for input that cannot be used, 1 for a run that failed, 130 for one that was interrupted.

    What is expected to go wrong is said in a sentence. Anything else is a fault of this package and keeps its traceback.
    """
    from grace_plugin.run.outputs import kept_streams

    with kept_streams():
        try:
            COMMANDS[name](args)
        except KeyboardInterrupt as error:
            if not str(error):  # a run has said in a line what is kept and how to go on
                print(f"grace {name}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            return _told(name, error)
        return 0


def _told(name: str, error: Exception) -> int:
    """Say what ended a command; returns its exit status."""
    from safetensors import SafetensorError

    from grace_plugin import VerificationError

    unusable = (ValueError, FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    status, said = FAILED, _sentence(error)
    if isinstance(error, (*unusable, SafetensorError)):
        status = BAD_INPUT
    elif isinstance(
        error, NotImplementedError | RecursionError
    ):  # kinds of RuntimeError that nobody raises on purpose here
        status = 0
    elif not isinstance(error, (VerificationError, FloatingPointError, RuntimeError, OSError, MemoryError)):
        status = 0
    if not status:
        traceback.print_exception(error)
        print(
            f"grace {name}: {type(error).__name__} is not expected here and a fault of grace_plugin; please report it with the "
            "lines above and the command",
            file=sys.stderr,
        )
        return FAILED
    failed = "" if status == BAD_INPUT else " failed"
    print(f"grace {name}{failed}: {said}", file=sys.stderr)
    return status


def _sentence(error: Exception) -> str:
    """An error's message: the system's words and the file for its own; cut where it is endless."""
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        files = [os.fsdecode(name) for name in (error.filename, error.filename2) if isinstance(name, str | bytes)]
        text = ": ".join([error.strerror or type(error).__name__, *files])
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            text += "; free some space on that disk, or give a folder on another, and run the command again"
    elif isinstance(error, MemoryError):
        text = "the machine's memory does not hold this; use fewer workers, smaller batches or a smaller dataset"
    elif type(error).__name__ == "SafetensorError":
        text = f"a weights file cannot be read ({text}); it is cut or damaged: fetch or write it again"
    text = text or type(error).__name__
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text):,} characters)"


#: arguments of train() that a command has no option for
_SWITCHES = ("activation_offloading", "record_paths")


def _pairs(pairs: list[str]) -> dict[str, str]:
    """NAME=VALUE pairs as a mapping.

    Raises:
        ValueError: an entry without "=", or a name given twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator:
            raise ValueError(f"--set takes NAME=VALUE, got {pair[:200]!r}")
        if name in found:
            raise ValueError(f"--set gives {name} twice")
        found[name] = value
    return found


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Training arguments of --set or of a file, their values left to their fields of TrainingArguments.

    Raises:
        ValueError: a name that has an option of its own, or a switch that is neither true nor false.
    """
    import inspect

    from grace_plugin.run.train import train

    own = [name for name, one in inspect.signature(train).parameters.items() if one.kind is not one.VAR_KEYWORD]
    found = dict(given)
    for name, value in given.items():
        if name in _SWITCHES:
            if str(value).lower() not in ("true", "false"):
                raise ValueError(f"{name} takes true or false, got {str(value)[:200]!r}")
            found[name] = str(value).lower() == "true"
        elif name in own:
            instead = "the recipe argument" if name == "recipe" else f"--{name}"
            raise ValueError(f"{name} is no field of TrainingArguments; use {instead}, or train() in Python")
    return found


def _show(verification: Mapping[str, Any]) -> None:
    print(json.dumps(dict(verification), indent=1))


def _show_result(result: Any) -> None:
    """The proofs and the place of a checkpoint, on the first of several processes."""
    if os.environ.get("RANK", "0") == "0":
        _show(result.verification)
        print(f"verified checkpoint: {result.checkpoint}")


def _train(args: Namespace) -> None:
    import grace_plugin
    from grace_plugin.data import load_samples, stream_samples
    from grace_plugin.run.grace_run import run_folder
    from grace_plugin.run.manifest import read_yaml_mapping
    from grace_plugin.run.settings import read_arguments

    run_folder(args.output_dir)
    if args.run_file is None:
        missing = [name for name, value in (("a recipe", args.recipe), ("--model", args.model), ("--dataset", args.dataset))
                   if value is None]  # fmt: skip
        if missing:
            raise ValueError(f"give {' and '.join(missing)}, or --from run.yaml")
    elif args.dataset is None and (args.images or args.streaming):
        raise ValueError(
            "--images and --streaming belong to --dataset; with --from alone, the dataset is read as recorded"
        )
    from_file = read_yaml_mapping(args.config, "file of training arguments") if args.config else {}
    given = _settings(from_file) | _settings(_pairs(args.settings))
    read_arguments({name: value for name, value in given.items() if name not in _SWITCHES})  # before a dataset is read
    names = (
        "model", "teacher", "max_length", "max_pixels", "max_bad_samples", "packing", "resume_from_checkpoint",
        "allow_resume_changes", "save_minutes", "save_on_signal",
    )  # fmt: skip
    given |= {name: value for name in names if (value := getattr(args, name)) is not None}
    if args.special_tokens:
        given["special_tokens"] = args.special_tokens
    if args.recipe is not None:
        given["recipe"] = Path(args.recipe)
    if args.dataset is not None:
        given["dataset"] = (stream_samples if args.streaming else load_samples)(args.dataset, args.images)
    if args.run_file is not None:
        result = grace_plugin.train_from(args.run_file, output_dir=args.output_dir, **given)
    else:
        result = grace_plugin.train(output_dir=args.output_dir, **given)
    _show_result(result)


def _oneshot(args: Namespace) -> None:
    import grace_plugin
    from grace_plugin.data import load_samples

    result = grace_plugin.oneshot(
        args.model, recipe=Path(args.recipe), dataset=load_samples(args.dataset, args.images), output_dir=args.output_dir,
        teacher=args.teacher, num_calibration_samples=args.num_calibration_samples, batch_size=args.batch_size,
        max_length=args.max_length, max_pixels=args.max_pixels, max_bad_samples=args.max_bad_samples,
        special_tokens=args.special_tokens,
    )  # fmt: skip
    _show_result(result)


def _export(args: Namespace) -> None:
    import grace_plugin

    result = grace_plugin.export(args.run_folder, args.output_dir, model=args.model)
    _show(result.verification)
    print(f"verified checkpoint: {result.checkpoint}")


def _verify(args: Namespace) -> None:
    import grace_plugin

    _show(grace_plugin.verify(args.checkpoint, source=args.source))


def _report(args: Namespace) -> None:
    from grace_plugin.cli.report import report

    report(args)


def _demo(args: Namespace) -> None:
    import grace_plugin

    # The demo's weights and images stay out of the wheel. An editable install finds them next to the package.
    roots = (Path(grace_plugin.__file__).resolve().parents[1], Path.cwd())
    root = next((root for root in roots if (root / "examples" / "bundled_demo" / "run.py").is_file()), None)
    if root is None:
        raise FileNotFoundError(
            "the demo is not in the installed package: it is the folder examples/bundled_demo of the repository; "
            "run `make demo`, or `grace demo`, in a clone"
        )
    sys.path.insert(0, str(root))
    from examples.bundled_demo.run import demo

    demo(Path(args.output_dir), serve_python=args.serve_python, questions=args.questions, low_bits=args.low_bits)


def _data_check(args: Namespace) -> None:
    from grace_plugin.cli.data_check import data_check

    data_check(args)


def _teacher_cache(args: Namespace) -> None:
    from grace_plugin.cli.teacher_cache import teacher_cache

    teacher_cache(args)


COMMANDS = {
    "train": _train, "oneshot": _oneshot, "export": _export, "verify": _verify, "report": _report, "demo": _demo,
    "data check": _data_check, "teacher cache": _teacher_cache,
}  # fmt: skip
