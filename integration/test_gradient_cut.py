"""The gradient of one batch of 8 equals that of the same samples as 4 micro-batches, and that of plain PyTorch in float64.

Through the real `grace_plugin.train`: real Trainer, real session, learned scales, all three loss terms, samples of
different length, two pictures in a sample and a sample without one. Gradients are read in `on_pre_optimizer_step`,
unclipped.

Compared as |a - b| / |a| over each parameter (Frobenius norms). Rounding of float32 through three layers gives a few
1e-6; a mean of micro-batch means on these samples would differ by some 10 %.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

from grace_plugin.data import ConversationCollator
from tests.pairs import Pair, mixed_samples, pair, recipe_text, run
from tests.reference import distill as slow
from tests.reference import relational as slow_relational
from tests.tiny import FAMILIES

ROWS = mixed_samples(8)
PROJECTOR = {
    "llava": "multi_modal_projector.linear_1.weight",
    "qwen2_vl": "visual.merger.mlp.0.weight",
    "qwen3_vl": "visual.deepstack_merger_list.1.linear_fc1.weight",
}


class Gradients(TrainerCallback):
    """Copies of gradients and parameters of the first optimizer step."""

    def __init__(self) -> None:
        self.grad: dict[str, Tensor] = {}
        self.value: dict[str, Tensor] = {}

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if not self.grad:
            for name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    self.grad[name] = parameter.grad.clone()
                self.value[name] = parameter.detach().clone()


def gradients(pair: Pair, folder: Path, samples_at_once: int, **options: Any) -> tuple[Gradients, dict[str, Any]]:
    seen = Gradients()
    result = run(
        pair, folder, ROWS, max_steps=1, per_device_train_batch_size=samples_at_once,
        gradient_accumulation_steps=8 // samples_at_once, max_grad_norm=0.0, logging_steps=1, callbacks=[seen], **options,
    )  # fmt: skip
    return seen, result.history[0]


def distances(left: dict[str, Tensor], right: dict[str, Tensor]) -> dict[str, float]:
    """|a - b| / |a| by name; names must be the same and every gradient must be there."""
    assert left.keys() == right.keys()
    return {n: float((left[n] - right[n]).double().norm() / left[n].double().norm()) for n in left}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    return {family: pair(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module")
def whole(
    pairs: dict[str, Pair], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Gradients, dict[str, Any]]]:
    return {family: gradients(pairs[family], tmp_path_factory.mktemp("whole") / family, 8) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("samples_at_once", [2, 1])
def test_a_cut_batch_has_the_whole_batchs_gradient(
    pairs: dict[str, Pair], whole: Any, tmp_path: Path, family: str, samples_at_once: int
) -> None:
    (one, one_log), (cut, cut_log) = whole[family], gradients(pairs[family], tmp_path / "out", samples_at_once)
    apart = distances(one.grad, cut.grad)
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]
    kinds = {"weight_log_scale", "lm_head.weight", "input_layernorm.weight", "q_proj.weight"}
    kinds |= {PROJECTOR[family]}
    assert {kind for kind in kinds if any(name.endswith(kind) for name in apart)} == kinds
    for key in ("loss", "loss_ce", "loss_gdkd", "loss_rcka"):
        assert cut_log[key] == pytest.approx(one_log[key], rel=2e-6)
        assert one_log[key] > 0.0
    assert cut_log["supervised_tokens"] == one_log["supervised_tokens"]
    assert cut_log["images"] == one_log["images"] == sum(len(sample["images"]) for sample in ROWS)
    assert cut_log["samples_without_images"] == one_log["samples_without_images"] == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_no_gradient(
    pairs: dict[str, Pair], whole: Any, tmp_path: Path, family: str
) -> None:
    again, _ = gradients(pairs[family], tmp_path / "out", 8, gradient_checkpointing=True)
    apart = distances(whole[family][0].grad, again.grad)
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]


@pytest.mark.parametrize("family", FAMILIES)
def test_reentrant_checkpointing_gives_the_same_gradient_too(
    pairs: dict[str, Pair], whole: Any, tmp_path: Path, family: str
) -> None:
    reentrant = {"use_reentrant": True}
    again, _ = gradients(
        pairs[family], tmp_path / "out", 8, gradient_checkpointing=True, gradient_checkpointing_kwargs=reentrant
    )
    apart = distances(whole[family][0].grad, again.grad)
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]


def test_reentrant_checkpointing_behind_frozen_inputs(pairs: dict[str, Pair], tmp_path: Path) -> None:
    """With frozen embeddings and projector nothing that enters the checkpointed layers would carry a gradient by itself."""
    frozen = ["re:.*embed_tokens.*", "re:.*multi_modal_projector.*"]
    recipe = recipe_text(pairs["llava"].teacher, training={"freeze": frozen})
    plain, _ = gradients(pairs["llava"], tmp_path / "plain", 8, recipe=recipe)
    reentrant = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    again, _ = gradients(pairs["llava"], tmp_path / "again", 8, recipe=recipe, **reentrant)
    apart = distances(plain.grad, again.grad)
    assert max(apart.values()) < 1e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]
    assert any(name.endswith("layers.0.self_attn.q_proj.weight") for name in plain.grad)
    assert not any("embed_tokens" in name or "multi_modal_projector" in name for name in plain.grad)


# ---- plain PyTorch in float64 ------------------------------------------------------------------------------------------


def fake_quantized(weight: Tensor, theta: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w^, w / s, codes, s) of a float64 weight, groups of 128, scales in bfloat16; numpy rounds, ties to even."""
    scale = theta.float().exp().bfloat16().double().repeat_interleave(128, dim=1)
    ratio = weight / scale
    codes = torch.from_numpy(np.clip(np.rint(ratio.numpy()), -8, 7))
    return (codes * scale).bfloat16().double(), ratio, codes, scale


def supervised(labels: Tensor) -> list[tuple[int, int]]:
    return [(b, s - 1) for b in range(len(labels)) for s in range(1, labels.shape[1]) if labels[b, s] != -100]


def full_loss(
    student: Any, teacher: Any, batch: dict[str, Tensor], vocabulary: int, image_id: int
) -> tuple[Tensor, dict[str, float]]:
    """The whole loss at beta = 0.5 and omega = 3 from full logits, KL = TCKD + (1 - p) NCKD and the centring matrix."""
    labels = batch.pop("labels")
    places = supervised(labels)
    out = student(**batch, output_hidden_states=True)
    with torch.no_grad():
        ref = teacher(**batch, output_hidden_states=True)
    samples, columns = map(torch.tensor, zip(*places, strict=True))
    targets = labels[samples, columns + 1]
    student_logits = out.logits[samples, columns, :vocabulary]
    teacher_logits = ref.logits[samples, columns, :vocabulary]
    ce = -torch.log(torch.softmax(student_logits, -1)).gather(1, targets[:, None]).mean()
    q, p = torch.softmax(student_logits / 2, -1), torch.softmax(teacher_logits / 2, -1)
    p_y, q_y = (x.gather(1, targets[:, None]).squeeze(1) for x in (p, q))
    kl = (p * (p / q).log()).sum(-1)
    tckd = p_y * (p_y / q_y).log() + (1 - p_y) * ((1 - p_y) / (1 - q_y)).log()
    nckd = (kl - tckd) / (1 - p_y)
    gate = torch.tensor([slow.gate(sample.tolist()) for sample in teacher_logits], dtype=torch.float64)
    gdkd = (gate * (tckd + 4 * nckd) * 4).sum() / gate.sum()
    relation, images = torch.zeros((), dtype=torch.float64), 0
    ids = batch["input_ids"]
    for b, sample in enumerate(ids):
        tokens = (sample == image_id).nonzero().squeeze(1)
        for span in tokens.split(16) if len(tokens) else ():  # LLaVA: 4 x 4 patches of every picture
            relation = relation + 1 - centred_alignment(out.hidden_states[-2][b, span], ref.hidden_states[-2][b, span])
            images += 1
    rcka = relation / images
    values = {"loss_ce": ce.item(), "loss_gdkd": gdkd.item(), "loss_rcka": rcka.item()}
    return ce + 0.5 * gdkd + 3 * rcka, values


def centred_alignment(hidden_s: Tensor, hidden_t: Tensor) -> Tensor:
    centring = torch.eye(len(hidden_s), dtype=torch.float64) - 1 / len(hidden_s)
    kernels = []
    for hidden in (hidden_s, hidden_t):
        unit = hidden / hidden.norm(dim=-1, keepdim=True)
        kernels.append(centring @ unit @ unit.T @ centring)
    return (kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm())


def double(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).double().eval()


def test_the_gradient_is_plain_pytorchs_in_float64(pairs: dict[str, Pair], whole: Any) -> None:
    """LLaVA. theta is taken from the run; codes, loss and every gradient are computed here."""
    seen, log = whole["llava"]
    student, teacher = double(pairs["llava"].student), double(pairs["llava"].teacher)
    processor = AutoProcessor.from_pretrained(pairs["llava"].student)
    parts: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, parameter in student.named_parameters():
        theta = seen.value.get(name.removesuffix("weight") + "weight_log_scale")
        if theta is not None:
            shipped, *rest = fake_quantized(parameter.detach(), theta)
            parts[name] = (rest[0], rest[1], rest[2])
            parameter.data = shipped
    batch = ConversationCollator(processor)(ROWS)
    loss, values = full_loss(student, teacher, dict(batch), len(processor.tokenizer), student.config.image_token_id)
    for key, value in values.items():
        assert log[key] == pytest.approx(value, rel=2e-5), key
    assert log["loss"] == pytest.approx(loss.item(), rel=2e-5)
    loss.backward()
    expected: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if "vision_tower" in name:
            continue
        expected[name] = parameter.grad
        if name in parts:
            ratio, codes, scale = parts[name]
            inside = (ratio.round() >= -8) & (ratio.round() <= 7)
            expected[name] = torch.where(inside, parameter.grad, 0.0)
            step = parameter.grad * torch.where(inside, codes - ratio, codes) * scale
            expected[f"{name}_log_scale"] = step.unflatten(1, (-1, 128)).sum(-1)
            assert 0 < (~inside).sum() < inside.sum()
    apart = distances(expected, {name: grad.double() for name, grad in seen.grad.items()})
    assert max(apart.values()) < 2e-5, sorted(apart.items(), key=lambda item: -item[1])[:5]


def test_the_relational_term_is_the_slow_one(pairs: dict[str, Pair]) -> None:
    """The oracle's alignment above against numpy's."""
    torch.manual_seed(0)
    a, b = torch.randn(16, 8, dtype=torch.float64), torch.randn(16, 12, dtype=torch.float64)
    unit = [x / x.norm(dim=-1, keepdim=True) for x in (a, b)]
    assert centred_alignment(a, b).item() == pytest.approx(slow_relational.cka(*(u.numpy() for u in unit)), rel=1e-12)
