"""The student as its own teacher: its weights before quantization, without a second copy of them.

Only for runs in which the quantized layers' weights are frozen and their scales are trained: the weights are then those of the
unquantized student, and the teacher's pass is the student's pass without fake quantization. Other trainable parameters (norms,
a projector) are copied at the start, so that the teacher does not change.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from grace_plugin.quantizer import QuantizedLayerGroup
from grace_plugin.teacher.base import Teacher, TeacherStates, model_inputs, states_of
from grace_plugin.vlm import VisualTokens, family_of

__all__ = ["SelfTeacher", "unquantized"]


@contextmanager
def unquantized(linears: list[nn.Linear]) -> Iterator[None]:
    """Disable fake quantization: inside, the layers multiply by their unquantized weights."""
    forwards = [linear.__dict__.get("forward") for linear in linears]
    try:
        # Quantized layers carry their forward on the instance, so the class's own is restored for the pass.
        for linear in linears:
            linear.__dict__["forward"] = nn.Linear.forward.__get__(linear)
        yield
    finally:
        for linear, forward in zip(linears, forwards, strict=True):
            linear.__dict__.pop("forward", None)
            if forward is not None:
                linear.__dict__["forward"] = forward


class SelfTeacher(Teacher):
    """The student as it was at the start of the run; `begin` takes the copies."""

    def __init__(self, student: nn.Module) -> None:
        self.student: Any = student
        self.config = self.student.config
        self.name_or_path = getattr(student, "name_or_path", "")
        self._text_model = family_of(student).text_model(student)
        self._linears: list[nn.Linear] = []
        self._start: dict[str, Tensor] = {}

    @property
    def copied(self) -> int:
        """Return the bytes of the copies of trainable parameters other than scales."""
        return sum(copy.numel() * copy.element_size() for copy in self._start.values())

    def begin(self, student: nn.Module, attached: Sequence[QuantizedLayerGroup]) -> None:
        """Check that the quantized layers' weights are frozen, and copy all other trainable parameters.

        Raises:
            ValueError: nothing is quantized, or weights of quantized layers train; names them and how to fix it.
        """
        linears = {name: linear for one in attached for name, linear in one.linears.items()}
        if not linears:
            raise ValueError(
                "teacher.kind: self compares the quantized student with itself unquantized, and nothing is quantized; set a "
                "scheme, or another kind of teacher"
            )
        moving = [name for name, linear in linears.items() if linear.weight.requires_grad]
        if moving:
            raise ValueError(
                f"teacher.kind: self takes the student's own weights as the teacher, and {len(moving)} of {len(linears)} "
                f"quantized layers train theirs ({', '.join(moving[:3])}{', ...' if len(moving) > 3 else ''}): the teacher "
                "would move with the student. Freeze them (training.freeze) and learn the scales alone, or name a teacher "
                "(kind: resident, offload or cached)"
            )
        self._linears = list(linears.values())
        learned = {  # scales and LoRA factors, which the unquantized pass does not read
            id(parameter)
            for linear in self._linears
            for name, parameter in linear.named_parameters(recurse=False)
            if name not in ("weight", "bias")
        }
        self._start = {
            name: parameter.detach().clone()
            for name, parameter in student.named_parameters()
            if parameter.requires_grad and id(parameter) not in learned
        }

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V, d] and bias of the student's output head at the start of the run."""
        head = self.student.get_output_embeddings()
        # By identity: a tied head is listed under the embedding's name.
        names = {id(parameter): name for name, parameter in self.student.named_parameters()}
        weight, bias = (
            None if p is None else self._start.get(names[id(p)], p.detach())
            for p in (head.weight, getattr(head, "bias", None))
        )
        assert weight is not None
        return weight, bias

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Run the student as it was at the start, unquantized and in evaluation mode, on a batch."""
        # By module: frozen parts may already be in evaluation mode and must stay so after the pass.
        training = [module for module in self.student.modules() if module.training]

        def forward(**inputs: Any) -> Any:
            # The copies replace trained parameters for this call; the student's own are not touched.
            return functional_call(self.student, self._start, (), inputs)

        try:
            self.student.eval()
            with unquantized(self._linears):
                return states_of(forward, self._text_model, model_inputs(batch, self.student, host), positions, visual)
        finally:
            for module in training:
                module.training = True
