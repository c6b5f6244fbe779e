"""What a loss term is, and the registry of terms.

A term is one file: a subclass of `LossTerm` with its recipe block, the names of its counts and sums, its loss and its metrics.
Counts and sums of all terms are reduced together, and what a term returns from `metrics` and `logs` is in the step's record, in
Trainer's log, in `metrics.jsonl` and, by its `charts`, in the report. A term from outside the package is registered by
`register_term` and asked for in the recipe under `terms:`; `examples/custom_loss_term.py` is one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, ClassVar, NamedTuple

from pydantic import ValidationError
from torch import Tensor, nn

from grace_plugin.objective.window import AccumulationWindow, MicroBatch, NamedSums
from grace_plugin.recipe import Block, problems, shown
from grace_plugin.teacher import Teacher
from grace_plugin.vlm import Capture, Family

__all__ = ["TERMS", "Chart", "LossTerm", "RunContext", "build_terms", "check_terms", "register_term"]


class Chart(NamedTuple):
    """A chart of the training report: its title, its unit, and the label of each metric that it shows."""

    title: str
    unit: str
    series: Mapping[str, str]


@dataclass(frozen=True)
class RunContext:
    """What the terms of a run share.

    vocabulary: V, token ids that student and teacher share. teacher: None where no term reads one.
    """

    student: Any
    family: Family
    teacher: Teacher | None
    vocabulary: int
    total_steps: int

    @property
    def head(self) -> nn.Module:
        """The student's output embedding, [V_s, d_s]."""
        return self.student.get_output_embeddings()


class LossTerm(ABC):
    """One addend of the objective: weight * sum / count over the accumulation window of all ranks.

    Attributes:
        name: of the term, its key in the recipe.
        recipe: pydantic model of its recipe block.
        counts: names of the sums that are known before the student's forward pass: the denominators.
        sums: names of the sums that `loss` adds to; the term's numerators. Names are unique among all terms of a run.
        charts: what the training report shows of its metrics.
    """

    name: ClassVar[str]
    recipe: ClassVar[type[Block]]
    counts: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[tuple[str, ...]] = ()
    charts: ClassVar[tuple[Chart, ...]] = ()
    has_own_block: ClassVar[bool] = False  # a field of GraceModifier, for the terms of the package
    enabled = True
    needs_teacher = False
    # of the student, and of the teacher if the term needs one
    reads_visual_states = False

    def __init__(self, config: Any) -> None:
        self.config = config
        self.context: RunContext

    def bind(self, context: RunContext) -> None:
        """Take what the terms of a run share, once before the first step."""
        self.context = context

    def begin_step(self) -> None:
        """Forget the step before."""
        return None

    def prepare(self, micro_batch: MicroBatch, counts: NamedSums) -> None:
        """Add this micro-batch's share to the counts, before the student runs; the teacher's states are there.

        Whatever the loss needs of it may be kept in `micro_batch.prepared[self.name]`. This runs on the teacher's stream and
        reads nothing back from the device.
        """
        return None

    def weight(self, step: int) -> float:
        """Return the weight of the term in the 0-based optimizer step `step`."""
        return float(self.config.weight)

    @abstractmethod
    def loss(self, micro_batch: MicroBatch, states: Capture, window: AccumulationWindow, weight: float) -> Tensor:
        """Return weight * (share of the sum) / (count of the window), differentiable, and add the share to `window.sums`.

        Args:
            micro_batch: the one that the student has just run on.
            states: the student's hidden states, [B, S, d_s]: `final` (normed) and `penultimate` (layer L-2).
            window: its counts are those of all micro-batches and ranks.
            weight: of the term in this step.

        Returns:
            A 0-dimensional loss; a micro-batch that contributes nothing gives a zero.
        """

    def metrics(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Return the values of a step by the keys of the log, from the sums and counts over all ranks."""
        return {}

    def logs(self, step: int) -> dict[str, float]:
        """Return what is logged in addition to the metrics, without a collective; called only for steps that are logged."""
        return {}


TERMS: dict[str, type[LossTerm]] = {}


def register_term(term: type[LossTerm]) -> type[LossTerm]:
    """Register a term under its name, so that a recipe can ask for it; usable as a decorator.

    Raises:
        ValueError: another term has that name.
    """
    known = TERMS.setdefault(term.name, term)
    # the same file run as a script and imported as a module makes two classes of one term
    if (known.__qualname__, known.name) != (term.__qualname__, term.name):
        raise ValueError(f"the loss term {term.name!r} is registered by {known.__module__}; give yours another name")
    TERMS[term.name] = term
    return term


def check_terms(blocks: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the recipe's `terms` block with defaults written in.

    Raises:
        ValueError: a term that is not registered or has a block of its own, or a value that its block does not take.
    """
    if not blocks.keys() <= TERMS.keys():  # only now: another package's import error must not break the known terms
        for entry_point in entry_points(group="grace_plugin.terms"):
            entry_point.load()
    checked = {}
    added = {name: term for name, term in TERMS.items() if not term.has_own_block}
    for name, block in blocks.items():
        if name in TERMS and name not in added:
            raise ValueError(f"terms: {name} has a block of its own in the recipe; write it there")
        if name not in added:
            known = ", ".join(sorted(added)) or "none"
            raise ValueError(
                f"terms: {shown(name)} is no registered loss term (known: {known}); import the module that registers it "
                "with grace_plugin.objective.register_term before the recipe is read, or name it as an entry point "
                "of the group grace_plugin.terms in its package, which commands need"
            )
        try:
            checked[name] = TERMS[name].recipe.model_validate(block or {}).model_dump(mode="json")
        except ValidationError as error:
            raise ValueError(f"terms.{name}: {problems(error, block or {})}") from None
    return checked


def build_terms(blocks: Mapping[str, Any]) -> list[LossTerm]:
    """Return the terms of a checked `terms` block."""
    return [TERMS[name](TERMS[name].recipe.model_validate(block)) for name, block in blocks.items()]


def check_names(terms: Sequence[LossTerm]) -> None:
    """Refuse terms that would add to one another's sums.

    Raises:
        ValueError: names the sum that two terms declare.
    """
    owner = {"samples_without_images": "the objective"}
    for number, term in enumerate(terms):
        if term.name in [other.name for other in terms[:number]]:
            raise ValueError(f"the loss term {term.name} is given twice; keep one of them")
        for name in (*term.counts, *term.sums):
            if name in owner:
                raise ValueError(f"{owner[name]} and {term.name} both declare {name!r}; rename the term's")
            owner[name] = f"the loss term {term.name}"
