"""The objective without a trainer: its protocol, its divisors, what contributes nothing, and what it counts.

The gradient of the whole loss is compared with plain PyTorch in integration/test_gradient_cut.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from grace_plugin.recipe import ControllerRecipe, RelationalRecipe
from grace_plugin.vlm import family_of
from tests.objective.parts import Set
from tests.pairs import mixed_samples
from tests.reference import distill as slow
from tests.reference import relational as slow_relational
from tests.tiny import make_samples


@pytest.fixture
def llava() -> Set:
    return Set()


def expected_terms(made: Set, batch: dict[str, Tensor]) -> dict[str, float]:
    """CE, GDKD and RCKA of a batch by the scalar oracles, from logits and hidden states of full forward passes."""
    inputs = {k: v for k, v in batch.items() if k != "labels"}
    with torch.no_grad():
        ours, theirs = (m(**inputs, output_hidden_states=True) for m in (made.student, made.teacher))
    ce, gates, dkd = [], [], []
    for b, s in (batch["labels"][:, 1:] != -100).nonzero().tolist():
        y = int(batch["labels"][b, s + 1])
        z_s, z_t = (out.logits[b, s, : made.size].double().tolist() for out in (ours, theirs))
        tckd, nckd = slow.decoupled(z_s, z_t, y, 2.0)
        ce.append(slow.cross_entropy(z_s, y))
        gates.append(slow.gate(z_t))
        dkd.append(gates[-1] * (tckd + 4.0 * nckd) * 4.0)
    found = family_of(made.student).visual_tokens(made.student.config, batch)
    states = [out.hidden_states[-2].flatten(0, 1)[found.index].double().numpy() for out in (ours, theirs)]
    total, images = slow_relational.relational(*states, found.sizes) if found.sizes else (0.0, 0)
    per_token, per_gate = len(ce) or 1, math.fsum(gates) or 1.0
    return {"ce": math.fsum(ce) / per_token, "gdkd": math.fsum(dkd) / per_gate, "rcka": total / max(images, 1)}


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_loss__all_terms__is_the_sum_of_the_reference_terms(family: str) -> None:
    made = Set(family, steps=10)
    batch = made.collate(mixed_samples(4))
    expected = expected_terms(made, batch)
    loss, record = made.step(batch)
    assert (record.images, record.samples_without_images) == (5, 1)
    for key, value in expected.items():
        assert value > 0.01
        assert getattr(record, key) == pytest.approx(value, rel=2e-5), key
    total = expected["ce"] + 0.5 * expected["gdkd"] + 3.0 * expected["rcka"]
    assert loss.item() == pytest.approx(total, rel=2e-5)


def test_compute_loss__more_calls_than_batches__refused(llava: Set) -> None:
    batch = llava.collate(make_samples(1))
    with pytest.raises(RuntimeError, match=r"call begin_step.. once per step"):
        llava.grace.compute_loss(llava.student, batch)
    llava.grace.begin_step([batch])
    llava.grace.compute_loss(llava.student, batch)
    with pytest.raises(RuntimeError, match=r"more often than begin_step.. had batches"):
        llava.grace.compute_loss(llava.student, batch)
    llava.grace.cancel_step()


def test_reduce_metrics__no_step_begun__refused(llava: Set) -> None:
    with pytest.raises(RuntimeError, match="no step is open"):
        llava.grace.reduce_metrics()


def test_begin_step__several_batches__returns_their_supervised_tokens(llava: Set) -> None:
    batches = [llava.collate(mixed_samples(4)), llava.collate(make_samples(2, images=0))]
    assert llava.grace.begin_step(batches) == sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches)
    llava.grace.cancel_step()
    assert llava.grace.begin_step([]) == 0
    llava.grace.cancel_step()


def test_begin_step__step_before_not_reduced__error_says_what_to_call(llava: Set) -> None:
    """A compute_loss that opens a window per micro-batch would divide by each alone, and so sum twice the loss."""
    first, second = llava.collate(make_samples(1)), llava.collate(make_samples(2, images=0))
    llava.grace.begin_step([first, second])
    with pytest.raises(RuntimeError, match=r"a step is open: .* 2 of its micro-batches .*Call begin_step.. once per"):
        llava.grace.begin_step([second])
    llava.grace.cancel_step()  # as after an exception
    llava.grace.begin_step([first])
    llava.grace.compute_loss(llava.student, first)
    with pytest.raises(
        RuntimeError, match=r" 0 of its micro-batches have had no loss, and reduce_metrics.. was not called"
    ):
        llava.grace.begin_step([second])
    llava.grace.reduce_metrics()
    llava.grace.end_step()
    assert llava.step(second)[1].tokens == int((second["labels"][:, 1:] != -100).sum())


def test_relational_term__no_image__exact_zero(llava: Set) -> None:
    text = llava.collate(make_samples(3, images=0))
    loss, record = llava.step(text)
    assert (record.rcka, record.images, record.samples_without_images) == (0.0, 0, 3)
    assert loss.item() == pytest.approx(record.ce + 0.5 * record.gdkd, rel=1e-6)
    with_relation = llava.gradients(text)
    without = Set(relational=RelationalRecipe(enabled=False)).gradients(text)
    assert with_relation.keys() == without.keys()
    assert all(torch.equal(with_relation[name], without[name]) for name in without)


def test_step__no_supervised_token__no_loss_and_no_controller_update(llava: Set) -> None:
    batch = llava.collate(make_samples(2, images=0))
    batch["labels"].fill_(-100)
    loss, record = llava.step(batch)
    assert loss.item() == 0.0
    assert (record.tokens, record.ce, record.gdkd, record.finite) == (0, 0.0, 0.0, True)
    loss.backward()
    grads = [p.grad for p in llava.student.parameters() if p.grad is not None]
    assert grads
    assert not any(g.any() for g in grads)
    assert llava.grace.controller_state.step == 0
    assert llava.grace.steps == 1


def test_gradient__micro_batch_without_labels__equals_that_of_the_others(llava: Set) -> None:
    given, mute = llava.collate(make_samples(2, images=0)), llava.collate(make_samples(2, seed=9, images=0))
    mute["labels"].fill_(-100)
    alone, together = llava.gradients(given), llava.gradients(given, mute)
    assert all(torch.equal(alone[name], together[name]) for name in alone)


def test_omega__short_run__warms_up_over_five_percent() -> None:
    made = Set(steps=80)
    text = made.collate(make_samples(1, images=0))
    seen = []
    for _ in range(6):
        seen.append(made.grace.omega)
        made.step(text)
    assert seen == pytest.approx([0.75, 1.5, 2.25, 3.0, 3.0, 3.0])


def test_omega__warmup_steps_given__warms_up_over_them() -> None:
    made = Set(steps=10_000, relational=RelationalRecipe(weight=2.0, warmup_steps=8))
    assert made.grace.omega == pytest.approx(0.25)
    made.grace.steps = 7
    assert made.grace.omega == 2.0


def test_controller__two_micro_batches__one_update_with_their_value() -> None:
    made = Set(controller=ControllerRecipe(enabled=True, tau=1.0, eta=0.01))
    a, b = made.collate(make_samples(2, images=0)), made.collate(mixed_samples(4))
    _, record = made.step(a, b)
    state = made.grace.controller_state
    assert (state.step, state.ignored) == (1, 0)
    assert state.ema == record.gdkd
    assert made.grace.beta == pytest.approx(0.5 + 0.01 * (record.gdkd - 1.0))
    first = record.gdkd
    _, record = made.step(a)
    assert made.grace.controller_state.ema == pytest.approx(0.99 * first + 0.01 * record.gdkd)
    assert made.grace.controller_state.step == 2


def test_beta__after_a_step__is_the_weight_of_the_next() -> None:
    made = Set(controller=ControllerRecipe(enabled=True, tau=1.0, eta=0.01))
    batch = made.collate(make_samples(2, images=0))
    made.step(batch)
    beta = made.grace.beta
    loss, record = made.step(batch)
    assert beta != 0.5
    assert loss.item() == pytest.approx(record.ce + beta * record.gdkd, rel=1e-6)
