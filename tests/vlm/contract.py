"""What every family of vision-language models must satisfy, judged by what the model itself does with a batch.

A test class inherits from `FamilyContract` and says which models are built (`test_contract.py`, `test_custom_family.py`). The
oracle for positions is the decoder's input: where its embeddings are not those of the token ids, the model has put a visual
token or a learned newline. It reads no config, no token id and no grid, so it shares nothing with the families.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grace_plugin.data import ConversationCollator, SampleError
from grace_plugin.losses.relational import relational_loss
from grace_plugin.teacher.base import model_inputs
from grace_plugin.upstream import match_named_modules
from grace_plugin.vlm import Family, capture, check_pixels, family_of, matches
from tests.tiny import build, make_samples
from tests.videos import video_samples

Built = tuple[Any, Any]


def mixed() -> list[dict[str, Any]]:
    """Two images of different size in one sample, one in two samples, none in the last."""
    return make_samples(1, seed=4, images=2) + make_samples(2, seed=1) + make_samples(1, seed=3, images=0)


def collated(processor: Any, chosen: list[dict[str, Any]]) -> dict[str, Tensor]:
    batch = ConversationCollator(processor)(chosen)
    batch.pop("labels")
    return batch


def video_sample(frames: int, seed: int = 0) -> dict[str, Any]:
    """A sample with one video."""
    asked = video_samples(seed + 1, frames)[seed]
    answer = {"role": "assistant", "content": "a red square"}
    return {"messages": [*asked["messages"], answer], "videos": [list(asked["videos"][0][0])]}


def video_batch(processor: Any, frames: int = 4) -> dict[str, Tensor]:
    """A batch of one video."""
    return collated(processor, [video_sample(frames)])


def replaced(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """bool [B, S]: where the decoder's input is not the embedding of the token, learned newlines excepted."""
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


STACKED = ("llava_onevision", "internvl")
"""Families whose processor takes videos of one length in a batch; `prepare` refuses others."""


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


@lru_cache
def shared_build(name: str) -> Built:
    """A model and its processor for all tests that leave them as they are."""
    return build(name)


class FamilyContract:
    """Tests of one family each; a subclass is parametrized by `name`, over models that `tests.tiny.build` makes."""

    name: str

    @pytest.fixture(autouse=True)
    def set_name(self, name: str) -> None:
        self.name = name

    def build(self, **options: Any) -> Built:
        """A new tiny model and its processor."""
        return build(self.name, **options)

    @pytest.fixture
    def built(self) -> Built:
        """A model and its processor, never changed."""
        return shared_build(self.name)

    def test_visual_tokens__mixed_batch__where_the_decoder_gets_other_embeddings(self, built: Built) -> None:
        model, processor = built
        batch = collated(processor, mixed())
        found = family_of(model).visual_tokens(model.config, batch)
        expected = replaced(model, batch)
        assert found.index.tolist() == expected.flatten().nonzero().squeeze(1).tolist()
        assert len(found.sizes) == 4
        assert sum(found.sizes) == len(found.index)
        assert min(found.sizes) >= 4
        by_row = expected.sum(1).tolist()
        assert [sum(found.sizes[:2]), *found.sizes[2:], 0] == by_row

    def test_sizes__two_images_in_a_sample__as_each_alone(self, built: Built) -> None:
        model, processor = built
        family = family_of(model)
        both = mixed()[:1]
        sizes = family.visual_tokens(model.config, collated(processor, both)).sizes
        alone = [
            int(replaced(model, collated(processor, [{**make_samples(1)[0], "images": [image]}])).sum())
            for image in both[0]["images"]
        ]
        if family.served_images is None:
            assert list(sizes) == alone
        else:  # several images of a sample have their base views alone
            assert len(set(sizes)) == 1
            assert sizes[0] < min(alone)

    def test_visual_tokens__text_only__none(self, built: Built) -> None:
        model, processor = built
        batch = collated(processor, make_samples(2, seed=3, images=0))
        found = family_of(model).visual_tokens(model.config, batch)
        assert (len(found.index), found.sizes) == (0, ())
        assert not replaced(model, batch).any()

    def test_videos__one_in_a_batch__one_unit_or_refused(self, built: Built) -> None:
        """A video is one unit of the relation, however its frames are written."""
        model, processor = built
        if not takes_video(model):
            with pytest.raises(SampleError) as caught:
                video_batch(processor)
            assert caught.value.reason == "video_unsupported"
            return
        for frames in (2, 6):
            batch = video_batch(processor, frames)
            found = family_of(model).visual_tokens(model.config, batch)
            expected = replaced(model, batch).flatten().nonzero().squeeze(1).tolist()
            assert found.index.tolist() == expected
            assert found.sizes == (len(expected),)
        assert len(expected) > 4

    def test_videos__several_in_a_batch__as_each_alone(self, built: Built) -> None:
        """Two videos of different length, an image between them and one with the second; one length where stacked."""
        model, processor = built
        if not takes_video(model):
            return
        family, lengths = family_of(model), (4, 4) if self.name in STACKED else (2, 10)
        short, long = (video_sample(frames, seed) for seed, frames in enumerate(lengths))
        image = make_samples(1, seed=4)[0]
        both = {**long, "images": image["images"]}
        both["messages"] = [
            {"role": "user", "content": [*long["messages"][0]["content"], {"type": "image"}]}, long["messages"][1],
        ]  # fmt: skip
        batch = collated(processor, [short, image, both])
        found = family.visual_tokens(model.config, batch)
        alone = [int(replaced(model, collated(processor, [row])).sum()) for row in (short, long, image)]
        expected = replaced(model, batch)
        assert sorted(found.index.tolist()) == expected.flatten().nonzero().squeeze(1).tolist()
        assert len(set(alone[:2])) == (1 if self.name in STACKED else 2)
        rows_of = [index // expected.shape[1] for index in found.index.tolist()]  # each unit lies in one row
        units = [set(rows_of[sum(found.sizes[:n]) : sum(found.sizes[: n + 1])]) for n in range(len(found.sizes))]
        owned = sorted((*unit, size) for unit, size in zip(units, found.sizes, strict=True))
        assert owned == sorted([(0, alone[0]), (1, alone[2]), (2, alone[1]), (2, alone[2])])
        if self.name not in STACKED:
            return
        with pytest.raises(Exception):  # noqa: B017, PT011 - processors raise what they like
            collated(processor, [video_sample(2), video_sample(6)])

    def test_visual_tokens__truncated_image__refused(self, built: Built) -> None:
        model, processor = built
        batch = collated(processor, make_samples(2, seed=1))
        family = family_of(model)
        last = family.visual_tokens(model.config, batch).index[-1]
        batch["input_ids"].view(-1)[last] = processor.tokenizer.pad_token_id
        with pytest.raises(ValueError, match=rf"family '{family.model_type}'.*own \d+; were visual tokens cut"):
            family.visual_tokens(model.config, batch)

    def test_quantization_ignore__all_linears__decoder_alone_quantized(self) -> None:
        model, _ = self.build()
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

    def test_quantization_ignore__vllm_names__decoder_not_matched(self, built: Built) -> None:
        model, _ = built
        family = family_of(model)
        decoder = family.decoder.removeprefix("model.")
        for layer in ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj", "mlp.experts"):
            for full in (f"{decoder}.model.layers.0.{layer}", f"model.{decoder}.layers.0.{layer}"):
                assert not matches(full, family.quantization_ignore())
        assert matches("language_model.lm_head", family.quantization_ignore())

    def test_trains__by_default__projector_and_decoder(self, built: Built) -> None:
        model, _ = built
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

    def test_relational_loss__images_and_videos__finite_gradient(self) -> None:
        model, processor = self.build()
        teacher, _ = self.build(seed=1, hidden=512, layers=4, vocab_rows=400)
        batches = [(collated(processor, mixed()), 4)]
        if takes_video(model):
            batches.append((video_batch(processor), 1))
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

    def test_logits__of_captured_states__product_with_the_head(self, built: Built) -> None:
        model, processor = built
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

    def test_pixel_signature__each_value_altered__refused(self, built: Built) -> None:
        model, _ = built
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

    def test_vllm_layers__decoder_linears__fused_and_row_parallel_exist(self) -> None:
        model, _ = self.build()
        family = family_of(model)
        family.unfuse_experts(model)
        linears = {n for n, m in family.text_model(model).layers.named_modules() if isinstance(m, nn.Linear)}
        parents = {name.rpartition(".")[0] for name in linears}
        for parts in family.fused:
            assert any({f"{parent}.{part}" for part in parts} <= linears for parent in parents), parts
        assert set(family.row_parallel) <= {name.rpartition(".")[2] for name in linears}
