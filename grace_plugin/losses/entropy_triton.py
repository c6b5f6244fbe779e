"""Entropies of the teacher's positions in Triton: logits are read once, block by block of a row.

Legend: n positions of a chunk, V vocabulary. What it refuses and when it runs: as `losses.head_triton`.
"""

import torch
from torch import Tensor

from grace_plugin.losses.math_triton import blocks, triton

__all__ = ["entropies"]

if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.math_triton import capped, finite_or_zero, load_logits

    @triton.jit
    def _entropy_parts(  # type: ignore[no-untyped-def]
        logits, targets, at_target, parts, n, stride, per_t, cap,
        V: tl.constexpr, MASSES: tl.constexpr, CAPPED: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr,
    ):  # fmt: skip
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
        size = n * SLICES
        tl.store(place, top)
        tl.store(place + size, tl.sum(e, 0))
        tl.store(place + 2 * size, tl.sum(tl.where(e > 0.0, e * shifted, 0.0), 0))
        tl.store(place + 3 * size, tl.sum(tl.where(z > float("-inf"), 1.0, 0.0), 0))
        if MASSES:
            y = tl.load(targets + row)
            tl.store(place + 4 * size, tl.sum(tl.where(column != y, tl.exp(shifted * per_t), 0.0), 0))
            if (y >= first) & (y < first + BLOCK):
                tl.store(at_target + row, capped(tl.load(logits + row * stride + y).to(tl.float32), cap, CAPPED))


def entropies(
    logits: Tensor, cap: float | None = None, targets: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Entropy at temperature 1 in nats [n] and number of ids that are not cut [n], float32, from logits [n, V].

    With targets [n] also [2, n]: the log of the sum of exp(z / temperature) over v != y, and the capped logit of y.
    """
    n, vocabulary = logits.shape
    shape, masses_too = blocks(vocabulary), targets is not None
    parts = torch.empty(5, n, shape["SLICES"], dtype=torch.float32, device=logits.device)
    known = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    if n:
        with torch.cuda.device_of(logits):  # Triton starts kernels on the current device
            _entropy_parts[(n, shape["SLICES"])](
                logits, logits if targets is None else targets, known[1], parts, n, logits.stride(0), 1.0 / temperature,
                cap or 1.0, MASSES=masses_too, CAPPED=cap is not None, **shape,
            )  # fmt: skip
    tops, masses, moments, ids, others = parts.unbind()
    top = tops.amax(dim=1, keepdim=True)
    below = tops - top
    shrink = below.exp()
    mass = (masses * shrink).sum(dim=1)
    moment = (shrink * (moments + torch.where(masses > 0, masses * below, 0.0))).sum(dim=1)
    if masses_too:
        known[0] = top.squeeze(1) / temperature + (others * (below / temperature).exp()).sum(dim=1).log()
    return mass.log() - moment / mass, ids.sum(dim=1), known if masses_too else None
