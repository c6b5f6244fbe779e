"""Visual tokens of every family against what its own processor inserted, what trains, and what stays unquantized."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from grace_plugin.data import ConversationCollator
from grace_plugin.vlm import Family, capture, check_depth, check_pixels, family_of
from tests.pairs import mixed_samples
from tests.tiny import FAMILIES, build, make_samples

BATCHES = {
    "one picture": lambda: make_samples(3, seed=1),
    "two pictures": lambda: make_samples(2, seed=2, images=2),
    "mixed with text": lambda: mixed_samples(6),
    "text only": lambda: make_samples(2, seed=3, images=0),
}


@pytest.fixture(scope="module")
def built() -> Callable[[str], tuple[Any, Any]]:
    """family -> a model and its processor, never changed."""
    made: dict[str, tuple[Any, Any]] = {}

    def get(family: str) -> tuple[Any, Any]:
        if family not in made:
            made[family] = build(family)
        return made[family]

    return get


def features_per_image(model: Any, batch: dict[str, Any]) -> list[int]:
    """Return how many vectors the model's own vision path makes of each image."""
    if "pixel_values" not in batch:
        return []
    kwargs = {"image_grid_thw": batch["image_grid_thw"]} if "image_grid_thw" in batch else {}
    with torch.no_grad():
        features = model.get_image_features(pixel_values=batch["pixel_values"], **kwargs)
    features = getattr(features, "pooler_output", features)
    return [len(f) for f in features]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", BATCHES)
def test_visual_tokens__by_batch_kind__those_the_processor_inserted(built: Any, family: str, kind: str) -> None:
    model, processor = built(family)
    chosen = BATCHES[kind]()
    batch = ConversationCollator(processor)(chosen)
    found = family_of(model).visual_tokens(model.config, batch)
    placeholder = processor.tokenizer.convert_tokens_to_ids({"llava": "<image>"}.get(family, "<|image_pad|>"))
    expected = [i for i, token in enumerate(batch["input_ids"].flatten().tolist()) if token == placeholder]
    assert found.index.tolist() == expected
    assert list(found.sizes) == features_per_image(model, batch)
    assert len(found.sizes) == sum(len(row["images"]) for row in chosen)
    assert sum(found.sizes) == len(expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_sizes__dynamic_resolution__differ_between_images(built: Any, family: str) -> None:
    model, processor = built(family)
    batch = ConversationCollator(processor)(make_samples(6, seed=1))
    assert len(set(family_of(model).visual_tokens(model.config, batch).sizes)) > 1


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_visual_tokens__image_and_video__images_first(built: Any, family: str) -> None:
    model, processor = built(family)
    video = np.random.default_rng(0).integers(0, 255, (4, 64, 96, 3), dtype=np.uint8)
    text = "<|vision_start|><|video_pad|><|vision_end|> and <|vision_start|><|image_pad|><|vision_end|>"
    metadata = {"fps": 2, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3]}
    extra = {"video_metadata": [metadata]} if family == "qwen3_vl" else {}
    batch = processor(
        text=[text],
        images=make_samples(1)[0]["images"],
        videos=[video],
        return_tensors="pt",
        do_sample_frames=False,
        **extra,
    )
    found = family_of(model).visual_tokens(model.config, batch)
    ids = batch["input_ids"].flatten()
    video_id, image_id = (processor.tokenizer.convert_tokens_to_ids(t) for t in ("<|video_pad|>", "<|image_pad|>"))
    assert list(found.sizes) == [int((ids == image_id).sum()), int((ids == video_id).sum())]
    assert min(found.sizes) > 0
    assert set(ids[found.index[: found.sizes[0]]].tolist()) == {image_id}
    assert set(ids[found.index[found.sizes[0] :]].tolist()) == {video_id}
    with torch.no_grad():
        assert model(**batch).logits.shape[1] == len(ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens__pixels_without_tokens__family_and_file_named(built: Any, family: str) -> None:
    model, processor = built(family)
    batch = ConversationCollator(processor)(make_samples(1))
    batch["input_ids"] = torch.full_like(batch["input_ids"], 9)
    file = "llava.py" if family == "llava" else "qwen_vl.py"
    with pytest.raises(ValueError, match=rf"family '{family}' \({file}\): the batch carries pixel_values but no token"):
        family_of(model).visual_tokens(model.config, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens__other_token_id_in_config__refused(family: str) -> None:
    model, processor = build(family)
    batch = ConversationCollator(processor)(make_samples(1))
    model.config.image_token_id = 11 if 11 not in batch["input_ids"] else 12
    with pytest.raises(ValueError, match=f"family '{family}'.*no token with the image id 1[12]"):
        family_of(model).visual_tokens(model.config, batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_visual_tokens__tokens_without_pixels__family_and_number_named(built: Any, family: str) -> None:
    model, processor = built(family)
    batch = ConversationCollator(processor)(make_samples(1))
    total = family_of(model).visual_tokens(model.config, batch).index.numel()
    del batch["pixel_values"]
    with pytest.raises(ValueError, match=rf"family '{family}'.*{total} image tokens in the batch but no pixel_values"):
        family_of(model).visual_tokens(model.config, batch)


def test_family_of__unknown__named_with_how_to_add_it() -> None:
    model, _ = build("llava")
    model.config.model_type = "idefics9"
    with pytest.raises(
        ValueError,
        match=r"'idefics9' \(LlavaFor.*known: \['gemma3', .*'smolvlm'\].*register_family .*or as grace_plugin/vlm/idefics9\.py",
    ):
        family_of(model)
    with pytest.raises(ValueError, match=r"model family 'None' .Linear."):
        family_of(nn.Linear(1, 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_trains__by_parameter_name__projector_and_decoder_alone(built: Any, family: str) -> None:
    model, _ = built(family)
    trained = {name for name, _ in model.named_parameters() if family_of(model).trains(name)}
    frozen = {name for name, _ in model.named_parameters()} - trained
    projector = re.compile(r"model\.(multi_modal_projector|visual\.(merger|deepstack_merger_list))\.")
    tower = re.compile(r"model\.(vision_tower|visual)\.")
    assert frozen
    assert all(tower.match(name) and not projector.match(name) for name in frozen)
    assert any(projector.match(name) for name in trained)
    assert {"lm_head.weight", "model.language_model.norm.weight"} <= trained
    assert not any(tower.match(name) and not projector.match(name) for name in trained)
    if family == "qwen3_vl":
        assert any("deepstack_merger_list" in name for name in trained)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layers", [2, 4])
def test_capture__several_layers__penultimate_of_layer_l_minus_2(family: str, layers: int) -> None:
    model, processor = build(family, layers=layers)
    batch = ConversationCollator(processor)(make_samples(2, images=0) if family == "qwen3_vl" else make_samples(2))
    batch.pop("labels")
    decoder = family_of(model).text_model(model)
    outputs: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
        for layer in decoder.layers
    ]
    with torch.no_grad(), capture(decoder) as caught:
        states = model(**batch, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    assert torch.equal(caught.penultimate, states[layers - 1])
    assert torch.equal(caught.penultimate, outputs[-2])
    assert torch.equal(caught.final, decoder.norm(outputs[-1]))
    assert torch.equal(caught.final, states[-1])
    assert not torch.equal(caught.final, outputs[-1])
    assert not torch.equal(caught.penultimate, outputs[-1])


def test_capture__deepstack__output_of_the_layer_itself(built: Any) -> None:
    """Qwen3-VL adds visual features behind its first layers; what is compared is the output of layer L-2 itself."""
    model, processor = built("qwen3_vl")
    batch = ConversationCollator(processor)(make_samples(1))
    batch.pop("labels")
    decoder = family_of(model).text_model(model)
    outputs: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        return lambda _m, _i, out: outputs.__setitem__(number, out[0] if isinstance(out, tuple) else out)

    handles = [layer.register_forward_hook(keep(number)) for number, layer in enumerate(decoder.layers)]
    with torch.no_grad(), capture(decoder) as caught:
        model(**batch)
    for handle in handles:
        handle.remove()
    assert caught.penultimate is outputs[len(decoder.layers) - 2]


def test_capture__two_passes__first_kept_and_no_hook_left() -> None:
    model, processor = build("llava")
    decoder = family_of(model).text_model(model)
    first, second = (ConversationCollator(processor)(make_samples(1, seed=s)) for s in (1, 2))
    with torch.no_grad(), capture(decoder) as caught:
        model(input_ids=first["input_ids"], pixel_values=first["pixel_values"])
        kept = caught.final
        model(input_ids=second["input_ids"], pixel_values=second["pixel_values"])
    assert caught.final is kept
    assert not any(module._forward_hooks for module in decoder.modules())


def test_capture__failing_pass__hooks_removed() -> None:
    model, _ = build("llava")
    decoder = family_of(model).text_model(model)
    with pytest.raises(IndexError), capture(decoder):
        model(input_ids=torch.tensor([[10**6]]))
    assert not any(module._forward_hooks for module in decoder.modules())


def test_capture__one_layer__final_states_alone() -> None:
    model, _ = build("llava", layers=1)
    with torch.no_grad(), capture(model.model.language_model) as caught:
        states = model(input_ids=torch.tensor([[5, 6]]), output_hidden_states=True).hidden_states
    assert torch.equal(caught.final, states[-1]) and caught.penultimate is None
    with pytest.raises(
        ValueError, match=r"the teacher's decoder has 1 layer\(s\); the relational term needs at least 2"
    ):
        check_depth(model.config, "teacher")
    check_depth(build("llava", layers=2)[0].config, "teacher")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("llava", "vision_config.patch_size", 28),
        ("llava", "vision_config.image_size", 112),
        ("llava", "vision_feature_select_strategy", "full"),
        ("qwen2_vl", "vision_config.patch_size", 16),
        ("qwen3_vl", "vision_config.spatial_merge_size", 4),
        ("qwen3_vl", "vision_config.temporal_patch_size", 1),
    ],
)
def test_check_pixels__other_geometry__refused_with_both_values(
    built: Any, family: str, field: str, value: Any
) -> None:
    model, _ = built(family)
    other, _ = build(family)
    owner: Any = other.config
    *path, name = field.split(".")
    for part in path:
        owner = getattr(owner, part)
    before = getattr(owner, name)
    known: Family = family_of(model)
    check_pixels(known, model.config, known, other.config)
    setattr(owner, name, value)
    with pytest.raises(ValueError, match=rf"see images differently.*{name}: {before!r} / {value!r}"):
        check_pixels(known, model.config, known, other.config)


def test_check_pixels__other_family__refused(built: Any) -> None:
    (a, _), (b, _) = built("qwen2_vl"), built("qwen3_vl")
    with pytest.raises(ValueError, match=r"student is of family 'qwen2_vl' and the teacher of 'qwen3_vl'"):
        check_pixels(family_of(a), a.config, family_of(b), b.config)
