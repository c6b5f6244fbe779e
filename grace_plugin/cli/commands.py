"""What the commands do. Their arguments are declared in `register_grace.py`, which imports nothing heavy."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

BAD_INPUT, FAILED, INTERRUPTED = 2, 1, 130
_LONGEST = 4000  # characters of a message


def run(name: str, args: Namespace) -> int:
    """Run a command; an expected error is one sentence, an unexpected one keeps its traceback.

    Returns:
        The exit status: 0, 2 for input that cannot be used, 1 for a run that failed, 130 for one that was interrupted.
    """
    from grace_plugin.run.outputs import kept_streams

    # a closed pipe (`grace train ... | head`) must not end a run of hours
    with kept_streams():
        try:
            command_of(name)(args)
        except KeyboardInterrupt as error:
            if not str(error):  # with a message the run has already printed what is kept and how to go on
                print(f"grace {name}: interrupted", file=sys.stderr)
            return INTERRUPTED
        except Exception as error:
            return _report_error(name, error)
        return 0


def command_of(name: str) -> Callable[[Namespace], None]:
    """Return the function of a command: `_train` of this module for "train", `data_check` of its own for "data check"."""
    function = name.replace(" ", "_")
    return globals().get(f"_{function}") or getattr(import_module(f"grace_plugin.cli.{function}"), function)


def _report_error(name: str, error: Exception) -> int:
    """Print what ended a command; returns its exit status."""
    from safetensors import SafetensorError

    from grace_plugin import VerificationError

    # what the user can correct is status 2, so that scripts can tell it from a run that failed
    unusable = (ValueError, FileExistsError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
    failed = (VerificationError, FloatingPointError, RuntimeError, OSError, MemoryError)
    bugs = (NotImplementedError, RecursionError)  # kinds of RuntimeError that nothing here raises on purpose
    bad_input = isinstance(error, (*unusable, SafetensorError))
    if not bad_input and (isinstance(error, bugs) or not isinstance(error, failed)):
        traceback.print_exception(error)
        print(
            f"grace {name}: {type(error).__name__} is not expected here and a bug of grace_plugin; please report it with the "
            "lines above and the command",
            file=sys.stderr,
        )
        return FAILED
    print(f"grace {name}{'' if bad_input else ' failed'}: {_sentence(error)}", file=sys.stderr)
    return BAD_INPUT if bad_input else FAILED


def _sentence(error: Exception) -> str:
    """Return an error's message; for an error of the system its words and the file. Cut at 4,000 characters."""
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


# arguments of train() that the command has no option for
_SWITCHES = ("activation_offloading", "record_paths")


def _pairs(pairs: list[str]) -> dict[str, str]:
    """Return NAME=VALUE pairs as a mapping.

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
    """Check the names of training arguments of --set or of a file; their values are left to `read_arguments`.

    Raises:
        ValueError: a name that has an option of its own, or a switch that is neither true nor false.
    """
    import inspect

    from grace_plugin.run.train import train

    # so that --set model=... is not taken for a training argument that does not exist
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
    """Print the proofs and the folder of a checkpoint, in the first of several processes."""
    # RANK and not torch.distributed, whose process group has ended by now
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
        missing = [
            name
            for name, value in (("a recipe", args.recipe), ("--model", args.model), ("--dataset", args.dataset))
            if value is None
        ]
        if missing:
            raise ValueError(f"give {' and '.join(missing)}, or --from run.yaml")
    elif args.dataset is None and (args.images or args.streaming):
        raise ValueError(
            "--images and --streaming belong to --dataset; with --from alone, the dataset is read as recorded"
        )
    from_file = read_yaml_mapping(args.config, "file of training arguments") if args.config else {}
    given = _settings(from_file) | _settings(_pairs(args.settings))
    # before a dataset is read, which may take minutes
    read_arguments({name: value for name, value in given.items() if name not in _SWITCHES})
    names = "model teacher max_length max_pixels max_bad_samples packing resume_from_checkpoint allow_resume_changes"
    names += " save_minutes save_on_signal"
    given |= {name: value for name in names.split() if (value := getattr(args, name)) is not None}
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
        args.model,
        recipe=Path(args.recipe),
        dataset=load_samples(args.dataset, args.images),
        output_dir=args.output_dir,
        teacher=args.teacher,
        num_calibration_samples=args.num_calibration_samples,
        batch_size=args.batch_size,
        max_length=args.max_length,
        max_pixels=args.max_pixels,
        max_bad_samples=args.max_bad_samples,
        special_tokens=args.special_tokens,
    )
    _show_result(result)


def _export(args: Namespace) -> None:
    import grace_plugin

    result = grace_plugin.export(args.run_folder, args.output_dir, model=args.model)
    _show(result.verification)
    print(f"verified checkpoint: {result.checkpoint}")


def _verify(args: Namespace) -> None:
    import grace_plugin

    found = grace_plugin.verify(args.checkpoint, source=args.source)
    _show(found)
    uncovered = [*found["files_not_proven"], *found["files_not_covered"]]
    if uncovered:
        print(f"not covered by the verification: {', '.join(uncovered)}", file=sys.stderr)


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
