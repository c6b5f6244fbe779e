"""Distributions of two models at supervised positions: KL(A || B), agreement and right tokens.

    KL(A || B) = sum over the vocabulary of P_A (log P_A - log P_B)        nats per position, temperature 1

Legend: N positions, V vocabulary, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses.distill import full_precision
from grace_plugin.losses.fused_head_chunks import Head, cut, positions_per_chunk


class TokenComparison(NamedTuple):
    """Values per position, in host memory.

    kl, nll_a, nll_b: float64 [N], in nats. top_a, top_b: int64 [N], the likeliest tokens of each model.
    """

    kl: Tensor
    nll_a: Tensor
    nll_b: Tensor
    top_a: Tensor
    top_b: Tensor


def head_of(model: Any, vocabulary: int) -> Head:
    """Return the output head of a model in float32, cut to `vocabulary` ids."""
    head = model.get_output_embeddings()
    like = torch.empty(0, head.weight.shape[1], dtype=torch.float32, device=head.weight.device)
    return cut(like, head.weight.detach(), getattr(head, "bias", None), vocabulary)


@torch.no_grad()
def compare_tokens(final_a: Tensor, head_a: Head, final_b: Tensor, head_b: Head, targets: Tensor) -> TokenComparison:
    """Compare final (normed) hidden states [N, d] of two models at positions whose next tokens are `targets` (int64 [N]).

    Logits are formed chunk by chunk, in float32.
    """
    chunk = positions_per_chunk(head_a.weight.shape[0], 4)
    parts: list[tuple[Tensor, ...]] = []
    with full_precision(final_a):
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            # Not the models' own BF16 logits: their rounding alone is as large as a small KL.
            log_a = torch.log_softmax(head_a.logits(final_a[rows].float()), dim=1)
            log_b = torch.log_softmax(head_b.logits(final_b[rows].float()), dim=1)
            column = targets[rows].unsqueeze(1)
            nll = [-log.gather(1, column).squeeze(1).double() for log in (log_a, log_b)]
            tops = log_a.argmax(dim=1), log_b.argmax(dim=1)
            # In place, so that at most three matrices of the chunk's size exist; both log-probabilities are used up by it.
            log_b.sub_(log_a).mul_(log_a.exp_())
            parts.append((-log_b.sum(dim=1, dtype=torch.float64), *nll, *tops))
    if not parts:
        none, ids = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        return TokenComparison(none, none, none, ids, ids)
    kl, nll_a, nll_b, top_a, top_b = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return TokenComparison(kl.clamp_(min=0.0), nll_a, nll_b, top_a, top_b)
