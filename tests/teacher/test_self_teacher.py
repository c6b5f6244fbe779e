"""The student as its own teacher: its unquantized pass of the start, whatever learns meanwhile, or a refusal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, TrainerCallback

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import QuantFormat, attach
from grace_plugin.recipe import TrainingRecipe
from grace_plugin.teacher import ResidentTeacher, SelfTeacher
from grace_plugin.upstream import match_named_modules
from grace_plugin.vlm import family_of
from tests.pairs import Pair, mixed_samples, recipe_text, run
from tests.teacher.caches import ask, same
from tests.tiny import build

SCALES_ALONE = ("re:.*(weight|bias|class_embedding)$",)
SCALES_AND_NORMS = (r"re:(?!.*norm).*(weight|bias|class_embedding)$",)


def taught(family: str, freeze: tuple[str, ...]) -> tuple[Any, SelfTeacher, GraceObjective, dict[str, Any]]:
    """A quantized student in training mode, itself as teacher, the objective and a batch."""
    student, processor = build(family)
    linears = dict(match_named_modules(student, ["Linear"], family_of(student).quantization_ignore()))
    attached = [attach(linears, QuantFormat(4, 128))]
    teacher = SelfTeacher(student)
    grace = GraceObjective(training=TrainingRecipe(freeze=freeze))
    grace.prepare(student, teacher, vocabulary=len(processor.tokenizer), total_steps=10, attached=attached)
    return student.train(), teacher, grace, ConversationCollator(processor)(mixed_samples(4))


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("freeze", [SCALES_ALONE, SCALES_AND_NORMS], ids=["scales", "scales_and_norms"])
def test_self_teacher__student_trains__states_of_the_start(family: str, freeze: tuple[str, ...]) -> None:
    student, teacher, grace, batch = taught(family, freeze)
    original = ResidentTeacher(build(family)[0])
    wanted = ask(original, batch)
    assert same(ask(teacher, batch), wanted)
    trains = [name for name, p in student.named_parameters() if p.requires_grad]
    assert any(name.endswith("weight_log_scale") for name in trains)
    assert any("norm" in name for name in trains) == (freeze is SCALES_AND_NORMS)
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(3):
        grace.begin_step([batch])
        loss = grace.compute_loss(student, batch)
        loss.backward()
        losses.append(float(loss.detach()))
        assert grace.reduce_metrics().gdkd > 0
        grace.end_step()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[2] != losses[0]
    assert same(ask(teacher, batch), wanted)
    assert all(torch.equal(a, b) for a, b in zip(teacher.head()[:1], original.head()[:1], strict=True))
    norms = sum(p.numel() * 4 for n, p in student.named_parameters() if p.requires_grad and "log_scale" not in n)
    assert teacher.copied == norms and (norms == 0) == (freeze is SCALES_ALONE)


def test_self_teacher__failing_pass__student_restored() -> None:
    student, teacher, _, batch = taught("llava", SCALES_ALONE)
    layer = student.get_submodule("model.language_model.layers.0.self_attn.q_proj")
    student.get_submodule("model.vision_tower").eval()
    before = layer.forward, [module.training for module in student.modules()]
    wanted = student(**{k: v for k, v in batch.items() if k != "labels"}).logits
    ask(teacher, batch)
    visual = family_of(student).visual_tokens(student.config, batch)
    with pytest.raises(IndexError):
        teacher.states(batch, torch.tensor([10**6]), visual)
    assert (layer.forward, [module.training for module in student.modules()]) == before
    assert torch.equal(student(**{k: v for k, v in batch.items() if k != "labels"}).logits, wanted)


def test_self_teacher__trainable_weights__refused_by_name(llava: Pair, tmp_path: Path) -> None:
    recipe = recipe_text(None, teacher={"kind": "self"})
    with pytest.raises(ValueError, match=r"21 of 21 quantized layers train theirs \(model\.language_model\..*Freeze"):
        run(llava, tmp_path / "out", recipe=recipe)
    with pytest.raises(ValueError, match="nothing is quantized; set a scheme"):
        run(llava, tmp_path / "out", recipe=recipe_text(None, scheme=None, quantize=False, teacher={"kind": "self"}))
    with pytest.raises(ValueError, match="self does not use the teacher that was passed"):
        run(llava, tmp_path / "out", recipe=recipe, teacher=llava.teacher)
    with pytest.raises(ValueError, match="self does not use the teacher that was passed"):
        run(llava, tmp_path / "out", recipe=recipe, teacher=AutoModelForImageTextToText.from_pretrained(llava.teacher))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_train__self_teacher__scales_alone_change(pair_of: Any, tmp_path: Path, family: str) -> None:
    class Moved(TrainerCallback):
        moved: set[str]

        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            self.first = {name: p.detach().clone() for name, p in model.named_parameters()}

        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            now = {
                name: p for name, p in model.named_parameters() if not name.endswith("weight_scale")
            }  # unset, unused
            self.moved = {name for name, p in now.items() if not torch.equal(p, self.first[name])}

    watch = Moved()
    recipe = recipe_text(None, teacher={"kind": "self"}, training={"freeze": list(SCALES_ALONE)})
    done = run(pair_of(family), tmp_path / "out", recipe=recipe, callbacks=[watch], warmup_steps=0, logging_steps=1)
    assert len(watch.moved) == 21 and all(name.endswith("weight_log_scale") for name in watch.moved)
    assert grace_plugin.verify(done.checkpoint)["verified"]
    logs = [log for log in done.history if "loss" in log]
    assert 0.0 < logs[0]["loss_rcka"] < 0.2 and logs[0]["loss_gdkd"] > 0.0
