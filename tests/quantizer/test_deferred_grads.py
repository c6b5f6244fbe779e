"""Gradients of many micro-batches are finalized once, to those of a backward pass each."""

import torch
from torch import nn

from grace_plugin.quantizer import QuantFormat, attach


def test_finalize__deferred_gradients__equal_immediate_ones():
    plain, late = (nn.Linear(64, 48, bias=False) for _ in range(2))
    late.load_state_dict(plain.state_dict())
    gradients = []
    for linear, defer in ((plain, False), (late, True)):
        attached = attach({"linear": linear}, QuantFormat(4, 32))
        attached.defer_grads(defer)
        with torch.no_grad():
            linear.weight_log_scale.sub_(0.7)  # many weights are clipped
        for seed in range(3):
            batch = torch.randn(5, 64, generator=torch.Generator().manual_seed(seed))
            linear(batch).square().sum().backward()
        if defer:
            assert linear.weight_log_scale.grad is None
            assert not torch.equal(linear.weight.grad, gradients[0][0])
        attached.finalize_deferred_grads()
        gradients.append((linear.weight.grad.clone(), linear.weight_log_scale.grad.clone()))
        linear.weight.grad.mul_(2.0)  # a clip, say: what is finalized is not formed again
        attached.finalize_deferred_grads()
        assert torch.equal(linear.weight.grad, 2.0 * gradients[-1][0])
        assert torch.equal(linear.weight_log_scale.grad, gradients[-1][1])
        attached.detach()
    for late_one, plain_one in zip(gradients[1], gradients[0], strict=True):
        torch.testing.assert_close(late_one, plain_one, rtol=1e-5, atol=1e-5 * plain_one.abs().max().item())
        assert torch.equal(late_one == 0, plain_one == 0)


def test_finalize__forward_without_grad_between__still_pending():
    linear = nn.Linear(64, 16, bias=False)
    attached = attach({"linear": linear}, QuantFormat(4, 32))
    attached.defer_grads()
    linear(torch.randn(3, 64)).sum().backward()
    assert linear.weight_log_scale.grad is None
    with torch.no_grad():
        linear(torch.randn(3, 64))
    attached.finalize_deferred_grads()
    assert linear.weight_log_scale.grad.any()
    linear.weight_log_scale.grad = None
    linear(torch.randn(3, 64)).sum().backward()  # the next window is deferred again
    assert linear.weight_log_scale.grad is None


def test_defer_grads__several_ranks__zero_scale_gradients(tmp_path):
    linear = nn.Linear(64, 16, bias=False)
    attached = attach({"linear": linear}, QuantFormat(4, 32))
    attached.defer_grads()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "s"), 1), rank=0, world_size=1
    )
    try:
        linear(torch.randn(3, 64)).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert linear.weight_log_scale.grad is not None and not linear.weight_log_scale.grad.any()
    attached.finalize_deferred_grads()
    assert linear.weight_log_scale.grad.any()


def test_defer_grads__frozen_weight_or_scale__not_deferred():
    linear = nn.Linear(64, 16, bias=False)
    attached = attach({"linear": linear}, QuantFormat(4, 32))
    attached.defer_grads()
    linear.weight.requires_grad_(False)
    linear(torch.randn(3, 64)).sum().backward()
    assert linear.weight.grad is None
    assert linear.weight_log_scale.grad.any()
    attached.finalize_deferred_grads()
    assert linear.weight_log_scale.grad.any()


def test_finalize__column_major_gradient__keeps_its_layout():
    linear, same = nn.Linear(64, 16, bias=False), nn.Linear(64, 16, bias=False)
    same.load_state_dict(linear.state_dict())
    grads = []
    for each, change in ((linear, lambda grad: grad), (same, lambda grad: grad.T.contiguous().T)):
        attached = attach({"linear": each}, QuantFormat(4, 32))
        attached.defer_grads()
        each(torch.ones(3, 64)).square().sum().backward()
        each.weight.grad = change(each.weight.grad)
        strides = each.weight.grad.stride()
        attached.finalize_deferred_grads()
        assert each.weight.grad.stride() == strides
        grads.append((each.weight.grad, each.weight_log_scale.grad))
    for mine, other in zip(*grads, strict=True):
        assert torch.equal(mine, other) and mine.any()
