"""The `grace` commands, for `optimum-cli grace ...` and for the alias `grace ...`.

This file is installed a second time as `optimum/commands/register/register_grace.py`, where optimum finds it. Options have the
names of the Python API and of the recipe.
"""

from __future__ import annotations

import os
import sys
from argparse import SUPPRESS, Action, ArgumentParser, Namespace
from collections.abc import Callable
from typing import Any

# nothing heavy: optimum imports every file of that namespace at every start
from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

DATASET = (
    ".json, .jsonl or .parquet in messages or LLaVA format, a folder, a saved dataset, a mix.yaml, or "
    "hub-id[:[config:]split]"
)
IMAGES = "folder that image and video paths are relative to (default: the dataset file's)"


def _max_pixels(
    parser: ArgumentParser, then: str = "samples with a larger one are not used", default: int | None = 64_000_000
) -> None:
    parser.add_argument(
        "--max_pixels", type=int, default=default, help=f"largest image in pixels; {then} (default 64 million)"
    )


def _option(parser: ArgumentParser, name: str, **settings: Any) -> None:
    """Add an option that may be spelt with underscores, as in Python, or with hyphens."""
    parser.add_argument(f"--{name}", f"--{name.replace('_', '-')}", **settings)


def _train(parser: ArgumentParser) -> None:
    # no defaults here: with --from, an option that is given replaces what is recorded, also by the default of train()
    parser.add_argument("recipe", nargs="?", help="YAML recipe with a GraceModifier")
    parser.add_argument("--model", help="BF16 student: folder or hub id")
    parser.add_argument("--dataset", help=DATASET)
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument("--output_dir", required=True, help="where the checkpoint appears once verified; must be empty")
    run_file = "run.yaml of an earlier run, or its folder: the same run, but for what is given here"
    parser.add_argument("--from", dest="run_file", metavar="RUN_YAML", help=run_file)
    parser.add_argument("--config", help="YAML file of training arguments, named as for --set, which wins")
    parser.add_argument("--teacher", help="replaces teacher.model of the recipe")
    parser.add_argument("--max_length", type=int, help="longest sample in tokens; longer ones are not used, never cut")
    _max_pixels(parser, default=None)
    _max_bad_samples(parser, "share of unusable samples above which the run refuses to start (default 0.05)")
    _special_tokens(parser)
    packing = "samples of a micro-batch in one sequence without padding, where the family allows it"
    parser.add_argument("--packing", action="store_true", default=None, help=packing)
    streaming = "read the samples as they come; needs --set max_steps=N"
    parser.add_argument("--streaming", action="store_true", help=streaming)
    _resume_options(parser)
    field = "a field of transformers.TrainingArguments, for instance --set learning_rate=2e-5"
    parser.add_argument("--set", dest="settings", metavar="NAME=VALUE", action="append", default=[], help=field)


def _resume_options(parser: ArgumentParser) -> None:
    resume = "go on from the newest complete resume state in <output_dir>.run"
    parser.add_argument("--resume_from_checkpoint", action="store_true", default=None, help=resume)
    changes = "keys in which a resumed run may differ, as its refusal names them"
    _option(parser, "allow_resume_changes", nargs="+", metavar="KEY", help=changes)
    minutes = "minutes between two resume states without save_strategy; 0: every step (default 10)"
    _option(parser, "save_minutes", type=float, help=minutes)
    on_signal = "let Ctrl-C and SIGTERM end the run without a resume state"
    _option(parser, "no_save_on_signal", dest="save_on_signal", action="store_false", default=None, help=on_signal)


class _OldName(Action):
    """Store the value of an option that is given under its old name, and print the new one."""

    def __call__(
        self, parser: ArgumentParser, namespace: Namespace, values: Any, option_string: str | None = None
    ) -> None:
        print(
            f"{option_string} is now --{self.dest}; the old name will be removed in the next release", file=sys.stderr
        )
        setattr(namespace, self.dest, values)


def _max_bad_samples(parser: ArgumentParser, help_line: str, default: float | None = None) -> None:
    parser.add_argument("--max_bad_samples", type=float, default=default, help=help_line)
    parser.add_argument(
        "--max_bad_rows", dest="max_bad_samples", type=float, action=_OldName, default=SUPPRESS, help=SUPPRESS
    )


def _special_tokens(parser: ArgumentParser) -> None:
    help_line = (
        "special tokens that samples may write, such as the marks of boxes; others that a sample spells stay text"
    )
    parser.add_argument("--special_tokens", nargs="+", default=[], metavar="TOKEN", help=help_line)


def _oneshot(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe with a GraceModifier; its oneshot block gives epochs and rate")
    parser.add_argument("--model", required=True, help="BF16 student: folder or hub id")
    parser.add_argument("--dataset", required=True, help=DATASET)
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument("--output_dir", required=True, help="where the checkpoint is written; must be empty")
    parser.add_argument("--teacher", help="replaces teacher.model of the recipe")
    parser.add_argument(
        "--num_calibration_samples", type=int, default=512, help="samples drawn from the dataset (default 512)"
    )
    parser.add_argument("--batch_size", type=int, default=8, help="samples of a micro-batch (default 8)")
    parser.add_argument("--max_length", type=int, help="longest sample in tokens; longer ones are not used, never cut")
    _max_pixels(parser)
    _max_bad_samples(parser, "share of unusable samples above which the run refuses to start (default 0.05)", 0.05)
    _special_tokens(parser)


def _data_check(parser: ArgumentParser) -> None:
    parser.add_argument("dataset", help=DATASET)
    parser.add_argument(
        "--model", required=True, help="folder or hub id whose processor reads the samples; no weights are loaded"
    )
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument(
        "--output_dir", default="data-check", help="where page.html and the report go (default data-check)"
    )
    parser.add_argument("--max_length", type=int, help="longest sample in tokens; longer ones count as not usable")
    _max_pixels(parser, "samples with a larger one count as not usable")
    _special_tokens(parser)
    parser.add_argument(
        "--teacher", help="folder or hub id of a teacher: tokens that it does not share are counted too"
    )
    _max_bad_samples(parser, "exit with 2 above this share (default: never)", 1.0)
    parser.add_argument("--workers", type=int, default=2, help="processes that decode and tokenise (default 2)")
    parser.add_argument("--headers_only", action="store_true", help="read image headers only; truncated files pass")
    parser.add_argument("--samples", type=int, default=24, help="samples shown on the page (default 24)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples shown (default 0)")


def _teacher_cache(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", help="YAML recipe with a GraceModifier; its teacher block names the teacher")
    parser.add_argument(
        "--model", required=True, help="BF16 student: folder or hub id; its processor makes the samples"
    )
    parser.add_argument("--dataset", required=True, help=DATASET)
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument(
        "--output_dir", required=True, help="folder of the cache, for teacher.cache; goes on with what is in it"
    )
    parser.add_argument("--teacher", help="replaces teacher.model of the recipe")
    parser.add_argument("--max_length", type=int, help="longest sample in tokens; longer ones are not used, never cut")
    _max_pixels(parser)
    _max_bad_samples(parser, "share of unusable samples above which nothing is written (default 0.05)", 0.05)
    _special_tokens(parser)
    parser.add_argument("--batch_size", type=int, default=8, help="samples the teacher runs at a time (default 8)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode and tokenise (default 2)")
    parser.add_argument("--shard_bytes", type=int, default=2**29, help="bytes of a file, about (default 512 MiB)")
    parser.add_argument("--device", help="where the teacher runs (default: cuda if there is one, else cpu)")


def _export(parser: ArgumentParser) -> None:
    parser.add_argument("run_folder", help="<output_dir>.run of a run that has trained to its end")
    parser.add_argument(
        "--output_dir", help="where the checkpoint appears; must be empty (default: where the run said)"
    )
    parser.add_argument("--model", help="the student's folder or hub id where it has moved; its weights are not used")


def _verify(parser: ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="folder written by train or oneshot")
    parser.add_argument("--source", help="folder of the BF16 student that the run trained from, to compare with")


def _report(parser: ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", help="output_dir of a training, finished or running, for its curves")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="instead: where checkpoint B (INT4) differs from A (BF16); folders or hub ids",
    )
    parser.add_argument("--dataset", help=f"samples to compare on: {DATASET}")
    parser.add_argument("--images", help=IMAGES)
    parser.add_argument("--output_dir", default="report", help="where page.html and report.json go (default report)")
    parser.add_argument(
        "--limit", type=int, default=512, help="samples used, drawn by the seed; 0 for all (default 512)"
    )
    parser.add_argument("--max_length", type=int, help="longest sample in tokens; longer ones are not used, never cut")
    parser.add_argument("--batch_size", type=int, default=8, help="samples run at a time (default 8)")
    parser.add_argument("--worst", type=int, default=12, help="samples shown with their images (default 12)")
    parser.add_argument("--seed", type=int, default=0, help="draws the samples (default 0)")
    parser.add_argument("--device", help="where the models run (default: cuda if there is one, else cpu)")


def _demo(parser: ArgumentParser) -> None:
    parser.add_argument("--output_dir", default="build/demo", help="where everything goes (default build/demo)")
    _option(parser, "serve_python", help="interpreter of the serving environment (with vLLM)")
    parser.add_argument("--questions", type=int, default=None, help="held-out questions to score (default: all)")
    widths = "widths to make in addition to 4 bits, by GRACE and by rounding (default 2; none: the option alone)"
    _option(parser, "low_bits", type=int, nargs="*", choices=(2, 3, 5, 6, 7), default=[2], help=widths)


# name, one line of help, arguments
Commands = tuple[tuple[str, str, Callable[[ArgumentParser], None]], ...]
COMMANDS: Commands = (
    ("train", "train a student to INT4 with GRACE and write a verified checkpoint", _train),
    ("oneshot", "the same objective over a calibration set, through llm-compressor's oneshot", _oneshot),
    ("export", "finish a run that has trained to its end: write and verify its checkpoint, without training", _export),
    ("verify", "prove that a checkpoint is bit for bit what was trained", _verify),
    ("report", "compare an INT4 checkpoint with its BF16 one, or show how a training went, as one page", _report),
    ("demo", "train, verify, serve and score the bundled pair (in a clone of the repository)", _demo),
)


# of the group `grace data`
DATA_COMMANDS: Commands = (
    ("check", "check which samples of a dataset can be used and how long they are, and show some of them", _data_check),
)

# of the group `grace teacher`
TEACHER_COMMANDS: Commands = (
    ("cache", "run the teacher once over a dataset and keep the hidden states that training reads", _teacher_cache),
)


def _missing_path(args: Namespace) -> str | None:
    """Return a sentence about the first path that does not exist.

    Only what is sure to be a path: importing torch to find out the same takes several seconds.
    """
    given = {name: value for name, value in vars(args).items() if isinstance(value, str)}
    given |= dict(zip(("A", "B"), getattr(args, "compare", None) or (), strict=False))
    paths = ("recipe", "checkpoint", "run_folder", "config", "source")
    sentences = {
        "recipe": "no recipe at {}",
        "checkpoint": "{} is not a folder; give the folder of a checkpoint that GRACE wrote",
        "source": "there is no source folder {}; give the folder of the BF16 student or leave it out",
        "run_folder": "{} holds no resume state, because there is no such folder",
        "dataset": "no dataset file at {}",
        "config": "no file of training arguments at {}",
        "A": "cannot read checkpoint A at {!r}: there is no such folder",
        "B": "cannot read checkpoint B at {!r}: there is no such folder",
    }
    for name, value in given.items():
        is_path = name in paths or (name in ("model", "teacher", "A", "B") and value.startswith(("/", "./", "../")))
        is_path |= name == "dataset" and value.endswith((".json", ".jsonl", ".parquet", ".yaml"))
        if is_path and not os.path.exists(value):
            return sentences.get(name, f"there is no folder {{!r}} for {name}").format(value)
    return None


def call(name: str, args: Namespace) -> None:
    """Run a command and end the process with its exit status."""
    missing = _missing_path(args)
    if missing:
        print(f"grace {name}: {missing}", file=sys.stderr)
        sys.exit(2)
    # importing the package imports torch, transformers and llm-compressor
    from grace_plugin.cli import commands

    sys.exit(commands.run(name, args))


def _subcommand(name: str, help_line: str, arguments: Callable[[ArgumentParser], None], group: str = "") -> CommandInfo:
    class Command(BaseOptimumCLICommand):
        COMMAND = CommandInfo(name=name, help=help_line)

        @staticmethod
        def parse_args(parser: ArgumentParser) -> None:
            arguments(parser)

        def run(self) -> None:
            call(group + name, self.args)

    return CommandInfo(name=name, help=help_line, subcommand_class=Command)


# optimum wants a class for each command, and a group's commands as a field of its class
class _Group(BaseOptimumCLICommand):
    """A group of commands, which are printed where none is given."""

    def run(self) -> None:
        """Print the commands where none is given."""
        self.parser.print_help()
        sys.exit(2)


class DataCommand(_Group):
    """The `grace data` group."""

    COMMAND = CommandInfo(name="data", help="inspect a dataset before a run")
    SUBCOMMANDS = tuple(_subcommand(*command, group="data ") for command in DATA_COMMANDS)


class TeacherCommand(_Group):
    """The `grace teacher` group."""

    COMMAND = CommandInfo(name="teacher", help="run a teacher before training")
    SUBCOMMANDS = tuple(_subcommand(*command, group="teacher ") for command in TEACHER_COMMANDS)


class GraceCommand(_Group):
    """The `optimum-cli grace` group."""

    COMMAND = CommandInfo(name="grace", help="INT4 quantization-aware training of vision-language models")
    SUBCOMMANDS = (
        *(_subcommand(*command) for command in COMMANDS),
        CommandInfo(name="data", help=DataCommand.COMMAND.help, subcommand_class=DataCommand),
        CommandInfo(name="teacher", help=TeacherCommand.COMMAND.help, subcommand_class=TeacherCommand),
    )


def main() -> None:
    """Entry point of the alias `grace`."""
    parser = ArgumentParser("grace", description=GraceCommand.COMMAND.help)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, help_line, arguments in COMMANDS:
        arguments(subparsers.add_parser(name, help=help_line, description=help_line))
    for group, commands in ((DataCommand.COMMAND, DATA_COMMANDS), (TeacherCommand.COMMAND, TEACHER_COMMANDS)):
        parent = subparsers.add_parser(group.name, help=group.help, description=group.help)
        within = parent.add_subparsers(dest="within", required=True, metavar="command")
        for name, help_line, arguments in commands:
            arguments(within.add_parser(name, help=help_line, description=help_line))
    args = parser.parse_args()
    call(f"{args.command} {args.within}" if "within" in args else args.command, args)


REGISTER_COMMANDS = [GraceCommand]
