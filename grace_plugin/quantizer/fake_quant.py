"""Fake quantization with learned group scales: the stored weight in the forward pass, a gradient in the backward pass.

LSQ (arXiv 1902.08153) with scales in the log domain. With s = exp(theta) rounded to the stored dtype and v = w / s,

    codes     q = clip(round(v), q_min, q_max)                    round half to even, division in float32
    forward   w^ = q * s                                          product rounded to the stored dtype
    backward  dL/dw     = dL/dw^ where the clip does not act, 0 where it does
              dL/ds     = sum over the group of dL/dw^ * (q - v) where it does not act, dL/dw^ * q where it does
              dL/dtheta = s * dL/ds

"The clip acts" means round(v) lies outside [q_min, q_max]. The forward value is, bit for bit, what compressed-tensors
unpacks from the saved codes and scales.

Nothing of the weight's size is kept for backward but the weight itself: codes are computed again, in blocks of rows, or in one
kernel where Triton runs. A :class:`WeightCache` holds the quantized weight from one optimizer step to the next, since all
micro-batches and the recomputation of activation checkpointing see the same weights. The backward is linear in dL/dw^ while
weight and scale do not change, so it can also wait for the sum over micro-batches (``defer_grads``).

Legend: weight [out, in]; log_scale theta [out, groups]; a group is in / groups neighbours of a row.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

from grace_plugin.quantizer import fake_quant_triton
from grace_plugin.quantizer.format import QuantFormat
from grace_plugin.quantizer.scales import (
    check_fit,
    check_shapes,
    compute_dtype,
    forward_dtype,
    holds,
    row_blocks,
    stored_scale,
)

Grads = tuple[Tensor | None, Tensor | None]
"""Gradients of weight [out, in] and log_scale [out, groups]; None for one that is not needed."""


class StepCounter:
    """Count the steps of every torch optimizer of the process between ``start`` and ``stop``.

    Optimizers that write through ``.data``, and engines that swap storage, leave the version of a parameter as it was.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._handle: Any = None

    def start(self) -> None:
        """Begin to count; a second start changes nothing."""
        # one hook for all optimizers of the process: a run may use several, and a wrapper (Accelerate) hides the inner one
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(lambda *_: self.advance())

    def stop(self) -> None:
        """Remove the hook; a second stop changes nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def advance(self) -> None:
        """Say that weights may have changed."""
        self.steps += 1


class WeightCache:
    """The last quantized weight of one layer, valid while version counters, storage, dtype and step counter do not change.

    It holds one weight in compute dtype. Switch it off (``attach(..., cache=False)``) under sharding that gathers weights layer
    by layer, where it would hold the gathered model.

    Args:
        counter: counts what versions of tensors do not show.
        fill_group: called first on a miss, with the compute dtype; it may `put` values into this and other caches.

    Attributes:
        quantizations: how often the value was computed.
    """

    def __init__(
        self, counter: StepCounter | None = None, fill_group: Callable[[torch.dtype], None] | None = None
    ) -> None:
        self.quantizations = 0
        self._counter, self._fill_group = counter, fill_group
        self._entry: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    def get(
        self,
        weight: Tensor,
        log_scale: Tensor,
        dtype: torch.dtype,
        compute: Callable[[], tuple[Tensor, Tensor]],
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Return value and scales for these inputs, computed when anything has changed.

        Args:
            weight: [out, in].
            log_scale: [out, groups].
            dtype: of the value.
            compute: makes value and scales.
            others: further tensors that the value depends on.
        """
        key = self._key((weight, log_scale, *others), dtype)
        if not self._valid(key):
            # freed before the new value is made, so that never two weights of a layer exist
            self._entry = None
            if self._fill_group is not None:
                self._fill_group(dtype)
            # the group does not take every layer: a lone one, an unaligned one, or one that computes in another dtype
            if not self._valid(key):
                self._store(key, compute())
        assert self._entry is not None
        value, scale = self._entry[1]
        return value.detach(), scale  # a new tensor object, so that no caller's autograd history reaches the next one

    def stale(self, weight: Tensor, log_scale: Tensor, dtype: torch.dtype) -> bool:
        """Return whether `get` would compute; a value that is not valid any more is freed."""
        if self._valid(self._key((weight, log_scale), dtype)):
            return False
        self._entry = None
        return True

    def put(self, weight: Tensor, log_scale: Tensor, dtype: torch.dtype, made: tuple[Tensor, Tensor]) -> None:
        """Store value and scales that were computed elsewhere from these inputs as they are now."""
        self._store(self._key((weight, log_scale), dtype), made)

    def drop(self) -> None:
        """Free the value; the next call computes it."""
        self._entry = None

    def _key(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[object, ...]:
        # data_ptr as well as the version: an engine that swaps storage (offloading, `.data =`) leaves the version as it was
        steps = None if self._counter is None else self._counter.steps
        return steps, dtype, *[(t._version, t.data_ptr(), t.dtype, t.device, t.shape) for t in inputs]

    def _valid(self, key: tuple[object, ...]) -> bool:
        return self._entry is not None and self._entry[0] == key

    def _store(self, key: tuple[object, ...], made: tuple[Tensor, Tensor]) -> None:
        self._entry = (key, made)
        self.quantizations += 1

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        """Give a copied layer an empty cache with the same counter; the first model's group does not fill it."""
        return WeightCache(self._counter)


class SavedWeights:
    """Tensors of a backward pass kept outside `save_for_backward`, refused once one of them was written to.

    Hooks on saved tensors (activation checkpointing, offloading) take microseconds for each tensor and would move weights to
    the host and back; weights outlive the graph anyway, so they need none.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._tensors, self._versions = tensors, [tensor._version for tensor in tensors]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors.

        Raises:
            RuntimeError: one of them was written to since.
        """
        # as torch does for its own saved tensors, which these are not
        if self._versions != [tensor._version for tensor in self._tensors]:
            raise RuntimeError(
                "a weight or what it is quantized with was modified by an inplace operation between forward and backward; "
                "step the optimizer after the backward pass"
            )
        return self._tensors


def _quotient(weight: Tensor, scale: Tensor) -> Tensor:
    """v = w / s [rows, groups, group_size]: the one division that forward, backward and export share."""
    # in float32, as upstream divides when it saves: a quotient rounded to bfloat16 would lie on ties that are none
    return weight.to(compute_dtype(weight)).unflatten(1, (scale.shape[1], -1)) / scale.unsqueeze(2)


@torch.no_grad()
def codes(weight: Tensor, log_scale: Tensor, fmt: QuantFormat) -> Tensor:
    """Return the integers that the checkpoint holds.

    Args:
        weight: [out, in], any floating type.
        log_scale: theta [out, groups].
        fmt: the format; the number of groups is read from ``log_scale``.

    Returns:
        int8 [out, in], within ``fmt.code_range``.

    Raises:
        ValueError: a format that cannot be learned, or scales that do not fit.
    """
    smallest, largest = fmt.code_range
    check_shapes(weight, log_scale)
    # the scale that the checkpoint will hold, not exp(theta): otherwise codes would be those of another scale
    scale = stored_scale(log_scale, fmt.stored_dtype)
    found = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for rows in row_blocks(*weight.shape):
        rounded = fmt.quantizer.round(_quotient(weight[rows], scale[rows]))
        found[rows] = rounded.clamp_(smallest, largest).flatten(1)
    return found


@torch.no_grad()
def dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """Return code * scale [out, in] rounded to the scale's dtype: compressed-tensors' own product.

    Args:
        codes: int8 [out, in].
        scale: [out, groups] in the stored dtype.

    Raises:
        ValueError: scales that do not fit.
    """
    check_shapes(codes, scale)
    # int8 times the stored dtype gives that dtype, with the one rounding that upstream makes when it loads
    return (codes.unflatten(1, (scale.shape[1], -1)) * scale.unsqueeze(2)).flatten(1)


@torch.no_grad()
def clipped(weight: Tensor, log_scale: Tensor, fmt: QuantFormat) -> Tensor:
    """Return how many weights the clip acts on: 0-dimensional int64 on the weight's device."""
    smallest, largest = fmt.code_range
    scale = stored_scale(log_scale, fmt.stored_dtype)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    for rows in row_blocks(*weight.shape):
        rounded = fmt.quantizer.round(_quotient(weight[rows], scale[rows]))
        count += ((rounded < smallest) | (rounded > largest)).sum()
    return count


def quantized(weight: Tensor, log_scale: Tensor, fmt: QuantFormat, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return w^ [out, in] in ``out_dtype`` and the stored scales [out, groups]."""
    if fake_quant_triton.usable(weight, fmt):
        return fake_quant_triton.forward(weight, log_scale, fmt, out_dtype)
    scale = stored_scale(log_scale, fmt.stored_dtype)
    return dequantize(codes(weight, log_scale, fmt), scale).to(out_dtype), scale


def gradients(
    weight: Tensor,
    scale: Tensor,
    grad_out: Tensor,
    fmt: QuantFormat,
    needs: tuple[bool, bool],
    into: Tensor | None = None,
) -> Grads:
    """Return the gradients that are needed from dL/dw^; the weight's is written into ``into``, which may be ``grad_out``."""
    grad_weight = into if into is not None or not needs[0] else torch.empty_like(weight)
    grad_log_scale = torch.empty(scale.shape, dtype=compute_dtype(weight), device=scale.device) if needs[1] else None
    if fake_quant_triton.usable(weight, fmt):
        fake_quant_triton.backward(weight, scale, grad_out.contiguous(), fmt, grad_weight, grad_log_scale)
    else:
        _backward_in_torch(weight, scale, grad_out, fmt, grad_weight, grad_log_scale)
    return grad_weight, grad_log_scale


def _backward_in_torch(
    weight: Tensor,
    scale: Tensor,
    grad_out: Tensor,
    fmt: QuantFormat,
    grad_weight: Tensor | None,
    grad_log_scale: Tensor | None,
) -> None:
    """Fill the gradients that are not None, in blocks of rows; ``grad_weight`` may be ``grad_out``."""
    smallest, largest = fmt.code_range
    for rows in row_blocks(*weight.shape):
        quotient = _quotient(weight[rows], scale[rows])
        rounded = fmt.quantizer.round(quotient)
        # of the rounded quotient, not of the quotient: 7.4 is rounded to 7, which is not clipped
        inside = (rounded >= smallest) & (rounded <= largest)
        grad = grad_out[rows].unflatten(1, (scale.shape[1], -1))
        if grad_log_scale is not None:
            # q - v inside the range (what rounding did), q outside of it, where v has no influence on the value
            step = rounded.clamp_(smallest, largest).sub_(torch.where(inside, quotient, 0.0))
            grad_log_scale[rows] = (grad * step).sum(dim=2) * scale[rows]
        if grad_weight is not None:
            grad_weight[rows] = torch.where(inside, grad, 0.0).flatten(1)


class FakeQuantSpec(NamedTuple):
    """What one call quantizes a weight to, in which dtype, from which cache, and when its gradients are formed."""

    fmt: QuantFormat
    out_dtype: torch.dtype
    cache: WeightCache | None
    defer_grads: bool

    def value(self, weight: Tensor, log_scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return w^ [out, in] and the stored scales [out, groups], from the cache when there is one."""

        def compute() -> tuple[Tensor, Tensor]:
            return quantized(weight, log_scale, self.fmt, self.out_dtype)

        return compute() if self.cache is None else self.cache.get(weight, log_scale, self.out_dtype, compute)

    def gradients(
        self, weight: Tensor, log_scale: Tensor, scale: Tensor, grad_value: Tensor, needs: tuple[bool, bool]
    ) -> Grads:
        """Return the gradients of weight and log_scale; deferred, what `finalize_deferred_grads` will make them from."""
        if self.defer_grads:
            # DDP waits for a gradient of every parameter; elsewhere `finalize_deferred_grads` needs none of the scale
            shared = dist.is_available() and dist.is_initialized()
            return grad_value, torch.zeros_like(log_scale) if shared else None
        return gradients(weight, scale, grad_value, self.fmt, needs)


def make_spec(
    weight: Tensor, log_scale: Tensor, fmt: QuantFormat, cache: WeightCache | None, defer_grads: bool = False
) -> FakeQuantSpec:
    """Check the arguments of one call and return its spec.

    Raises:
        ValueError: a format that cannot be learned, scales that do not fit, or a compute dtype that would round w^.
    """
    check_fit(weight.shape, log_scale.shape, fmt)
    out_dtype = forward_dtype(weight)
    # float16 weights in a bfloat16 forward pass, say, would be rounded once more than in the checkpoint
    if not holds(out_dtype, fmt.stored_dtype):
        raise ValueError(
            f"the layer computes in {out_dtype}, which cannot hold weights stored as {fmt.stored_dtype}: training would "
            f"not see what is shipped; train in {fmt.stored_dtype} or float32, or store as {out_dtype}"
        )
    return FakeQuantSpec(fmt, out_dtype, cache, defer_grads)


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, log_scale: Tensor, spec: FakeQuantSpec) -> Tensor:
        value, scale = spec.value(weight, log_scale)
        ctx.saved_weights, ctx.spec = SavedWeights(weight, log_scale, scale), spec
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.spec.gradients(*ctx.saved_weights.tensors(), grad_out, ctx.needs_input_grad[:2]), None)


def fake_quantize(
    weight: Tensor,
    log_scale: Tensor,
    fmt: QuantFormat,
    *,
    cache: WeightCache | None = None,
    defer_grads: bool = False,
) -> Tensor:
    """Return w^ [out, in], the weight as the checkpoint will hold it, differentiable by weight and log_scale.

    Args:
        weight: [out, in], float32 or bfloat16 (float64 in tests).
        log_scale: theta [out, groups], float32.
        fmt: the format.
        cache: reuse of the value while neither weight nor scale has changed.
        defer_grads: give the weight dL/dw^ as its gradient and the scale none (zeros under DDP), until
            `grouped.finalize_deferred_grads` is called on both; they must be leaves that both want a gradient.

    Returns:
        w^ in the compute dtype (autocast's when on, else the weight's); equal to ``dequantize(codes(...), ...)``.

    Raises:
        ValueError: as :func:`make_spec`.
    """
    value: Tensor = _FakeQuantize.apply(weight, log_scale, make_spec(weight, log_scale, fmt, cache, defer_grads))
    return value
