"""Two models' distributions at supervised positions: KL(A || B), agreement and right tokens, without logits of a batch.

    KL(A || B) = sum over the vocabulary of P_A (log P_A - log P_B)        nats per position, temperature 1

Hidden states are multiplied with each model's own head in float32 (the BF16 logits that a server forms carry rounding of the
size of a small KL), cut to the ids the tokenizer defines, by chunks of positions.

Legend: N positions, V vocabulary, d width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from grace_plugin.losses.chunks import positions_per_chunk
from grace_plugin.losses.precision import full_precision
from grace_plugin.losses.projection import Head, cut

__all__ = ["Tokens", "compare_tokens", "head_of"]


class Tokens(NamedTuple):
    """Per position, on the host: kl, nll_a, nll_b float64 [N] (nats); top_a, top_b int64 [N], the likeliest tokens."""

    kl: Tensor
    nll_a: Tensor
    nll_b: Tensor
    top_a: Tensor
    top_b: Tensor


def head_of(model: Any, vocabulary: int) -> Head:
    """The output head of a model in float32, cut to `vocabulary` ids."""
    head = model.get_output_embeddings()
    like = torch.empty(0, head.weight.shape[1], dtype=torch.float32, device=head.weight.device)
    return cut(like, head.weight.detach(), getattr(head, "bias", None), vocabulary)


@torch.no_grad()
def compare_tokens(final_a: Tensor, head_a: Head, final_b: Tensor, head_b: Head, targets: Tensor) -> Tokens:
    """Compare two models' final (normed) hidden states [N, d] at positions whose next tokens are `targets` (int64 [N])."""
    chunk = positions_per_chunk(head_a.weight.shape[0], 4)
    parts: list[tuple[Tensor, ...]] = []
    with full_precision(final_a):
        for start in range(0, len(targets), chunk):
            rows = slice(start, start + chunk)
            log_a = torch.log_softmax(head_a.logits(final_a[rows].float()), dim=1)
            log_b = torch.log_softmax(head_b.logits(final_b[rows].float()), dim=1)
            column = targets[rows].unsqueeze(1)
            nll = [-log.gather(1, column).squeeze(1).double() for log in (log_a, log_b)]
            tops = log_a.argmax(dim=1), log_b.argmax(dim=1)
            log_b.sub_(log_a).mul_(
                log_a.exp_()
            )  # the chunk's two matrices, and a third of exponents, are all that exists
            parts.append((-log_b.sum(dim=1, dtype=torch.float64), *nll, *tops))
    if not parts:
        none, ids = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        return Tokens(none, none, none, ids, ids)
    kl, nll_a, nll_b, top_a, top_b = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return Tokens(kl.clamp_(min=0.0), nll_a, nll_b, top_a, top_b)
