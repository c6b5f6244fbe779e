"""The resume states of a run: when one is written, what it contains, and which one a run continues from.

All ranks write their part of a state, rank 0 publishes it (see `resume.py`), and all agree on whether it was. A state that does
not fit on the disk does not end the run: its partial folder is removed, the states before it stay, a warning says how much to
free, and training continues.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers import TrainerState
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grace_plugin.export.plan import checkpoint_bytes
from grace_plugin.export.ranks import run_on_all_ranks
from grace_plugin.run.resume import (
    damage,
    disk_is_full,
    is_disk_error,
    manifest_facts,
    nearest_folder,
    newest_whole,
    publish,
    release_space,
    remove_leftovers,
    reserve_space,
    rotate,
    state_bytes,
    states,
)

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = [
    "STATE_FILE",
    "WEIGHTS",
    "ResumeStates",
    "check_resume_options",
    "choose_state",
    "has_ended",
    "is_automatic",
    "read_state",
]

WEIGHTS, STATE_FILE, TRAINER_STATE = "model.safetensors", "grace_state.json", "trainer_state.json"
logger = logging.getLogger(__name__)


def check_resume_options(resumes: bool, allowed: Sequence[str], minutes: float | None) -> None:
    """Refuse options of resume states that would have no effect.

    Raises:
        ValueError: changes are allowed of a run that is not resumed, or a time between states below 0.
    """
    if allowed and not resumes:
        raise ValueError(
            "allow_resume_changes is about a resumed run; pass resume_from_checkpoint as well, or leave it out"
        )
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"save_minutes is a time between two resume states of at least 0, or None, got {minutes}")


def choose_state(asked: bool | str | os.PathLike[str], folder: Path) -> Path:
    """Return the complete resume state to continue from.

    Args:
        asked: True for the newest complete one of `folder`, or a state by its path.
        folder: the run folder.

    Raises:
        ValueError: there is none, or the one asked for by name is not complete.
    """
    if not isinstance(asked, bool):
        state = Path(asked)
        reason = damage(state) if state.is_dir() else "there is no such folder"
        if not reason:
            return state
        others = [other.name for other in states(state.parent) if other != state] if state.parent.is_dir() else []
        instead = f"take another one ({', '.join(others[:5])})" if others else "start the run from the beginning"
        raise ValueError(f"cannot resume from {state}: {reason}; {instead}")
    found, torn = newest_whole(folder) if folder.is_dir() else (None, {})
    named = "; ".join(f"{name}: {reason}" for name, reason in torn.items())
    if found is None:
        what = f"no whole resume state ({named})" if torn else "no resume state"
        raise ValueError(f"{folder} holds {what}; remove the folder and start the run from the beginning")
    if torn:
        logger.warning("resuming from %s, the newest whole resume state; not used: %s", found, named)
    return found


def has_ended(state: Path) -> bool:
    """Whether a complete state is one of a run that has trained to its end."""
    facts = manifest_facts(state)
    return bool(facts.get("ended")) or facts.get("step", 0) >= facts.get("max_steps", 1) > 0


def is_automatic(state: Path) -> bool:
    """Whether a state was written by the clock, and not because `save_strategy` asked for it."""
    try:
        return bool(manifest_facts(state).get("automatic"))
    except ValueError:
        return False


def _is_end_of(state: Path, step: int) -> bool:
    return manifest_facts(state).get("step") == step and has_ended(state)


def read_state(state: Path) -> tuple[dict[str, Any], TrainerState]:
    """Return what GRACE and Trainer have written into a complete state."""
    return json.loads((state / STATE_FILE).read_text()), TrainerState.load_from_json(str(state / TRAINER_STATE))


def _from_first_rank(value: Any) -> Any:
    """Return rank 0's value on every rank; collective."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


class ResumeStates:
    """The states that a trainer writes and reads in its `args.output_dir`.

    automatic: whether `save_strategy` was left at its default: states are written by the clock, and only the newest is kept.
    """

    def __init__(self, trainer: GraceTrainer, *, automatic: bool = False) -> None:
        self.trainer, self.automatic = trainer, automatic
        self.kept: Path | None = None  # the newest state that is known to be complete
        self._written: tuple[int, bool] | None = None  # step of the latest state of this process, and whether it ended

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.trainer.args.output_dir)

    def choose(self, asked: bool | str | os.PathLike[str]) -> Path:
        """Return the state of `choose_state`, the same one on every rank."""
        device = self.trainer.args.device
        mine = run_on_all_ranks(
            lambda: choose_state(asked, self.folder) if self.trainer.args.process_index == 0 else None, device
        )
        self.kept = Path(_from_first_rank(mine))
        return self.kept

    def _size(self, weights_only: bool = False) -> int:
        trainer = self.trainer
        name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
        return state_bytes(trainer.model, *((None, None) if weights_only else (trainer.optimizer, name)))

    def check_space(self, total_steps: int, saves: bool, output_dir: str | os.PathLike[str]) -> None:
        """Compare the states that a run will keep with the free space, before its first step, and reserve that of the first.

        Args:
            total_steps: optimizer steps of the run.
            saves: whether `save_strategy` asks for states.
            output_dir: of the checkpoint, which may take space of the same disk.

        Raises:
            ValueError: those that were asked for do not fit. States by the clock are given up with a warning instead; that
                of the end, which is smaller, is still tried.
        """
        args, size = self.trainer.args, self._size()
        if not (saves or self.automatic):
            return
        kept = args.save_total_limit or 0
        if self.automatic:
            kept = 1
        elif kept < 1 and getattr(args.save_strategy, "value", args.save_strategy) == "steps":
            every = args.save_steps if args.save_steps >= 1 else max(1, math.ceil(args.save_steps * total_steps))
            kept = math.ceil(total_steps / every) - 1
        elif kept < 1:
            kept = max(0, math.ceil(args.num_train_epochs) - 1) if args.max_steps < 1 else 0

        def check() -> str:
            if args.process_index != 0:
                return ""
            release_space(self.folder)  # of a run that was killed
            there = len(states(self.folder)) if self.folder.is_dir() else 0
            shared = nearest_folder(self.folder).stat().st_dev == nearest_folder(Path(output_dir)).stat().st_dev
            checkpoint = checkpoint_bytes(self.trainer.model) if shared and not self.automatic else 0
            full = disk_is_full(self.folder, size * max(1, kept + 1 - there) + checkpoint)
            if not full and not there:
                reserve_space(self.folder, size)
            return full

        # an error of the disk on rank 0 must not leave the others waiting for its answer
        full = _from_first_rank(run_on_all_ranks(check, args.device))
        if full and self.automatic:
            self.trainer.interrupts.minutes = None
            logger.warning("no resume states are written by the clock in %s: %s", self.folder, full)
        elif full:
            raise ValueError(
                f"the resume states that save_strategy asks for do not fit into {self.folder} ({size / 1e6:,.1f} MB each, "
                f"up to {kept + 1} at a time): {full}, or set save_total_limit to keep fewer"
            )

    def release(self) -> None:
        """Give back the space that is reserved for a first state, at the end of a run."""
        if self.trainer.args.process_index == 0:
            release_space(self.folder)

    def save(self, *, ended: bool = False, weights_only: bool = False) -> Path | None:
        """Write a state of this step; None where it was not written, after a warning.

        Args:
            ended: the run trains no further step.
            weights_only: leave out optimizer, scheduler and random states, which an ended run does not need.
        """
        trainer = self.trainer
        step, writer = trainer.state.global_step, trainer.args.should_save
        if self._written in ((step, ended), (step, True)):
            return self.kept  # Trainer asks again for the state of a step at the end of an epoch
        if ended and self.kept is not None and _from_first_rank(writer and _is_end_of(self.kept, step)):
            return self.kept
        final = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        partial = final.with_name(f"{final.name}.partial")
        needed = self._size(weights_only)

        def begin() -> None:
            if writer:
                remove_leftovers(self.folder)
                if disk_is_full(self.folder, needed):
                    release_space(self.folder)
                if disk_is_full(self.folder, needed):
                    raise OSError(errno.ENOSPC, "no space for a resume state")
                partial.mkdir(parents=True, exist_ok=True)

        def end() -> None:
            if writer:
                facts = {"max_steps": trainer.state.max_steps, "ended": ended, "automatic": self.automatic}
                publish(partial, final, step=step, **facts)

        problem = ""
        # all ranks wait after each part: the others write into the folder that rank 0 makes, and rank 0 hashes what they wrote
        for part in (begin, lambda: self._write(partial, weights_only), end):
            problem = problem or self._agreed(
                part, needed
            )  # a problem of one rank is one on all, so none is left waiting
        if problem:
            if writer:
                remove_leftovers(self.folder)
                kept = f"the one at {self.kept} is kept" if self.kept else "there is none before it"
                then = "the checkpoint is written without it" if ended else "training goes on"
                logger.warning(
                    "no resume state was written at step %d in %s: %s; %s, and %s",
                    step,
                    self.folder,
                    problem,
                    kept,
                    then,
                )
            return None
        self.kept, self._written = final, (step, ended)
        if writer:
            self._tried(lambda: release_space(self.folder), 0)
            best, limit = trainer.state.best_model_checkpoint, trainer.args.save_total_limit
            self._tried(lambda: rotate(self.folder, final, 1 if self.automatic else limit, best), 0)
        return final

    def _tried(self, work: Callable[[], Any], needed: int) -> str:
        """Do `work`; an error of the disk is returned as a sentence part, any other is raised."""
        try:
            work()
        except Exception as error:
            if not is_disk_error(error):
                raise
            said = str(error).partition("\n")[0][:200]
            return disk_is_full(self.folder, needed) or f"the disk refused it ({said}); free {needed / 1e6:,.1f} MB"
        return ""

    def _agreed(self, work: Callable[[], Any], needed: int) -> str:
        """Do `work` on every rank; return what stopped it on any, "" where nothing did; collective."""
        device = self.trainer.args.device
        problem = run_on_all_ranks(lambda: self._tried(work, needed), device)
        if not (dist.is_available() and dist.is_initialized()):
            return problem
        any_problem = torch.tensor(float(bool(problem)), device=device)
        dist.all_reduce(any_problem)
        return problem or ("another rank could not write its part" if any_problem.item() else "")

    def _write(self, folder: Path, weights_only: bool) -> None:
        """Write this rank's part: Trainer's files in Trainer's order, with `trainer_state.json` last."""
        trainer = self.trainer
        if trainer.args.should_save:
            trainer._save(str(folder))
        if not weights_only:
            # private methods: Trainer's own _save_checkpoint writes into the final folder, where a kill leaves a torn state
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(str(folder))
        if trainer.args.should_save:
            state, control = trainer.state, trainer.control
            for held in (*trainer.callback_handler.callbacks, control):
                if isinstance(held, ExportableState):
                    name = type(held).__name__
                    if isinstance(state.stateful_callbacks[name], list):
                        state.stateful_callbacks[name].append(held.state())
                    else:
                        state.stateful_callbacks[name] = held.state()
            state.save_to_json(str(folder / TRAINER_STATE))
