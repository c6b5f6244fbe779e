"""RCKA of a batch of images, forward and backward, next to one copy of its inputs."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.speed.timing import extra_gib, graphed, median_ms
from grace_plugin.losses import relational_loss

__all__ = ["relation"]


def relation(images: int, tokens: int, student: int, teacher: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Milliseconds and GiB, and the error of value and gradient against float64."""
    hidden_s = torch.randn(images * tokens, student, device=device).to(dtype).requires_grad_()
    hidden_t = torch.randn(images * tokens, teacher, device=device).to(dtype)
    sizes = [tokens] * images

    def ours(source: torch.Tensor, other: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss = relational_loss(source, other, sizes).loss_sum
        return loss.detach(), torch.autograd.grad(loss, source)[0]

    exact = ours(hidden_s.detach().double().requires_grad_(), hidden_t.double())
    found = ours(hidden_s, hidden_t)
    return {
        "ours_ms": median_ms(lambda: ours(hidden_s, hidden_t)),
        "ours_without_host_ms": median_ms(graphed(lambda: ours(hidden_s, hidden_t))),
        "ours_gib": extra_gib(lambda: ours(hidden_s, hidden_t)),
        "copy_ms": median_ms(lambda: (hidden_s.detach().clone(), hidden_t.clone())),
        "error_value": float((found[0].double() - exact[0]).abs() / exact[0]),
        "error_gradient": float((found[1].double() - exact[1]).norm() / exact[1].norm()),
    }
