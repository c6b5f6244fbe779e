"""One quantization per optimizer step: the quantized weight is kept while weight and scale stand still.

What it does. Micro-batches of one accumulation window, and the recomputation of activation checkpointing, all see the
same weights; the fake-quantized weight is computed for the first of them and handed to the others.

What it refuses. To guess: the value is reused only when version counters, storage, dtype and the step counter are all
those it was computed for. The step counter is needed because optimizers that write through ``.data`` and engines that
swap storage leave a parameter's version untouched; ``StepCounter`` counts every step of every torch optimizer.

The first cache to miss may have those of other layers filled in the same launch (``together``), which an optimizer step may
also start ahead of the next forward pass.

What it costs. One weight in compute dtype per layer (2 bytes a weight in bfloat16), which the layer's own backward
holds anyway. Under sharding that gathers weights per layer (FSDP, ZeRO-3) it would hold the gathered model: switch it
off there (``attach(..., cache=False)``).
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook


class StepCounter:
    """Counts the steps of every torch optimizer of the process between ``start`` and ``stop``."""

    def __init__(self) -> None:
        self.steps = 0
        self._handle: Any = None

    def start(self) -> None:
        """Begin to count; a second start changes nothing."""
        if self._handle is None:
            self._handle = register_optimizer_step_post_hook(lambda *_: self.advance())

    def stop(self) -> None:
        """Leave torch's hooks; a second stop changes nothing."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def advance(self) -> None:
        """Say that weights may have moved."""
        self.steps += 1


class WeightCache:
    """The last quantized weight of one layer and what it was computed from.

    counter: counts what versions do not show. together: called first on a miss, with the compute dtype; it may `put` values
    into this and other caches.

    Attributes:
        quantizations: how often the value had to be computed.
    """

    def __init__(
        self, counter: StepCounter | None = None, together: Callable[[torch.dtype], None] | None = None
    ) -> None:
        self.quantizations = 0
        self._counter, self._together = counter, together
        self._kept: tuple[tuple[object, ...], tuple[Tensor, Tensor]] | None = None

    def get(
        self,
        weight: Tensor,
        log_scale: Tensor,
        dtype: torch.dtype,
        compute: Callable[[], tuple[Tensor, Tensor]],
        *others: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Value and scales for these inputs: new tensor objects over the kept storage, computed when anything has changed.

        others: further tensors that the value depends on.
        """
        key = self._key((weight, log_scale, *others), dtype)
        if not self._holds(key):
            self._kept = None
            if self._together is not None:
                self._together(dtype)
            if not self._holds(key):
                self._keep(key, compute())
        assert self._kept is not None
        value, scale = self._kept[1]
        return value.detach(), scale

    def stale(self, weight: Tensor, log_scale: Tensor, dtype: torch.dtype) -> bool:
        """Whether `get` would compute; what is kept for nothing is then freed."""
        if self._holds(self._key((weight, log_scale), dtype)):
            return False
        self._kept = None
        return True

    def put(self, weight: Tensor, log_scale: Tensor, dtype: torch.dtype, made: tuple[Tensor, Tensor]) -> None:
        """Keep value and scales that were computed elsewhere from these inputs as they are now."""
        self._keep(self._key((weight, log_scale), dtype), made)

    def _key(self, inputs: tuple[Tensor, ...], dtype: torch.dtype) -> tuple[object, ...]:
        """What a value depends on."""
        steps = None if self._counter is None else self._counter.steps
        return steps, dtype, *[(t._version, t.data_ptr(), t.dtype, t.device, t.shape) for t in inputs]

    def _holds(self, key: tuple[object, ...]) -> bool:
        return self._kept is not None and self._kept[0] == key

    def _keep(self, key: tuple[object, ...], made: tuple[Tensor, Tensor]) -> None:
        self._kept = (key, made)
        self.quantizations += 1

    def drop(self) -> None:
        """Free what is kept; the next call computes it."""
        self._kept = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "WeightCache":
        """A copied layer starts with an empty cache that listens to the same counter, and is filled by itself."""
        return WeightCache(self._counter)
