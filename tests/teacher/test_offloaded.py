"""The offloaded teacher answers as the resident one, and between passes its layers hold nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from grace_plugin.data import ConversationCollator
from grace_plugin.teacher import OffloadedTeacher, ResidentTeacher
from tests.pairs import Pair, mixed_samples, recipe_text, run
from tests.teacher.caches import ask, same
from tests.tiny import build


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe", "gemma3"])
def test_offloaded_teacher__states_and_head__those_of_the_resident_teacher(family: str) -> None:
    model, processor = build(family, seed=1, hidden=512, layers=4)
    batch = ConversationCollator(processor)(mixed_samples(4))
    resident = ResidentTeacher(model)
    wanted, head = ask(resident, batch), resident.head()[0].clone()
    offloaded = OffloadedTeacher(model)
    assert same(ask(offloaded, batch), wanted)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert same(ask(offloaded, batch), wanted), "a second pass streams the same weights"
    assert torch.equal(offloaded.head()[0], head)
    offloaded.to(torch.device("cpu"))
    with pytest.raises(RuntimeError, match="streamed to cpu already"):
        offloaded.to(torch.device("meta"))


@pytest.mark.slow
def test_train__offloaded_teacher__same_bytes_as_resident(llava: Pair, tmp_path: Path) -> None:
    block: dict[str, Any] = {"model": str(llava.teacher), "dtype": "float32"}
    left = run(llava, tmp_path / "a", recipe=recipe_text(None, teacher=block))
    right = run(llava, tmp_path / "b", recipe=recipe_text(None, teacher=block | {"kind": "offload"}))
    both = [(done.checkpoint / "model.safetensors").read_bytes() for done in (left, right)]
    assert both[0] == both[1]
