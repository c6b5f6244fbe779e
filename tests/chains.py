"""Models whose next token depends on the last one alone, as a test says: what they answer is known without running them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["speak"]


@torch.no_grad()
def speak(model: Any, follows: Mapping[int, int]) -> Any:
    """Make a Llama-like decoder predict `follows[token]` after each token, in place; returns the model in eval mode.

    No layer adds anything to its input, so the final state is the normed embedding of the token itself; the head's row of a
    token is the sum of the embeddings of those that it follows.
    """
    decoder, head = model.model.language_model, model.lm_head
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    generator = torch.Generator().manual_seed(0)
    table = decoder.embed_tokens.weight
    table.copy_(torch.randn(table.shape, generator=generator))
    decoder.norm.weight.fill_(1.0)
    head.weight.zero_()
    for token, following in follows.items():
        head.weight[following] += table[token] / table[token].norm()
    return model.eval()
