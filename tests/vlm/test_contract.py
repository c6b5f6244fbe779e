"""Every family through one contract, judged by what the model itself does with a batch.

The oracle for positions is the decoder's input: where its embeddings are not those of the token ids, the model has put
something seen there, and what it has put is a visual token unless it is the learned newline. It reads no config, no token id
and no grid, so it shares nothing with the families.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace_plugin.data import ConversationCollator, SampleError
from grace_plugin.losses.relational import relational_loss
from grace_plugin.teacher.base import model_inputs
from grace_plugin.upstream import match_named_modules
from grace_plugin.vlm import Family, capture, check_pixels, family_of, matches
from tests.tiny import EVERY, build, make_samples
from tests.videos import films

Built = Callable[[str], tuple[Any, Any]]


@pytest.fixture(scope="module")
def built() -> Built:
    """name -> a model and its processor, never changed."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(name: str) -> tuple[Any, Any]:
        if name not in made:
            made[name] = build(name)
        return made[name]

    return get


def mixed() -> list[dict[str, Any]]:
    """Two pictures of different size in one row, one in two rows, none in the last."""
    return make_samples(1, seed=4, images=2) + make_samples(2, seed=1) + make_samples(1, seed=3, images=0)


def collated(processor: Any, chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = ConversationCollator(processor)(chosen)
    batch.pop("labels")
    return batch


def film(frames: int, seed: int = 0) -> dict[str, Any]:
    """A row with one video."""
    asked = films(seed + 1, frames)[seed]
    answer = {"role": "assistant", "content": "a red square"}
    return {"messages": [*asked["messages"], answer], "videos": [list(asked["videos"][0][0])]}


def filmed(processor: Any, frames: int = 4) -> dict[str, Tensor]:
    """A batch of one video."""
    return collated(processor, [film(frames)])


def seen(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """bool [B, S]: where the decoder is given something else than the embedding of the token, newlines apart."""
    given: list[Tensor] = []
    hook = (
        family_of(model)
        .text_model(model)
        .register_forward_pre_hook(lambda _m, _a, kwargs: given.append(kwargs["inputs_embeds"]), with_kwargs=True)
    )
    with torch.no_grad():
        model(**model_inputs(batch))
        words = model.get_input_embeddings()(batch["input_ids"])
    hook.remove()
    other = (given[0] != words).any(-1)
    newline = getattr(model.model, "image_newline", None)
    return other if newline is None else other & ~(given[0] == newline).all(-1)


def takes_video(model: Any) -> bool:
    return family_of(model).takes_videos(model.config)


@pytest.mark.parametrize("name", EVERY)
def test_positions_are_where_the_model_sees(built: Built, name: str) -> None:
    model, processor = built(name)
    batch = collated(processor, mixed())
    found = family_of(model).visual_tokens(model.config, batch)
    expected = seen(model, batch)
    assert found.index.tolist() == expected.flatten().nonzero().squeeze(1).tolist()
    assert len(found.sizes) == 4
    assert sum(found.sizes) == len(found.index)
    assert min(found.sizes) >= 4
    by_row = expected.sum(1).tolist()
    assert [sum(found.sizes[:2]), *found.sizes[2:], 0] == by_row


@pytest.mark.parametrize("name", EVERY)
def test_each_picture_of_a_row_owns_what_it_owns_alone(built: Built, name: str) -> None:
    model, processor = built(name)
    family = family_of(model)
    both = mixed()[:1]
    sizes = family.visual_tokens(model.config, collated(processor, both)).sizes
    alone = [
        int(seen(model, collated(processor, [{**make_samples(1)[0], "images": [image]}])).sum())
        for image in both[0]["images"]
    ]
    if family.served_images is None:
        assert list(sizes) == alone
    else:  # laid out anew beside another: each has its base view
        assert len(set(sizes)) == 1
        assert sizes[0] < min(alone)


@pytest.mark.parametrize("name", EVERY)
def test_a_batch_of_text_has_no_visual_token(built: Built, name: str) -> None:
    model, processor = built(name)
    batch = collated(processor, make_samples(2, seed=3, images=0))
    found = family_of(model).visual_tokens(model.config, batch)
    assert (len(found.index), found.sizes) == (0, ())
    assert not seen(model, batch).any()


@pytest.mark.parametrize("name", EVERY)
def test_videos_where_the_family_takes_them(built: Built, name: str) -> None:
    """A video is one unit of the relation, however its frames are written."""
    model, processor = built(name)
    if not takes_video(model):
        with pytest.raises(SampleError) as caught:
            filmed(processor)
        assert caught.value.reason == "video_unsupported"
        return
    for frames in (2, 6):
        batch = filmed(processor, frames)
        found = family_of(model).visual_tokens(model.config, batch)
        expected = seen(model, batch).flatten().nonzero().squeeze(1).tolist()
        assert found.index.tolist() == expected
        assert found.sizes == (len(expected),)
    assert len(expected) > 4


STACKED = ("llava_onevision", "internvl")
"""Families whose processor takes videos of one length in a batch; `training_rows` refuses others."""


@pytest.mark.parametrize("name", EVERY)
def test_each_video_of_a_batch_owns_what_it_owns_alone(built: Built, name: str) -> None:
    """Two videos of different length, a picture between them and one beside the second; two of one length where stacked."""
    model, processor = built(name)
    if not takes_video(model):
        return
    family, lengths = family_of(model), (4, 4) if name in STACKED else (2, 10)
    short, long = (film(frames, seed) for seed, frames in enumerate(lengths))
    picture = make_samples(1, seed=4)[0]
    both = {**long, "images": picture["images"]}
    both["messages"] = [
        {"role": "user", "content": [*long["messages"][0]["content"], {"type": "image"}]}, long["messages"][1],
    ]  # fmt: skip
    batch = collated(processor, [short, picture, both])
    found = family.visual_tokens(model.config, batch)
    alone = [int(seen(model, collated(processor, [row])).sum()) for row in (short, long, picture)]
    expected = seen(model, batch)
    assert sorted(found.index.tolist()) == expected.flatten().nonzero().squeeze(1).tolist()
    assert len(set(alone[:2])) == (1 if name in STACKED else 2)
    rows_of = [index // expected.shape[1] for index in found.index.tolist()]  # each unit lies in one row
    units = [set(rows_of[sum(found.sizes[:n]) : sum(found.sizes[: n + 1])]) for n in range(len(found.sizes))]
    owned = sorted((*unit, size) for unit, size in zip(units, found.sizes, strict=True))
    assert owned == sorted([(0, alone[0]), (1, alone[2]), (2, alone[1]), (2, alone[2])])
    if name not in STACKED:
        return
    with pytest.raises(Exception):  # noqa: B017, PT011 - processors raise what they like
        collated(processor, [film(2), film(6)])


@pytest.mark.parametrize("name", EVERY)
def test_a_cut_picture_is_refused(built: Built, name: str) -> None:
    model, processor = built(name)
    batch = collated(processor, make_samples(2, seed=1))
    family = family_of(model)
    last = family.visual_tokens(model.config, batch).index[-1]
    batch["input_ids"].view(-1)[last] = processor.tokenizer.pad_token_id
    with pytest.raises(ValueError, match=rf"family '{family.model_type}'.*own \d+; were visual tokens cut"):
        family.visual_tokens(model.config, batch)


@pytest.mark.parametrize("name", EVERY)
def test_all_linears_of_the_decoder_are_quantized_and_nothing_else(name: str) -> None:
    model, _ = build(name)
    family = family_of(model)
    family.unfuse_experts(model)
    chosen = {
        id(module) for module in dict(match_named_modules(model, ["Linear"], family.quantization_ignore())).values()
    }
    inside = {id(m) for m in family.text_model(model).layers.modules() if isinstance(m, nn.Linear)}
    outside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    assert chosen == inside
    assert len(inside) >= 7 * len(family.text_model(model).layers)
    assert any("lm_head" in n for n in outside)
    for ignored in outside:  # vLLM drops transformers' outer "model."
        assert matches(ignored, family.quantization_ignore())
        assert matches(ignored.removeprefix("model."), family.quantization_ignore())


@pytest.mark.parametrize("name", EVERY)
def test_no_pattern_reaches_into_the_decoder_under_vllms_names(built: Built, name: str) -> None:
    model, _ = built(name)
    family = family_of(model)
    decoder = family.decoder.removeprefix("model.")
    for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.experts"):
        for full in (f"{decoder}.model.layers.0.{layer}", f"model.{decoder}.layers.0.{layer}"):
            assert not matches(full, family.quantization_ignore())
    assert matches("language_model.lm_head", family.quantization_ignore())


def test_a_router_is_left_alone() -> None:
    routed = [name for name in EVERY if family_of(build(name)[0]).router]
    assert routed
    for name in routed:
        model, processor = build(name)
        family, batch = family_of(model), collated(processor, make_samples(1, seed=1))
        assert matches("language_model.model.layers.0.mlp.gate", family.quantization_ignore())
        with torch.no_grad():
            before = model(**batch).logits
            fused = sum(parameter.numel() for parameter in model.parameters())
            family.unfuse_experts(model)
            after = model(**batch).logits
        assert fused == sum(parameter.numel() for parameter in model.parameters())
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
        assert all(type(module._parameters) is dict for module in model.modules())  # nothing is pinned to a device
        experts = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".experts." in n]
        assert len(experts) == 3 * model.config.text_config.num_experts * len(family.text_model(model).layers)


@pytest.mark.parametrize("name", EVERY)
def test_tower_is_frozen_projector_and_decoder_train(built: Built, name: str) -> None:
    model, _ = built(name)
    family = family_of(model)
    trained = {n: family.trains(n) for n, _ in model.named_parameters()}
    decoder = {n for n in trained if n.startswith(f"{family.decoder}.")}
    projector = {n for n in trained if matches(n, family.projector)}
    assert decoder and projector
    assert all(trained[n] for n in decoder | projector)
    frozen = {n for n in trained if not trained[n]}
    assert frozen
    assert not frozen & (decoder | projector)
    assert all(matches(n, family.vision) for n in frozen)


def relation(model: Any, teacher: Any, batch: dict[str, Tensor]) -> Any:
    """The relational loss of a batch between two models of a family."""
    family = family_of(model)
    visual = family.visual_tokens(model.config, batch)
    with torch.no_grad(), capture(family.text_model(teacher)) as theirs:
        teacher(**model_inputs(batch))
    with capture(family.text_model(model)) as ours:
        model(**model_inputs(batch))
    assert ours.penultimate is not None and theirs.penultimate is not None
    rows_s, rows_t = (state.flatten(0, 1)[visual.index] for state in (ours.penultimate, theirs.penultimate))
    return relational_loss(rows_s, rows_t, visual.sizes)


@pytest.mark.parametrize("name", EVERY)
def test_the_relation_has_a_gradient_for_images_and_videos(name: str) -> None:
    model, processor = build(name)
    teacher, _ = build(name, seed=1, hidden=512, layers=4, vocab_rows=400)
    batches = [(collated(processor, mixed()), 4)]
    if takes_video(model):
        batches.append((filmed(processor), 1))
    for batch, kinds in batches:
        model.zero_grad()
        out = relation(model, teacher, batch)
        assert int(out.skipped) == 0
        assert 0.0 < float(out.loss_sum.detach()) < kinds
        out.loss_sum.backward()
        gradient = family_of(model).text_model(model).layers[0].self_attn.q_proj.weight.grad
        assert gradient is not None
        assert torch.isfinite(gradient).all()
        assert float(gradient.abs().max()) > 0


@pytest.mark.parametrize("name", EVERY)
def test_states_are_the_layers_own_and_the_head_only_multiplies(built: Built, name: str) -> None:
    model, processor = built(name)
    batch = collated(processor, mixed())
    decoder = family_of(model).text_model(model)
    outputs: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder.layers
    ]
    with torch.no_grad(), capture(decoder) as caught:
        logits = model(**batch).logits
    for handle in handles:
        handle.remove()
    assert caught.final is not None
    assert caught.penultimate is outputs[-2]
    with torch.no_grad():
        torch.testing.assert_close(model.get_output_embeddings()(caught.final), logits, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(decoder.norm(outputs[-1]), caught.final, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", EVERY)
def test_every_value_of_the_geometry_is_compared(built: Built, name: str) -> None:
    model, _ = built(name)
    family = family_of(model)
    check_pixels(family, model.config, family, model.config)

    class Other(type(family)):  # type: ignore[misc]
        changed = ""

        def pixel_signature(self, config: Any) -> dict[str, Any]:
            return super().pixel_signature(config) | {self.changed: "another"}

    for key, value in family.pixel_signature(model.config).items():
        other: Family = Other()
        other.changed = key  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match="see images differently") as caught:
            check_pixels(family, model.config, other, model.config)
        assert f"{key}: {value!r} / 'another'" in str(caught.value)


def test_the_cap_of_a_heads_logits_is_read_from_the_decoders_config() -> None:
    model, _ = build("gemma3")
    assert family_of(model).softcap(model.config) is None
    model.config.text_config.final_logit_softcapping = 30.0
    assert family_of(model).softcap(model.config) == 30.0


@pytest.mark.parametrize("most", [1, 2, 9])
def test_a_mosaic_with_too_many_patches_is_shrunk(most: int) -> None:
    model, processor = build("llava_onevision")
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = f"anyres_max_{most}"
    batch = collated(processor, make_samples(1, seed=5, size=112))
    found = family_of(model).visual_tokens(model.config, batch)
    assert found.index.tolist() == seen(model, batch).flatten().nonzero().squeeze(1).tolist()
    assert sum(found.sizes) == 16 + {1: 16, 2: 25, 9: 64}[most]
