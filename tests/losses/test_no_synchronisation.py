"""Every loss runs on the meta device, forward and backward: nothing reads a value on the host or leaves the device.

A tensor on ``meta`` has a shape and no content: ``.item()``, a branch on a value and a mixture with another device all
raise. What passes here does not synchronise and stays where its inputs are.
"""

import pytest
import torch

from grace_plugin.losses import (
    confidence_gate,
    countable_images,
    decoupled_kd,
    distillation_head,
    linear_cka,
    relational_loss,
    teacher_gates,
)
from tests.reference.footprint import Footprint


def empty(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(*shape, device="meta", dtype=dtype, requires_grad=grad)


def on_meta(*tensors):
    return {tensor.device.type for tensor in tensors} == {"meta"}


def targets(n):
    return empty(n, dtype=torch.int64)


def test_decoupled_kd_and_gate__on_meta__no_host_read():
    student = empty(5, 9, grad=True)
    parts = decoupled_kd(student, empty(5, 9), targets(5))
    parts[2].sum().backward()
    assert on_meta(*parts, student.grad)
    assert [part.shape for part in parts] == [(5,)] * 3
    assert on_meta(*confidence_gate(empty(5, 9)))


def test_head__on_meta__no_host_read():
    hidden, weight, bias = empty(5, 4, grad=True), empty(12, 4, grad=True), empty(12, grad=True)
    gate, entropy, _ = teacher_gates(empty(5, 6), empty(11, 6), empty(11), vocabulary=9, chunk=2)
    assert on_meta(gate, entropy)
    assert (gate.dtype, entropy.dtype) == (torch.float32, torch.float32)
    out = distillation_head(
        hidden, weight, bias, empty(5, 6), empty(11, 6), empty(11), targets(5), gate, vocabulary=9, ce_weight=0.1,
        kd_weight=empty((), dtype=torch.float32), chunk=2,
    )  # fmt: skip
    out.loss.backward()
    parts = [out.ce_sum, out.gated_dkd_sum, out.gated_tckd_sum, out.gated_nckd_sum, out.gate_sum]
    assert on_meta(out.loss, hidden.grad, weight.grad, bias.grad, *parts)
    plain = distillation_head(hidden, weight, None, None, None, None, targets(5), None, vocabulary=9, ce_weight=0.1)
    plain.loss.backward()
    assert on_meta(plain.loss, plain.gate_sum)


def test_head__teacher_on_other_device__moved_to_student():
    hidden, weight = empty(5, 4, grad=True), empty(12, 4, grad=True)
    teacher = torch.randn(5, 6), torch.randn(11, 6), None
    out = distillation_head(
        hidden,
        weight,
        None,
        *teacher,
        targets(5),
        torch.ones(5),
        vocabulary=9,
        ce_weight=0.1,
        kd_weight=torch.tensor(0.7),
    )
    out.loss.backward()
    assert on_meta(out.loss, out.gated_dkd_sum, out.gate_sum, hidden.grad, weight.grad)


@pytest.mark.parametrize(("sliced", "teacher", "chunk"), [(True, True, 512), (False, True, 480), (True, False, 480)])
def test_head__logsumexp_given__chunks_of_whole_tiles(sliced, teacher, chunk):
    n, ids = 4096, 151_936
    side = (empty(n, 6), empty(ids, 6), None) if teacher else (None, None, None)
    sums = empty(2, n, dtype=torch.float32) if sliced else None
    with Footprint() as seen:
        distillation_head(
            empty(n, 4),
            empty(ids, 4),
            None,
            *side,
            targets(n),
            empty(n),
            vocabulary=ids,
            ce_weight=0.1,
            teacher_logsumexp=sums,
        )
    assert seen.largest == chunk * ids


def test_relational_loss_and_count__on_meta__no_host_read():
    student = empty(20, 4, grad=True)
    out = relational_loss(student, empty(20, 6), [5, 5, 3, 7])
    out.loss_sum.backward()
    assert on_meta(*out, student.grad)
    counted = countable_images(empty(20, 6), [5, 5, 3, 7])
    assert on_meta(counted)
    assert counted.shape == (4,)
    assert on_meta(*relational_loss(empty(3, 4), empty(3, 6), [3]))
    assert on_meta(countable_images(empty(0, 6), []))
    assert on_meta(countable_images(empty(3, 6), [3]))
    assert on_meta(linear_cka(empty(6, 3), empty(6, 4)))
