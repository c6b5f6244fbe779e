"""Resume states in addition to those of `save_strategy`: on a signal, and by the clock.

Ctrl-C and SIGTERM end the run after its running step (with several ranks after the next one; in the last step the run ends as
usual), with a resume state and one line that says what is kept and how to continue. A second signal, a second or more after the
first, ends the process at once. By the clock, a run whose `save_strategy` was left at its default writes a state every
`save_minutes`, less often where a state takes long: states cost at most 2 % of the run.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from grace_plugin.objective.async_copy import AsyncHostCopy
from grace_plugin.vlm.transfer import to_device

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = ["ResumeCallback", "Terminated", "command_again"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# seconds within which two signals are one request: schedulers and launchers signal the process group and the process
_ONE_REQUEST = 1.0
_SHARE = 0.02  # largest share of the time that states written by the clock may take


class Terminated(SystemExit):
    """SIGTERM ended a run after a step; the process exits with status 143 unless this is caught."""


def command_again(argument: str = "resume_from_checkpoint") -> str:
    """Return how to continue: the command line of a `grace` command, or what to pass to `train`."""
    given = sys.argv[1:]
    if "grace_plugin.cli.commands" not in sys.modules or "train" not in given:
        return f"call train again with the same arguments and {argument}=True"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return f"start the same command again with --{argument}"
    words = ["optimum-cli", *given] if given[0] == "grace" else ["grace", *given]
    return shlex.join([*words, *([] if f"--{argument}" in words else [f"--{argument}"])])


class ResumeCallback(TrainerCallback):
    """Ask Trainer for a state after a signal and by the clock; all ranks agree on it after each step.

    Args:
        trainer: the trainer that writes the states.
        on_signal: whether signals are handled.
        minutes: time between two states, None for none by the clock.
    """

    def __init__(self, trainer: GraceTrainer, *, on_signal: bool, minutes: float | None) -> None:
        self.trainer, self.on_signal, self.minutes = trainer, on_signal, minutes
        self.received = 0  # number of the first signal of this process
        self.stopping = 0  # number of the signal that all ranks have agreed on
        self._said: AsyncHostCopy | None = None  # the reduction after the previous step
        self._at = 0.0  # time of the first signal
        self._saved = self._begun = self._spent = 0.0  # end, start and duration of the last state, in seconds
        self._before: dict[int, Any] = {}  # handlers of the caller

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Handle signals inside the block; only in the main thread, because Python allows no other thread to."""
        self.received, self.stopping, self._said = 0, 0, None
        self._saved = time.monotonic()
        if not self.on_signal or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._before = {one: signal.signal(one, self._handle) for one in SIGNALS}
        try:
            yield
        finally:
            for one, handler in self._before.items():
                signal.signal(one, signal.SIG_DFL if handler is None else handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._at < _ONE_REQUEST:
            return
        # no print and no save here: a handler runs between two bytecodes, maybe inside a write to the same stream
        if self.received:
            before = self._before[number]
            if number == signal.SIGINT and callable(before):
                before(number, frame)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self.received, self._at = number, now

    def _agreed(self, due: bool) -> tuple[int, bool]:
        """Return the largest signal number of any rank, and whether rank 0's clock asks for a state.

        With several ranks these are the values of the previous step. All ranks read the same numbers, so they stop together.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self.received, due
        first = self.trainer.args.process_index == 0
        # the copy is queued and read a step later: read at once, it would stop the host until the device is done
        said = to_device(torch.tensor([float(self.received), float(due and first)]), self.trainer.args.device)
        dist.all_reduce(said, op=dist.ReduceOp.MAX)
        before, self._said = self._said, AsyncHostCopy(said)
        number, anyone = before.tolist() if before is not None else (0.0, 0.0)
        return int(number), bool(anyone)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a state, and for the end of the run where a signal came."""
        minutes = self.minutes
        wait = None if minutes is None else max(60 * minutes, self._spent / _SHARE)
        number, due = self._agreed(wait is not None and time.monotonic() - self._saved >= wait)
        if number:
            self.stopping = number
            control.should_save = control.should_training_stop = True
        elif due:
            control.should_save = True
        self._begun = time.monotonic()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restart the clock."""
        self._saved = time.monotonic()
        self._spent = self._saved - self._begun

    def end(self) -> None:
        """Raise what a signal asked for, after printing what is kept and how to continue.

        Raises:
            KeyboardInterrupt: SIGINT came.
            Terminated (a SystemExit): SIGTERM came.
        """
        if not self.stopping:
            return
        trainer, name = self.trainer, signal.Signals(self.stopping).name
        done, kept = trainer.state.global_step, trainer.states.kept
        if trainer.args.process_index == 0:
            where = f"{kept} is kept; go on with: {command_again()}" if kept else "no resume state could be written"
            print(
                f"stopped by {name} after step {done} of {trainer.state.max_steps}; {where}",
                file=sys.stderr,
                flush=True,
            )
        if self.stopping == signal.SIGINT:
            raise KeyboardInterrupt(f"stopped by {name} after step {done}")
        raise Terminated(128 + self.stopping)
