"""StreamingEntropy of the teacher's positions in Triton: logits are read once, block by block of a row.

It runs where `losses.fused_head_triton` does. Legend: n positions of a chunk, N of all, V vocabulary.
"""

# mypy: allow-untyped-defs

import torch
from torch import Tensor

from grace_plugin.losses.math_triton import blocks, triton

__all__ = ["StreamingEntropy"]

if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.math_triton import capped, finite_or_zero, load_logits

    @triton.jit
    def _entropy_parts(
        logits,
        targets,
        at_target,
        parts,
        N,
        stride,
        per_t,
        cap,
        V: tl.constexpr,
        MASSES: tl.constexpr,
        CAPPED: tl.constexpr,
        BLOCK: tl.constexpr,
        SLICES: tl.constexpr,
    ):
        """Of one block of a row: its largest z, and the sums of e = exp(z - top), of e (z - top), of z that are not cut, and,
        over v != y, of exp((z - top) / T)."""
        row = tl.program_id(0).to(tl.int64)
        first = tl.program_id(1) * BLOCK
        column = first + tl.arange(0, BLOCK)
        z = load_logits(logits + row * stride + column, column < V, cap, CAPPED)
        top = tl.max(z, 0)
        shifted = z - finite_or_zero(top)
        e = tl.exp(shifted)
        place = parts + row * SLICES + tl.program_id(1)
        size = N * SLICES
        tl.store(place, top)
        tl.store(place + size, tl.sum(e, 0))
        # where: e is 0 for ids that are cut, whose shifted logit is -inf
        tl.store(place + 2 * size, tl.sum(tl.where(e > 0.0, e * shifted, 0.0), 0))
        tl.store(place + 3 * size, tl.sum(tl.where(z > float("-inf"), 1.0, 0.0), 0))
        if MASSES:
            y = tl.load(targets + row)
            tl.store(place + 4 * size, tl.sum(tl.where(column != y, tl.exp(shifted * per_t), 0.0), 0))
            if (y >= first) & (y < first + BLOCK):
                tl.store(at_target + row, capped(tl.load(logits + row * stride + y).to(tl.float32), cap, CAPPED))


class StreamingEntropy:
    """Entropies of rows of logits that come chunk by chunk; keeps 20 bytes for each block of a row until `finalize`.

    Args:
        positions: N.
        vocabulary: V.
        device: of the logits.
        cap: c of capped logits, or None.
        targets: [N] int64; None leaves the log-sum-exp out.
        temperature: of the log-sum-exp.
    """

    def __init__(
        self,
        positions: int,
        vocabulary: int,
        device: torch.device,
        cap: float | None = None,
        targets: Tensor | None = None,
        temperature: float = 1.0,
    ) -> None:
        self._shape, self._cap, self._targets, self._temperature = blocks(vocabulary), cap, targets, temperature
        self._parts = torch.empty(5, positions, self._shape["SLICES"], dtype=torch.float32, device=device)
        self._logsumexp = torch.empty(2, positions, dtype=torch.float32, device=device)

    def update(self, logits: Tensor, start: int) -> None:
        """Read the logits [n, V] of the positions from `start` on."""
        n = logits.shape[0]
        if not n:
            return
        targets = logits if self._targets is None else self._targets[start:]
        with torch.cuda.device_of(logits):  # Triton starts kernels on the current device
            outputs = self._logsumexp[1, start:], self._parts[0, start:]
            numbers = self._parts.shape[1], logits.stride(0), 1.0 / self._temperature, self._cap or 1.0
            flags = {"MASSES": self._targets is not None, "CAPPED": self._cap is not None}
            _entropy_parts[(n, self._shape["SLICES"])](logits, targets, *outputs, *numbers, **flags, **self._shape)

    def finalize(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return entropy at temperature 1 in nats [N] and number of ids that are not cut [N], float32.

        With targets also [2, N]: the log of the sum of exp(z / temperature) over v != y, and the capped logit of y.
        """
        tops, masses, moments, ids, others = self._parts.unbind()
        top = tops.amax(dim=1, keepdim=True)
        # a block of nothing but -inf has top -inf: its shrink is 0, and 0 * below would be NaN
        below = tops - top
        shrink = below.exp()
        mass = (masses * shrink).sum(dim=1)
        moment = (shrink * (moments + torch.where(masses > 0, masses * below, 0.0))).sum(dim=1)
        entropy, count = mass.log() - moment / mass, ids.sum(dim=1)
        if self._targets is None:
            return entropy, count, None
        self._logsumexp[0] = (
            top.squeeze(1) / self._temperature + (others * (below / self._temperature).exp()).sum(dim=1).log()
        )
        return entropy, count, self._logsumexp
