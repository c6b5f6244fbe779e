"""Neither model multiplies by its head where nobody reads the logits: prompts and pictures are most of a batch."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from tests.objective.parts import Set
from tests.pairs import mixed_samples


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "gemma3"])
def test_forward_pass__long_samples__head_on_one_position_at_most(family: str) -> None:
    made = Set(family)
    seen: dict[str, list[int]] = {"student": [], "teacher": []}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            seen[name].append(inputs[0].shape[:-1].numel())

        return hook

    for name, model in (("student", made.student), ("teacher", made.teacher)):
        model.get_output_embeddings().register_forward_hook(note(name))
    batch = made.collate(mixed_samples(4))
    count, length = batch["input_ids"].shape
    assert length > 8
    loss, record = made.step(batch)
    assert loss.requires_grad and record.tokens > count
    assert [len(calls) for calls in seen.values()] == [1, 1]
    assert max(seen["student"] + seen["teacher"]) <= count
