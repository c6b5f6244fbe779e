"""What the recipe switches off, freezes and refuses, what is counted, saved and reported, and how a run ends."""

from __future__ import annotations

import json

import pytest
import torch

from grace_plugin.data import ConversationCollator
from grace_plugin.objective import GraceObjective
from grace_plugin.recipe import ControllerRecipe, DistillRecipe, RelationalRecipe, TrainingRecipe
from tests.objective.parts import Set
from tests.pairs import mixed_samples
from tests.reference import distill as slow
from tests.tiny import build, make_samples


@pytest.fixture
def llava() -> Set:
    return Set()


def test_controller__disabled__beta_constant() -> None:
    made = Set(controller=ControllerRecipe(enabled=False, beta_start=0.3))
    for _ in range(3):
        made.step(made.collate(make_samples(1, images=0)))
    assert made.grace.beta == 0.3
    assert made.grace.controller_logs() == {}


def test_loss__distillation_disabled__ce_and_relational_term() -> None:
    made = Set(distill=DistillRecipe(enabled=False), steps=10)
    loss, record = made.step(made.collate(make_samples(2)))
    assert made.grace.beta == 0.0
    assert record.gdkd == 0.0
    assert record.rcka > 0.0
    assert loss.item() == pytest.approx(record.ce + 3.0 * record.rcka, rel=1e-6)
    assert made.grace.gate_quantiles() == {}
    assert made.grace.controller_logs() == {}
    assert made.grace.controller_state.step == 0


def test_prepare__no_term_reads_a_teacher__none_needed() -> None:
    student, processor = build("llava")
    grace = GraceObjective(DistillRecipe(enabled=False), RelationalRecipe(enabled=False))
    assert not grace.needs_teacher
    grace.prepare(student, None, vocabulary=len(processor.tokenizer), total_steps=2)
    batch = ConversationCollator(processor)(make_samples(2))
    grace.begin_step([batch])
    loss = grace.compute_loss(student, batch)
    shifted = student(**batch).loss
    assert loss.item() == pytest.approx(shifted.item(), rel=1e-5)
    record = grace.reduce_metrics()
    assert (record.gdkd, record.rcka) == (0.0, 0.0)


def test_prepare__teacher_missing__refused() -> None:
    student, _ = build("llava")
    with pytest.raises(ValueError, match=r"set teacher\.model in the recipe, pass teacher=, or\s+disable"):
        GraceObjective().prepare(student, None, vocabulary=9, total_steps=2)


def test_prepare__no_step__refused() -> None:
    student, _ = build("llava")
    teacher, _ = build("llava")
    with pytest.raises(ValueError, match="at least 1 optimizer step, got total_steps=0"):
        GraceObjective().prepare(student, teacher, vocabulary=9, total_steps=0)


def test_prepare__freeze_patterns__named_parameters_frozen() -> None:
    made = Set(training=TrainingRecipe(freeze=("re:.*embed_tokens.*", "lm_head.weight")))
    frozen = {name for name, p in made.student.named_parameters() if not p.requires_grad}
    assert "lm_head.weight" in frozen
    assert "model.language_model.embed_tokens.weight" in frozen
    assert all(
        "vision_tower" in name for name in frozen - {"lm_head.weight", "model.language_model.embed_tokens.weight"}
    )
    assert not any(p.requires_grad for p in made.teacher.parameters())


def test_compute_loss__whole_decoder_frozen__refused() -> None:
    made = Set(training=TrainingRecipe(freeze=("re:model.*",)))
    batch = made.collate(make_samples(1))
    made.grace.begin_step([batch])
    with pytest.raises(RuntimeError, match="hidden states carry no gradient; leave some of the decoder trainable"):
        made.grace.compute_loss(made.student, batch)


def test_begin_step__label_outside_the_vocabulary__refused(llava: Set) -> None:
    batch = llava.collate(make_samples(1))
    batch["labels"][0, -1] = llava.size
    with pytest.raises(ValueError, match=rf"label {llava.size} lies outside the {llava.size} token ids"):
        llava.grace.begin_step([batch])
    batch["labels"][0, -1] = llava.size - 1
    llava.grace.begin_step([batch])
    llava.grace.cancel_step()


def test_begin_step__batch_without_labels__text_tokens_supervised(llava: Set) -> None:
    batch = llava.collate(mixed_samples(5))
    del batch["labels"]
    image = llava.student.config.image_token_id
    ids, mask = batch["input_ids"][:, 1:], batch["attention_mask"][:, 1:]
    assert llava.grace.begin_step([batch]) == int(((ids != image) & (mask == 1)).sum())
    llava.grace.cancel_step()
    del batch["attention_mask"]
    assert llava.grace.begin_step([batch]) == int((ids != image).sum())
    llava.grace.cancel_step()


def test_relational_term__images_of_one_token__skipped_and_counted() -> None:
    made = Set("qwen2_vl", steps=10)
    batch = made.collate(make_samples(2, images=0))
    ids = torch.full((2, 6), 9)
    ids[:, 2] = made.student.config.image_token_id
    pixels = torch.randn(2 * 4, 3 * 2 * 14 * 14)
    batch = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone().fill_(9), "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 2, 2]] * 2), "mm_token_type_ids": (ids != 9).long(),
    }  # fmt: skip
    _, record = made.step(batch)
    assert (record.images, record.images_skipped, record.rcka) == (0, 2, 0.0)
    assert record.samples_without_images == 0


@pytest.mark.slow
def test_quantizer__micro_batches_and_checkpointing__once_per_step() -> None:
    made = Set(quantized=True)
    (attached,) = made.attached
    batches = [made.collate(make_samples(1, seed=s)) for s in range(3)]
    made.student.train()
    made.student.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.SGD([p for p in made.student.parameters() if p.requires_grad], lr=1e-3)
    for number in (1, 2):
        made.grace.begin_step(batches)
        for batch in batches:
            made.grace.compute_loss(made.student, batch).backward()
        made.grace.reduce_metrics()
        optimizer.step()
        made.grace.end_step()
        assert attached.quantizations == number * len(attached)


def test_end_step__any__prefetches_the_next_steps_weights(llava: Set) -> None:
    asked: list[int] = []

    class Scales:
        def prefetch_quantized_weights(self) -> None:
            asked.append(llava.grace.steps)

    llava.grace.attached = (Scales(), Scales())  # type: ignore[assignment]
    try:
        begun = llava.grace.steps
        llava.step(llava.collate(make_samples(1)))
        assert asked == [begun + 1] * 2
    finally:
        llava.grace.attached = ()


def test_end_step__too_many_skipped__run_ends() -> None:
    made = Set(training=TrainingRecipe(max_nonfinite_steps=2))
    batch = made.collate(make_samples(1, images=0))
    before = made.grace.controller_state
    for number in (1, 2):
        made.step(batch, skipped=True)
        assert made.grace.nonfinite_steps == number
    assert made.grace.controller_state == before
    with pytest.raises(
        FloatingPointError, match=r"3 optimizer steps .* the last at step 3; training.max_nonfinite_steps allows 2"
    ):
        made.step(batch, skipped=True)


def test_record__infinite_pixel__not_finite(llava: Set) -> None:
    batch = llava.collate(make_samples(1))
    batch["pixel_values"].view(-1)[0] = float("inf")
    _, record = llava.step(batch, skipped=True)
    assert not record.finite


def test_state_dict__through_json__restored_and_other_length_refused() -> None:
    made = Set(steps=50)
    for _ in range(3):
        made.step(made.collate(make_samples(1, images=0)))
    saved = json.loads(json.dumps(made.grace.state_dict()))
    other = Set(steps=50)
    other.grace.load_state_dict(saved)
    assert other.grace.controller_state == made.grace.controller_state
    assert (other.grace.steps, other.grace.omega) == (3, made.grace.omega)
    with pytest.raises(ValueError, match="the saved run has 50 optimizer steps and this one 49"):
        Set(steps=49).grace.load_state_dict(saved)


def test_logs__after_a_step__gates_and_controller() -> None:
    made = Set(steps=100)
    batch = made.collate(make_samples(4, images=0))
    assert made.grace.gate_quantiles() == {}
    made.grace.begin_step([batch])
    quantiles = made.grace.gate_quantiles()
    places = (batch["labels"][:, 1:] != -100).nonzero().tolist()
    with torch.no_grad():
        logits = made.teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits[..., : made.size].double()
    gates = torch.tensor([slow.gate(logits[b, s].tolist()) for b, s in places])
    for key, level in (("gate_q05", 0.05), ("gate_q50", 0.5), ("gate_q95", 0.95)):
        assert quantiles[key] == pytest.approx(float(torch.quantile(gates, level)), rel=1e-6)
    assert quantiles["gate_q05"] < quantiles["gate_q95"]
    made.grace.compute_loss(made.student, batch)
    made.grace.reduce_metrics()
    made.grace.end_step()
    assert made.grace.controller_state.ema == made.grace.record.gdkd


def test_controller__constraint_violated__beta_rises_to_its_bound_and_is_logged() -> None:
    made = Set(steps=10, controller=ControllerRecipe(enabled=True, tau=1e-3, eta=10.0))
    for _ in range(4):
        made.step(made.collate(make_samples(1, images=0)))
    assert made.grace.beta == 1.0
    logs = made.grace.controller_logs()
    assert set(logs) == {"ema", "share_at_bound"}
    assert logs["share_at_bound"] == 1.0


def test_controller__teacher_swapped_half_way__beta_answers() -> None:
    """A teacher whose logits are scaled up is one that the student is further from."""
    betas = []
    for factor in (1.0, 4.0):
        made = Set(steps=20, controller=ControllerRecipe(enabled=True, tau=12.0, eta=0.005, ema_decay=0.5))
        for step in range(12):
            if step == 6:
                with torch.no_grad():
                    made.teacher.get_output_embeddings().weight.mul_(factor)
            made.step(made.collate(make_samples(1, images=0)))
        betas.append(made.grace.beta)
    assert betas[0] < 0.5 < betas[1]


def test_finalize__quantized__codes_in_weights_and_buffers_kept() -> None:
    made = Set(quantized=True)
    buffers = {name: b.dtype for name, b in made.student.named_buffers()}
    frozen = made.grace.finalize(torch.bfloat16)
    assert {p.dtype for p in made.student.parameters()} == {torch.bfloat16}
    assert {name: b.dtype for name, b in made.student.named_buffers()} == buffers
    assert torch.float32 in buffers.values()
    assert len(frozen) == 21
    modules = dict(made.student.named_modules())
    for name, (codes, scales) in frozen.items():
        assert codes.dtype == torch.int8 and scales.dtype == torch.bfloat16
        expanded = scales.repeat_interleave(128, dim=1).float()
        assert torch.equal(modules[name].weight.float(), (codes.float() * expanded).bfloat16().float())
        assert "weight_log_scale" not in dict(modules[name].named_parameters())
