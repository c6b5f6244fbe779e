"""The resume states of a run: when one is written, what it holds, and which one a run goes on from.

All ranks write their part of a state, rank 0 publishes it (see `resume.py`), and all agree on whether it was. A state that does
not fit on the disk costs the run nothing: what was written of it is removed, the states before it stay, a warning says how much
to free, and training goes on.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from grace_plugin.artifact.ranks import together
from grace_plugin.run.resume import (
    damage,
    disk_is_full,
    is_disk_error,
    manifest_facts,
    newest_whole,
    publish,
    remove_leftovers,
    rotate,
    state_bytes,
    states,
)

if TYPE_CHECKING:
    from grace_plugin.run.trainer import GraceTrainer

__all__ = ["TRAINER_STATE", "ResumeStates", "choose_state"]

TRAINER_STATE = "trainer_state.json"
logger = logging.getLogger(__name__)


def choose_state(asked: bool | str | os.PathLike[str], folder: Path) -> Path:
    """The whole resume state to go on from.

    Args:
        asked: True for the newest whole one of `folder`, or a state by its path.
        folder: the run folder.

    Raises:
        ValueError: there is none, or the one asked for by name is not whole.
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


def _from_first_rank(value: Any) -> Any:
    """Rank 0's value on every rank; each takes part."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


class ResumeStates:
    """The states that a trainer writes and reads in its `args.output_dir`."""

    def __init__(self, trainer: GraceTrainer) -> None:
        self.trainer = trainer
        self.kept: Path | None = None  # the newest state that is known to be whole
        self._written: tuple[int, bool] | None = (
            None  # step of the latest that this process wrote, and whether it ended
        )

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.trainer.args.output_dir)

    def choose(self, asked: bool | str | os.PathLike[str]) -> Path:
        """See `choose_state`; the same one on every rank."""
        device = self.trainer.args.device
        mine = together(
            lambda: choose_state(asked, self.folder) if self.trainer.args.process_index == 0 else None, device
        )
        self.kept = Path(_from_first_rank(mine))
        return self.kept

    def has_ended(self, state: Path) -> bool:
        """Whether a whole state is one of a run that has trained to its end."""
        facts = manifest_facts(state)
        return bool(facts.get("ended")) or facts.get("step", 0) >= facts.get("max_steps", 1) > 0

    def save(self, *, ended: bool = False, weights_only: bool = False) -> Path | None:
        """Write a state of this step; None where it was not written, after a warning.

        Args:
            ended: the run trains no further step.
            weights_only: leave out optimizer, scheduler and random states, which an ended run does not need.
        """
        trainer = self.trainer
        step, writer = trainer.state.global_step, trainer.args.should_save
        if self._written in ((step, ended), (step, True)):
            return self.kept  # the end of an epoch asks again for the state of its last step
        final = self.folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        partial = final.with_name(f"{final.name}.partial")
        optimizer = None if weights_only else trainer.optimizer
        needed = state_bytes(trainer.model, optimizer, str(getattr(trainer.args.optim, "value", trainer.args.optim)))

        def write() -> str:
            """Rank 0's folder exists before the others write into it."""
            return self._tried(lambda: self._write(partial, weights_only), needed) if not problem else problem

        def begin() -> str:
            if not writer:
                return ""
            remove_leftovers(self.folder)
            full = disk_is_full(self.folder, needed)
            return full or self._tried(lambda: partial.mkdir(parents=True, exist_ok=True), needed)

        def end() -> str:
            facts = {"step": step, "max_steps": trainer.state.max_steps, "ended": ended}
            return self._tried(lambda: publish(partial, final, **facts), needed) if writer and not problem else problem

        problem = ""
        for part in (begin, write, end):
            problem = self._agreed(part)
        if problem:
            if writer:
                remove_leftovers(self.folder)
                kept = f"the one at {self.kept} is kept" if self.kept else "there is none before it"
                logger.warning(
                    "no resume state was written at step %d in %s: %s; %s, and training goes on",
                    step, self.folder, problem, kept,
                )  # fmt: skip
            return None
        self.kept, self._written = final, (step, ended)
        if writer:
            best = trainer.state.best_model_checkpoint
            self._tried(lambda: rotate(self.folder, final, trainer.args.save_total_limit, best), 0)
        return final

    def _tried(self, work: Any, needed: int) -> str:
        """Do it; an error of the disk is returned as a sentence part, any other raised."""
        try:
            work()
        except Exception as error:
            if not is_disk_error(error):
                raise
            said = str(error).partition("\n")[0][:200]
            return disk_is_full(self.folder, needed) or f"the disk refused it ({said}); free {needed / 1e6:,.1f} MB"
        return ""

    def _agreed(self, part: Any) -> str:
        """What stopped a part on any rank, "" where nothing did; collective and unconditional."""
        device = self.trainer.args.device
        problem = together(part, device)
        if not (dist.is_available() and dist.is_initialized()):
            return problem
        any_problem = torch.tensor(float(bool(problem)), device=device)
        dist.all_reduce(any_problem)
        return problem or ("another rank could not write its part" if any_problem.item() else "")

    def _write(self, folder: Path, weights_only: bool) -> None:
        """This rank's part: Trainer's files in Trainer's order, with `trainer_state.json` last."""
        trainer = self.trainer
        if trainer.args.should_save:
            trainer._save(str(folder))
        if not weights_only:
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
