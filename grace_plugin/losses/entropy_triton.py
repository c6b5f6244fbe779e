"""Entropies of the teacher's positions in Triton: logits are read once, block by block of a row.

Legend: n positions of a chunk, V vocabulary. What it refuses and when it runs: as `losses.head_triton`.
"""

import torch
from torch import Tensor

from grace_plugin.losses.head_triton import blocks, triton

__all__ = ["entropies"]

if triton is not None:
    import triton.language as tl

    from grace_plugin.losses.head_triton import finite_or_zero

    @triton.jit
    def _entropy_parts(logits, parts, n, stride, V: tl.constexpr, BLOCK: tl.constexpr, SLICES: tl.constexpr):  # type: ignore[no-untyped-def]
        """Of one block of a row: its largest z, and the sums of e = exp(z - top), of e (z - top), and of z that are not cut."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        z = tl.load(logits + row * stride + column, mask=column < V, other=float("-inf")).to(tl.float32)
        top = tl.max(z, 0)
        shifted = z - finite_or_zero(top)
        e = tl.exp(shifted)
        place = parts + row * SLICES + tl.program_id(1)
        size = n * SLICES
        tl.store(place, top)
        tl.store(place + size, tl.sum(e, 0))
        tl.store(place + 2 * size, tl.sum(tl.where(e > 0.0, e * shifted, 0.0), 0))
        tl.store(place + 3 * size, tl.sum(tl.where(z > float("-inf"), 1.0, 0.0), 0))


def entropies(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy at temperature 1 in nats [n] and number of ids that are not cut [n], float32, from logits [n, V]."""
    n, vocabulary = logits.shape
    shape = blocks(vocabulary)
    parts = torch.empty(4, n, shape["SLICES"], dtype=torch.float32, device=logits.device)
    if n:
        _entropy_parts[(n, shape["SLICES"])](logits, parts, n, logits.stride(0), **shape)
    tops, masses, moments, ids = parts.unbind()
    below = tops - tops.amax(dim=1, keepdim=True)
    shrink = below.exp()
    mass = (masses * shrink).sum(dim=1)
    moment = (shrink * (moments + torch.where(masses > 0, masses * below, 0.0))).sum(dim=1)
    return mass.log() - moment / mass, ids.sum(dim=1)
