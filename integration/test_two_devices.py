"""One process, tensors on its second GPU: kernels run where their tensors are, not on the current device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace_plugin.losses import distillation_head, relational_loss, teacher_gates
from grace_plugin.quantizer import QuantFormat, attach

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]

TOKENS, IDS = 70, 5000


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def heads(student: str, teacher: str, sliced: bool) -> tuple[Tensor, ...]:
    """Loss and gradients of the two heads, each on its device, on the host in float32."""
    states, weight = drawn(TOKENS, 64, seed=0).to(student), (drawn(IDS, 64, seed=1) / 4).to(student)
    states_t, weight_t = drawn(TOKENS, 96, seed=2).to(teacher), (drawn(IDS, 96, seed=3) / 4).to(teacher)
    targets = torch.randint(IDS, (TOKENS,), generator=torch.Generator().manual_seed(4)).to(student)
    gate, _, sums = teacher_gates(states_t, weight_t, None, targets.to(teacher), vocabulary=IDS)
    leaves = [states.requires_grad_(), weight.requires_grad_()]
    out = distillation_head(
        states, weight, None, states_t, weight_t, None, targets, gate.to(student), vocabulary=IDS, ce_weight=1 / TOKENS,
        kd_weight=1 / TOKENS, teacher_logsumexp=sums if sliced else None,
    )  # fmt: skip
    out.loss.backward()
    return tuple(
        found.detach().float().cpu() for found in (out.loss, *(leaf.grad for leaf in leaves if leaf.grad is not None))
    )


@pytest.mark.parametrize("sliced", [True, False])
@pytest.mark.parametrize("devices", [("cuda:1", "cuda:1"), ("cuda:0", "cuda:1"), ("cuda:1", "cuda:0")])
def test_heads_on_any_devices_give_the_numbers_of_one(devices: tuple[str, str], sliced: bool) -> None:
    want, found = heads("cuda:0", "cuda:0", sliced), heads(*devices, sliced)
    assert torch.cuda.current_device() == 0
    assert len(found) == 3
    for mine, theirs in zip(found, want, strict=True):
        assert torch.equal(mine, theirs) and mine.any()


def relation(device: str) -> tuple[Tensor, Tensor]:
    student, teacher = drawn(48, 64, seed=5).to(device).requires_grad_(), drawn(48, 96, seed=6).to(device)
    found = relational_loss(student, teacher, [16, 16, 16])
    found.loss_sum.backward()
    assert student.grad is not None
    return found.loss_sum.detach().cpu(), student.grad.cpu()


def test_the_relation_on_the_second_device() -> None:
    for mine, theirs in zip(relation("cuda:1"), relation("cuda:0"), strict=True):
        assert torch.equal(mine, theirs) and mine.any()


def trained(device: str) -> list[Tensor]:
    """Gradients of two micro-batches through attached layers, quantized and settled together."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 128), nn.Linear(128, 32)).to(device)
    attached = attach({str(k): linear for k, linear in enumerate(model)}, QuantFormat(4, 32))
    attached.defer_grads()
    for seed in (7, 8):
        model(drawn(5, 64, seed=seed).float().to(device)).square().sum().backward()
    attached.finalize_deferred_grads()
    found: list[Any] = [parameter.grad for parameter in model.parameters()]
    return [grad.cpu() for grad in found]


def test_attached_layers_on_the_second_device() -> None:
    mine, theirs = trained("cuda:1"), trained("cuda:0")
    assert len(mine) == 9
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one, other) and one.any()
