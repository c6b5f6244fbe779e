"""The oneshot block of a recipe is what the run does: rate, schedule, decay, clip norm and seed, seen at the optimizer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader
from transformers import AutoProcessor

from grace_plugin.data import ConversationCollator
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.pairs import Pair, loaded, recipe_text
from tests.tiny import make_samples

BLOCK = {
    "epochs": 1.0, "learning_rate": 2.0e-3, "scheduler": "linear", "warmup_share": 0.5, "weight_decay": 0.1,
    "max_grad_norm": 0.01, "optim": "adamw_torch",
}  # fmt: skip


class Step(NamedTuple):
    """What an optimizer sees when it steps: by group, weight decay, rate, and the norm of the gradients."""

    decays: list[float]
    rates: list[float]
    norms: list[float]


@contextmanager
def watched() -> Iterator[list[Step]]:
    """Every step of every optimizer of the process."""
    seen: list[Step] = []

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        norms = [
            sum(float(p.grad.double().square().sum()) for p in g["params"] if p.grad is not None) ** 0.5 for g in groups
        ]
        seen.append(Step([g["weight_decay"] for g in groups], [g["lr"] for g in groups], norms))

    handle = register_optimizer_step_pre_hook(look)
    try:
        yield seen
    finally:
        handle.remove()


def go(pair: Pair, **change: Any) -> tuple[list[Step], dict[str, torch.Tensor]]:
    """Four steps of one batch, and the student's weights at the end."""
    student = loaded(pair)
    collator = ConversationCollator(AutoProcessor.from_pretrained(pair.student))
    batches = DataLoader(make_samples(8, seed=41), batch_size=2, shuffle=True, collate_fn=collator)  # type: ignore[arg-type]
    recipe = recipe_text(pair.teacher, oneshot=BLOCK | change)
    with watched() as seen:
        upstream_oneshot(model=student, recipe=recipe, dataset=batches, pipeline="grace")
    return seen, {name: parameter.detach().clone() for name, parameter in student.named_parameters()}


def weights_norm(step: Step) -> float:
    """Norm over all groups but the last, which holds the scales."""
    return sum(norm**2 for norm in step.norms[:-1]) ** 0.5


@pytest.mark.slow
def test_oneshot_block__rate_schedule_decay_clip__used(llava: Pair) -> None:
    seen, _ = go(llava)
    assert [step.rates[0] for step in seen] == pytest.approx([0.0, 1e-3, 2e-3, 1e-3])
    assert [step.rates[-1] for step in seen] == pytest.approx([0.0, 1e-2, 2e-2, 1e-2])
    assert [max(step.decays) for step in seen] == [0.1] * 4 and {step.decays[-1] for step in seen} == {0.0}
    assert [weights_norm(step) for step in seen] == pytest.approx([0.01] * 4, rel=1e-3)


@pytest.mark.slow
def test_oneshot_block__other_values__other_weights(llava: Pair) -> None:
    seen, _ = go(llava, learning_rate=5.0e-4, scheduler="constant", weight_decay=0.0, max_grad_norm=0.02)
    assert [step.rates[0] for step in seen] == pytest.approx([5e-4] * 4)
    assert {decay for step in seen for decay in step.decays} == {0.0}
    assert [weights_norm(step) for step in seen] == pytest.approx([0.02] * 4, rel=1e-3)


@pytest.mark.slow
def test_oneshot_block__seed__alone_decides_the_order(llava: Pair) -> None:
    ends = []
    for seed, before in ((0, 1), (0, 2), (1, 2)):
        torch.manual_seed(before)
        ends.append(go(llava, seed=seed)[1])
    same, other = (all(torch.equal(ends[0][name], end[name]) for name in ends[0]) for end in ends[1:])
    assert (same, other) == (True, False)
