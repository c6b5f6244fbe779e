"""Packed samples give the loss and gradient of padded ones where a family allows it; elsewhere packing is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText

from grace_plugin.data import ConversationCollator
from grace_plugin.vlm import FAMILIES as REGISTRY
from grace_plugin.vlm import family_of, register_family
from tests.objective.parts import Set
from tests.pairs import Pair, mixed_samples, run
from tests.tiny import EVERY, build
from tests.videos import video_samples

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
PACKING = tuple(name for name in EVERY if name not in QWEN)


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKING)
def test_packing__loss_and_gradient__those_of_padded_samples(name: str) -> None:
    """CE, distillation and relation of six samples with two, one and no images; only the order of sums differs."""
    first, second = (
        Set(name, quantized=True),
        Set(name, quantized=True),
    )  # one step each: weights of terms move with steps
    samples = mixed_samples(6)
    padded, packed = first.collate(samples), ConversationCollator(second.processor, packed=True)(samples)
    (one, record), (two, again) = first.step(padded), second.step(packed)
    assert two.item() == pytest.approx(one.item(), rel=1e-5)
    assert (again.tokens, again.images, again.samples_without_images) == (record.tokens, 7, 1)
    assert again.rcka == pytest.approx(record.rcka, rel=1e-4)
    one.backward()
    two.backward()
    theirs = dict(second.student.named_parameters())
    compared = 0
    for parameter, left in first.student.named_parameters():
        right = theirs[parameter].grad
        assert (left.grad is None) == (right is None)
        if left.grad is not None and right is not None:
            assert float((left.grad - right).norm()) <= 1e-4 * float(left.grad.norm()), parameter
            compared += bool(left.grad.any())
    assert compared > 40


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", EVERY)
def test_packing__family_packs__agrees_with_its_model(name: str, attention: str) -> None:
    model, processor = build(name)
    model.set_attn_implementation(attention)
    samples = mixed_samples(4)
    padded, packed = ConversationCollator(processor)(samples), ConversationCollator(processor, packed=True)(samples)
    alone = logits(model, padded)[padded["attention_mask"].bool()]
    apart = float((logits(model, packed)[0] - alone).abs().max())
    assert family_of(model).packs == (name in PACKING)
    assert apart < 1e-4 if family_of(model).packs else apart > 1e-1
    del packed["position_ids"]  # nothing keeps the samples apart then
    assert float((logits(model, packed)[0] - alone).abs().max()) > 1e-1


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_packing__batch__samples_in_one_sequence(name: str) -> None:
    _, processor = build(name)
    collator = ConversationCollator(processor, packed=True)
    samples = mixed_samples(4)
    packed, singles = collator(samples), [ConversationCollator(processor)([sample]) for sample in samples]
    lengths = [single["input_ids"].shape[1] for single in singles]
    assert "attention_mask" not in packed
    assert packed["input_ids"].tolist() == [[i for single in singles for i in single["input_ids"][0].tolist()]]
    assert packed["labels"].tolist() == [[i for single in singles for i in single["labels"][0].tolist()]]
    assert packed["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]


def test_packing__first_token_of_a_sample__no_label() -> None:
    """A template that marks everything as supervised would otherwise teach one sample to begin the next."""
    _, processor = build("llava")
    said = "{% generation %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endgeneration %}"
    processor.chat_template = "{% for m in messages %}" + said + "{% endfor %}"
    talk = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "red"}]
    packed = ConversationCollator(processor, packed=True)([{"messages": talk}, {"messages": talk}])
    starts = (packed["position_ids"][0] == 0).nonzero().squeeze(1)
    assert len(starts) == 2
    assert packed["labels"][0, starts].tolist() == [-100, -100]
    assert int((packed["labels"] == -100).sum()) == 2


def test_packing__videos__keep_their_tokens() -> None:
    model, processor = build("llava_onevision")
    answer = {"role": "assistant", "content": "two"}
    samples = [
        {"messages": [*video["messages"], answer], "videos": [list(video["videos"][0][0])]}
        for video in video_samples(3, frames=4)
    ]
    samples[1:1] = mixed_samples(4)[-1:]
    padded, packed = ConversationCollator(processor)(samples), ConversationCollator(processor, packed=True)(samples)
    family = family_of(model)
    assert family.visual_tokens(model.config, packed).sizes == family.visual_tokens(model.config, padded).sizes
    alone = logits(model, padded)[padded["attention_mask"].bool()]
    torch.testing.assert_close(logits(model, packed)[0], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_train__packing__equal_to_the_padded_run(llava: Pair, tmp_path: Path) -> None:
    options: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "logging_steps": 1}
    padded = run(llava, tmp_path / "padded", mixed_samples(8), **options)
    packed = run(llava, tmp_path / "packed", mixed_samples(8), packing=True, **options)
    assert packed.verification["codes_differing"] == 0
    for left, right in zip(padded.history[:3], packed.history[:3], strict=True):
        assert right["loss"] == pytest.approx(left["loss"], rel=1e-3)
        assert (right["images"], right["samples_without_images"]) == (left["images"], left["samples_without_images"])


def test_packing__family_with_several_positions__refused(pair_of: Any, tmp_path: Path) -> None:
    """Before any sample is inspected: this one could not be used either."""
    with pytest.raises(ValueError, match=r"samples of family 'qwen2_vl' cannot be packed: .*Leave packing out"):
        run(pair_of("qwen2_vl"), tmp_path / "o/out", [{"messages": []}], packing=True)
    assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_packing__teacher_cannot_pack__refused(llava: Pair, tmp_path: Path) -> None:
    class Other(type(REGISTRY["llava"])):  # type: ignore[misc]
        model_type = "other"
        packs = False

    teacher = AutoModelForImageTextToText.from_pretrained(llava.teacher)
    teacher.config.model_type = "other"
    try:
        register_family(Other())
        with pytest.raises(ValueError, match=r"samples of family 'other' cannot be packed"):
            run(llava, tmp_path / "o/out", mixed_samples(4), teacher=teacher, packing=True)
    finally:
        REGISTRY.pop("other", None)
    assert not (tmp_path / "o").exists()
