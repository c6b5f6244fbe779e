"""The resident teacher keeps the states the losses read, and never a gradient."""

from __future__ import annotations

import pytest
import torch

from grace_plugin.data import ConversationCollator
from grace_plugin.teacher import ResidentTeacher, load_teacher
from grace_plugin.vlm import family_of
from tests.pairs import Pair, mixed_samples
from tests.tiny import FAMILIES, build


@pytest.mark.parametrize("family", FAMILIES)
def test_resident_teacher__states__positions_of_a_full_forward(family: str) -> None:
    model, processor = build(family, hidden=512, layers=4)
    batch = ConversationCollator(processor)(mixed_samples(4))
    labels = batch.pop("labels")
    positions = (labels[:, 1:] != -100).nonzero()
    flat = positions[:, 0] * labels.shape[1] + positions[:, 1]
    visual = family_of(model).visual_tokens(model.config, batch)
    found = ResidentTeacher(model).states(batch, flat, visual)
    with torch.no_grad():
        full = model(**batch, output_hidden_states=True, use_cache=False)
    final = torch.stack([full.hidden_states[-1][b, s] for b, s in positions.tolist()])
    torch.testing.assert_close(found.final, final, rtol=0, atol=0)
    ids = batch["input_ids"].flatten()
    seen = full.hidden_states[-2].flatten(0, 1)[ids == ids[visual.index[0]]]
    if family != "qwen3_vl":
        torch.testing.assert_close(found.visual, seen, rtol=0, atol=0)
    assert found.visual.shape == (int(visual.index.numel()), 512)
    logits = torch.stack([full.logits[b, s] for b, s in positions.tolist()])
    weight, bias = ResidentTeacher(model).head()
    assert bias is None
    torch.testing.assert_close(found.final @ weight.T, logits, rtol=1e-5, atol=1e-5)


def test_resident_teacher__after_loading__frozen_in_evaluation_mode() -> None:
    model, _ = build("llava")
    model.train()
    teacher = ResidentTeacher(model)
    assert not teacher.model.training
    assert not any(p.requires_grad for p in teacher.model.parameters())


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.bfloat16), ("float32", torch.float32)])
def test_load_teacher__dtype__kept_or_cast(llava: Pair, dtype: str, expected: torch.dtype) -> None:
    model = load_teacher(str(llava.teacher), dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert not any(p.requires_grad for p in model.parameters())


def test_load_teacher__no_checkpoint__path_named(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=rf"cannot load the teacher '{tmp_path}/none'.*Set teacher\.model in the recipe"
    ):
        load_teacher(str(tmp_path / "none"))
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    with pytest.raises(ValueError, match=r"cannot load the teacher .*no_such_model"):
        load_teacher(str(tmp_path))


def test_resident_teacher__device_without_index__that_of_the_weights() -> None:
    """Batches name theirs with one; unequal names would have them moved, and their grids read from the device."""
    model, _ = build("llava")
    teacher = ResidentTeacher(model)
    teacher.to(torch.device("cpu", 0))
    assert teacher._device == next(model.parameters()).device == torch.device("cpu")
