"""The interface of a teacher: an output head, and the hidden states that the losses read of a batch.

Legend: B batch, S sequence, N supervised positions, M visual tokens, d_t teacher width, V_t rows of the teacher's head.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from grace_plugin.data import SAMPLE_KEY
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.deprecation import warn_renamed
from grace_plugin.quantizer import QuantizedLayerGroup
from grace_plugin.vlm import Family, VisualTokens, capture, family_of
from grace_plugin.vlm.transfer import single_thread

__all__ = ["MISSING", "GivenTeacher", "Teacher", "TeacherStates", "model_inputs", "states_of", "supervised_positions"]

MISSING = (
    "GRACE distils from a teacher and none was given: set teacher.model in the recipe, pass teacher=, or disable the distill "
    "and relational blocks"
)


@dataclass(frozen=True)
class TeacherStates:
    """Hidden states of one teacher pass: `final` [N, d_t] and `visual` [M, d_t], in the teacher's dtype.

    `visual` is [0, d_t] for a decoder of one layer and for a cache without visual tokens; neither allows the relational term.
    """

    final: Tensor
    visual: Tensor


def model_inputs(
    batch: Mapping[str, Any], model: nn.Module | None = None, host: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return the tensors of a batch that a model's forward takes; labels and keys are left out.

    Args:
        batch: of the collator.
        model: of a registered family, unwrapped. With `host`, inputs that the family can compute in host memory are added.
        host: the same batch in host memory.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("labels", SAMPLE_KEY) and isinstance(v, Tensor)}
    # On the CPU the model reads the batch itself at no cost, and training bits do not depend on host inputs.
    if model is not None and host is not None and host["input_ids"].device != batch["input_ids"].device:
        device = batch["input_ids"].device
        with single_thread(device):
            inputs |= family_of(model).host_inputs(model, host, device)
    return inputs


def supervised_positions(labels: Tensor) -> Tensor:
    """Return the flat positions in [B * S], int64 [N], whose next token is supervised, for labels [B, S]."""
    mask = labels[:, 1:] != IGNORE_INDEX
    return nn.functional.pad(mask, (0, 1)).flatten().nonzero().squeeze(1)


class Teacher(ABC):
    """A teacher of any kind. `config` and `name_or_path` are those of its checkpoint, as on a transformers model."""

    config: Any
    name_or_path: str
    side_stream = (
        False  # whether, on CUDA, its passes may run on a stream of their own: they share nothing with the student
    )

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "aside" in vars(cls):
            warn_renamed(f"{cls.__name__}.aside", "side_stream")
            cls.side_stream = vars(cls)["aside"]

    @property
    def family(self) -> Family:
        """Return the family of the teacher's model."""
        return family_of(self)

    @property
    def softcap(self) -> float | None:
        """Return c where the teacher's logits are c * tanh(logits / c), else None."""
        return self.family.softcap(self.config)

    @abstractmethod
    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V_t, d_t] and bias [V_t] of the output head, without gradients."""

    @abstractmethod
    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Return the hidden states of a batch.

        Args:
            batch: of the collator, on the student's device.
            positions: int64 [N], flat positions in [B * S] that predict a supervised token.
            visual: positions of the visual tokens.
            host: the same batch in host memory, if it is available.
        """

    def to(self, device: torch.device) -> None:
        """Move to the device of the training run."""
        return None

    def begin(self, student: nn.Module, attached: Sequence[QuantizedLayerGroup]) -> None:
        """Prepare for the first step; called once, after the student's trainable parameters were chosen."""
        return None


GivenTeacher = str | os.PathLike[str] | nn.Module | Teacher
"""What can be passed instead of the recipe's teacher: a checkpoint, a loaded model, or an instance of a `Teacher` subclass."""


@torch.no_grad()
def states_of(
    forward: Any, text_model: nn.Module, inputs: Mapping[str, Any], positions: Tensor, visual: VisualTokens
) -> TeacherStates:
    """Run `forward(**inputs)` and return the states of the decoder `text_model`, on the device of `positions`."""
    with capture(text_model) as caught:
        # Logits of one position: those of all would be [B, S, V_t] in memory, and nothing reads them.
        forward(**inputs, use_cache=False, logits_to_keep=1)
    assert caught.final is not None
    # An offloaded or sharded teacher can end on another device than the student.
    final = caught.final.flatten(0, 1).index_select(0, positions.to(caught.final.device))
    if caught.penultimate is None:  # a decoder of one layer, for which `check_depth` refuses the relational term
        return TeacherStates(final.to(positions.device), final[:0].to(positions.device))
    seen = caught.penultimate.flatten(0, 1).index_select(0, visual.index.to(caught.penultimate.device))
    return TeacherStates(final.to(positions.device), seen.to(positions.device))
