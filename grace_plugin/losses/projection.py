"""The matrix products around a chunk of logits: hidden states times a head, and gradients times both.

What it does. ``cut`` takes the rows of a head that belong to the common vocabulary, in the type its hidden states are
multiplied in. ``Gradients`` holds what the loss is differentiated by and is filled chunk by chunk.

What it refuses. Shapes that do not fit each other, and a head with fewer rows than the common vocabulary; the message
names the side.

What it costs. One copy of the head when its type differs from the hidden states' (a bfloat16 copy of a float32 master
weight); one matrix of the head's size when the head is trained.

Legend: n positions of a chunk, N of all, V common vocabulary, d hidden width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """A head cut to the common vocabulary, in the type its hidden states are multiplied in."""

    weight: Tensor  # [V, d]
    bias: Tensor | None  # [V]
    cap: float | None = None  # logits are cap * tanh(logits / cap); whoever reads them caps them, in float32

    def part(self, first: int, end: int) -> Head:
        """The head of some ids."""
        return Head(self.weight[first:end], None if self.bias is None else self.bias[first:end], self.cap)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """[n, d] -> [n, V], uncapped, in the type of the hidden states; into the first n rows of ``out`` when it is given."""
        if out is None:
            return torch.nn.functional.linear(hidden, self.weight, self.bias)
        out = out[: hidden.shape[0]]
        if self.bias is None:
            return torch.mm(hidden, self.weight.T, out=out)
        return torch.addmm(self.bias, hidden, self.weight.T, out=out)

    def unrounded(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """[n, d] and ids [n, k] -> their logits [n, k], uncapped, multiplied in float32."""
        logits = (hidden.float().unsqueeze(1) * self.weight[ids].float()).sum(dim=2)
        return logits if self.bias is None else logits + self.bias[ids].float()


def cut(hidden: Tensor, weight: Tensor, bias: Tensor | None, vocabulary: int, cap: float | None = None) -> Head:
    """The first ``vocabulary`` rows of a head [rows, d], in the dtype of ``hidden``, without a gradient."""
    bias = None if bias is None else bias[:vocabulary].detach().to(hidden.dtype)
    return Head(weight[:vocabulary].detach().to(hidden.dtype), bias, cap)


def capped(logits: Tensor, cap: float | None) -> Tensor:
    """cap * tanh(logits / cap) in a tensor of its own, or the logits themselves without a cap."""
    return logits if cap is None else (logits / cap).tanh_().mul_(cap)


def check_head(
    side: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    vocabulary: int,
    chunk: int,
    cap: float | None = None,
) -> None:
    """ValueError, naming ``side``, for a head that fits neither its hidden states nor the common vocabulary, or a bad cap."""
    if cap is not None and not (math.isfinite(cap) and cap > 0):
        raise ValueError(
            f"{side}: logits are capped at a positive finite number, got {cap}; None leaves them as they are"
        )
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 position, got {chunk}")
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{side}: hidden states {tuple(hidden.shape)} do not fit a head of {tuple(weight.shape)}; "
            "give [positions, width] and [rows, width]"
        )
    if not 1 <= vocabulary <= weight.shape[0] or (bias is not None and bias.shape[0] < vocabulary):
        raise ValueError(
            f"{side}: a head of {weight.shape[0]} rows does not hold a common vocabulary of {vocabulary} ids; "
            "pass the number of ids both tokenizers share"
        )


def check_rows(name: str, given: Tensor, hidden_s: Tensor) -> None:
    """ValueError when ``given`` has not one row per student position."""
    if given.shape[0] != hidden_s.shape[0]:
        raise ValueError(f"{given.shape[0]} {name} for {hidden_s.shape[0]} student positions; give one per position")


def _add_product(total: Tensor, left: Tensor, right: Tensor, first: bool = False) -> None:
    """total = left @ right the first time and total += left @ right afterwards, in the precision of ``total``."""
    if total.dtype != left.dtype and not total.is_cuda:  # torch's CPU products round to their inputs' type
        product = left @ right
        total.copy_(product) if first else total.add_(product)
        return
    if total.dtype == left.dtype:
        torch.mm(left, right, out=total) if first else total.addmm_(left, right)
    elif first:
        torch.mm(left, right, out_dtype=total.dtype, out=total)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)


def targets_apart(hidden: Tensor, weight: Tensor, vocabulary: int, dtype: torch.dtype | None) -> bool:
    """Whether a head's gradient summed in ``dtype`` leaves what targets add to their own rows for the end.

    It holds nearly all of the gradient's norm. Where it comes last, the sum before it is rounded relative to what is small.
    """
    few = dtype is not None and dtype.itemsize < 4 and 4 * hidden.shape[0] <= vocabulary
    return few and weight.requires_grad


def add_own(weight: Tensor, states: Tensor, targets: Tensor, own: Tensor, numbers: int = 1 << 23) -> None:
    """weight[y] += the sum of own * states over the positions whose target is y: summed in the dtype of own, rounded once.

    weight [V, d]; states [N, d], targets [N] and own [N] of the positions; so many of the [N, d] products exist at one time.
    """
    count, width = states.shape
    if not count:
        return
    numbered = torch.arange(count, device=targets.device)
    first = numbered.new_full(weight.shape[:1], count).scatter_reduce_(0, targets, numbered, "amin")[targets]
    for start in range(0, width, max(numbers // count, 1)):
        columns = slice(start, start + max(numbers // count, 1))
        rows = weight[:, columns].index_select(0, targets).to(own.dtype)
        parts = own.unsqueeze(1) * states[:, columns]
        # both add in the order of the positions; on CUDA index_add_ would not
        rows.index_put_((first,), parts, accumulate=True) if rows.is_cuda else rows.index_add_(0, first, parts)
        # a target that repeats is written more than once, always with its first position's row
        weight[:, columns].index_copy_(0, targets, rows.index_select(0, first).to(weight.dtype))


class Gradients:
    """Gradients of the student's side, filled chunk by chunk; a part nobody asked for is never allocated.

    ``dtype`` is the type of the sums over chunks of bias and, unless ``weight_dtype`` says another, weight. Where ``targets``
    [N] are given, what each adds to its own row of the weight stays out of those sums; ``all`` adds it up in ``dtype``.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needs: list[bool],
        dtype: torch.dtype,
        weight_dtype: torch.dtype | None = None,
        targets: Tensor | None = None,
    ) -> None:
        # float16 cannot hold a gradient already divided by the window's tokens; bfloat16 and float32 can.
        self.product_dtype = dtype if hidden.dtype == torch.float16 else hidden.dtype
        self.hidden = torch.empty_like(hidden, dtype=self.product_dtype) if needs[0] else None
        self.weight = torch.empty_like(weight, dtype=weight_dtype or dtype) if needs[1] else None
        self.bias = torch.zeros_like(bias, dtype=dtype) if needs[2] and bias is not None else None
        self._first, self._states = True, hidden.detach()
        self._apart: tuple[Tensor, Tensor] | None = None  # targets, and dL/dlogit of each position's own
        if needs[1] and targets is not None:
            self._apart = (targets, hidden.new_empty(len(hidden), dtype=dtype))
        if self.weight is not None and not hidden.shape[0]:
            self.weight.zero_()

    def add(self, rows: slice, grad_logits: Tensor, hidden: Tensor, head: Head, own: Tensor | None = None) -> None:
        """Add a chunk: ``grad_logits`` [n, V] of ``hidden`` [n, d]; the former may be written to.

        ``own`` [n] is dL/dlogit of the targets where it is known better than ``grad_logits`` holds it.
        """
        vocabulary = grad_logits.shape[1]
        grad = grad_logits.to(self.product_dtype)
        if self.hidden is not None:
            torch.mm(grad, head.weight.to(self.product_dtype), out=self.hidden[rows])
        if self.bias is not None:
            self.bias[:vocabulary] += grad_logits.sum(dim=0, dtype=self.bias.dtype)
        if self.weight is not None:
            if self._first:
                self.weight[vocabulary:].zero_()
            if self._apart is not None:
                targets, owns = self._apart
                column = targets[rows].unsqueeze(1)
                owns[rows] = grad_logits.gather(1, column).squeeze(1) if own is None else own
                grad.scatter_(1, column, 0.0)
            _add_product(self.weight[:vocabulary], grad.T, hidden.to(self.product_dtype), self._first)
        self._first = False

    def all(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Of hidden states, weight and bias; None for what nobody asked for."""
        if self.weight is not None and self._apart is not None:
            add_own(self.weight, self._states, *self._apart)
        return self.hidden, self.weight, self.bias
