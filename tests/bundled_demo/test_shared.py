"""Test that runs which share the teacher's states train the same bits as runs that compute them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from examples.bundled_demo.jobs import jobs_of
from examples.bundled_demo.plain import PlainObjective
from examples.bundled_demo.shared import SharedTeacher
from grace_plugin.data import ConversationCollator
from grace_plugin.objective import GraceObjective
from grace_plugin.teacher import ResidentTeacher, supervised_positions
from grace_plugin.vlm import family_of
from tests.pairs import Pair, mixed_samples, modifier_of, recipe_text, run
from tests.tiny import build


class Counted(SharedTeacher):
    """Count the forward passes of the model."""

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(model, folder)
        self.passes: list[int] = []
        self.model.register_forward_hook(lambda *_: self.passes.append(1))


def loaded(pair: Pair) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pair.teacher, dtype=torch.float32)


def test_states__same_batch_twice__computed_once_and_read_exactly(tmp_path: Path) -> None:
    models = [build("llava", seed=1) for _ in range(3)]
    model, processor = models[0]
    one, other = (Counted(made.bfloat16(), tmp_path) for made, _ in models[:2])
    alone = ResidentTeacher(models[2][0].bfloat16())
    collate, family = ConversationCollator(processor), family_of(model)
    batches = [collate(mixed_samples(5)), collate(mixed_samples(4))]
    for batch in batches:
        asked = (batch, supervised_positions(batch["labels"]), family.visual_tokens(model.config, batch))
        made, read, want = (teacher.states(*asked) for teacher in (one, other, alone))
        for found in (made, read):
            assert found.final.dtype == torch.bfloat16 and found.final.shape == want.final.shape
            assert torch.equal(found.final, want.final) and torch.equal(found.visual, want.visual)
    assert (len(one.passes), len(other.passes)) == (2, 0)
    assert sorted(file.suffix for file in tmp_path.iterdir()) == [".safetensors"] * 2


@pytest.mark.parametrize(("key", "more"), [("input_ids", 5), ("attention_mask", 1), ("labels", 1), ("pixel_values", 1)])
def test_states__another_value_in_the_batch__computed_again(tmp_path: Path, key: str, more: int) -> None:
    model, processor = build("llava", seed=1)
    batch = ConversationCollator(processor)(mixed_samples(4))
    teacher = SharedTeacher(model, tmp_path)
    asked = (supervised_positions(batch["labels"]), family_of(model).visual_tokens(model.config, batch))
    teacher.states(batch, *asked)
    changed = batch[key].clone()
    changed.view(-1)[-1] += more
    teacher.states({**batch, key: changed}, *asked)
    teacher.states({**batch, key: batch[key].clone()}, *asked)
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_train__shared_states__same_checkpoints_as_without(llava: Pair, tmp_path: Path) -> None:
    """Two numbers of bits; in the second the teacher's weights are changed, so that only stored states give the same result."""
    for bits in (4, 2):
        weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        recipe = recipe_text(llava.teacher, scheme=None, config_groups=groups)
        model = loaded(llava)
        if bits == 2:
            torch.nn.init.zeros_(model.model.language_model.layers[0].mlp.down_proj.weight)
        found = []
        for name, teacher in (("shared", SharedTeacher(model, tmp_path / "states")), ("alone", loaded(llava))):
            run(llava, tmp_path / f"{name}{bits}", mixed_samples(8), recipe=recipe, teacher=teacher)
            found.append(load_file(tmp_path / f"{name}{bits}" / "model.safetensors"))
        shared, alone = found
        assert shared.keys() == alone.keys() and all(torch.equal(shared[key], alone[key]) for key in shared)
    assert len(list((tmp_path / "states").iterdir())) == 2


def test_jobs__two_low_bits__one_grace_run_before_the_others() -> None:
    assert [job.kind for job in jobs_of((3, 2))][:4] == ["grace", "fine_tune", "grace", "grace"]


@pytest.mark.parametrize("kind", ["offload", "self"])
def test_train__passed_teacher_with_another_kind__refused(llava: Pair, tmp_path: Path, kind: str) -> None:
    own = SharedTeacher(loaded(llava), tmp_path / "states")
    own.name_or_path = ""
    with pytest.raises(ValueError, match=f"teacher.kind: {kind} does not .* that was passed.*kind: resident"):
        run(llava, tmp_path / "out", recipe=recipe_text(None, teacher={"kind": kind}), teacher=own)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_use_objective__plain_kl__its_loss_is_trained_and_verified(llava: Pair, tmp_path: Path) -> None:
    """The recipe is the same in both runs, so only the divergence can make the codes differ."""
    blocks = {"distill": {"gate_sharpness": 0.0}, "relational": {"enabled": False}, "controller": {"enabled": False}}
    found = []
    for name, kind in (("plain", PlainObjective), ("decoupled", GraceObjective)):
        modifier = modifier_of(recipe_text(llava.teacher, **blocks))
        modifier.use_objective(kind)
        result = run(llava, tmp_path / name, mixed_samples(8), recipe=modifier, logging_steps=1)
        assert result.verification["verified"]
        # plain KL has no part for the target class
        assert (result.history[0]["loss_tckd"] == 0.0) is (kind is PlainObjective)
        found.append(load_file(tmp_path / name / "model.safetensors"))
    assert any(not torch.equal(found[0][key], found[1][key]) for key in found[0])
