"""Images in content parts: their paths, their own bounds, and what a template leaves out of a sample."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from grace_plugin.data import ConversationCollator, SampleError, load_samples, prepare, read_sample, sample_key
from grace_plugin.data.index import stamp
from tests.tiny import build, make_samples

ANSWER = {"role": "assistant", "content": "red"}


def shown(image: Any, **bounds: int) -> dict[str, Any]:
    part = {"type": "image", "image": image, **bounds}
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": "q"}]}, ANSWER]}


def test_load_samples__paths_in_parts__are_relative_to_the_image_folder_and_watched(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (64, 64), (200, 0, 0)).save(tmp_path / "pictures" / "a.png")
    forms = [
        {"type": "image", "image": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image", "path": "a.png"},
    ]
    samples = [{"messages": [{"role": "user", "content": [part]}, ANSWER]} for part in forms]
    (tmp_path / "s.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    loaded = load_samples(str(tmp_path / "s.jsonl"), str(tmp_path / "pictures"))
    for sample in loaded:
        assert read_sample(sample).images[0].getpixel((3, 3)) == (200, 0, 0)
    before = [stamp(sample) for sample in loaded]
    os.utime(tmp_path / "pictures" / "a.png", ns=(1, 1))
    assert all(old and new and old != new for old, new in zip(before, map(stamp, loaded), strict=True))


@pytest.mark.parametrize(
    ("bounds", "size"),
    [
        ({"max_pixels": 6000}, (56, 84)),
        ({"resized_height": 60, "resized_width": 90}, (56, 84)),
        ({"min_pixels": 9500}, (84, 140)),
    ],
)
def test_collate__bounds_of_one_image__give_the_pixels_of_that_image_resized(bounds: dict[str, int], size: Any) -> None:
    """The oracle resizes by hand to a size worked out by hand: multiples of 28 of an image of 80 x 120 pixels."""
    processor = build("qwen2_vl")[1]
    image = make_samples(1, size=120)[0]["images"][0].crop((0, 0, 120, 80))
    collator = ConversationCollator(processor)
    found, plain = collator([shown(image, **bounds)]), collator([shown(image)])
    expected = collator([shown(image.resize((size[1], size[0])))])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])
    assert torch.equal(found["image_grid_thw"], expected["image_grid_thw"])
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert found["image_grid_thw"][0].tolist() == [1, size[0] // 14, size[1] // 14]
    assert not torch.equal(found["pixel_values"].sum(), plain["pixel_values"].sum())
    kept = prepare([shown(image, **bounds)], collator)
    assert kept.lengths.tolist() == [found["input_ids"].shape[1]]
    assert sample_key(shown(image, **bounds)) != sample_key(shown(image))


@pytest.mark.parametrize(
    ("family", "bounds", "message"),
    [
        ("llava", {"max_pixels": 6000}, "the model's image processor takes no bounds for single images; set its size"),
        (
            "qwen2_vl",
            {"resized_height": 560, "resized_width": 560},
            "outside the processor's own bounds of 3136 to 12544",
        ),
        ("qwen2_vl", {"max_pixels": 3000}, "min_pixels 3136 is above max_pixels 3000, of which one is the processor's"),
    ],
)
def test_collate__bounds_that_cannot_be_honoured__are_refused(
    family: str, bounds: dict[str, int], message: str
) -> None:
    sample = shown(Image.new("RGB", (120, 80)), **bounds)
    collator = ConversationCollator(build(family)[1])
    with pytest.raises(SampleError, match=message):
        collator([sample])
    found = prepare([sample], collator, max_bad_samples=1.0, allow_empty=True)
    assert found.report["rejected"] == {"unknown_field": 1}


def test_template__system_turn_that_it_leaves_out__is_refused() -> None:
    processor = build("qwen2_vl")[1]
    processor.chat_template = (
        "{% for m in messages if m['role'] != 'system' %}" + processor.chat_template.split("%}", 1)[1]
    )
    collator = ConversationCollator(processor)
    sample = {"system": "short", "messages": [{"role": "user", "content": "q"}, ANSWER]}
    with pytest.raises(SampleError, match="leaves out or rewrites the text of a system turn") as caught:
        collator([sample])
    assert caught.value.reason == "template"
    assert collator([{"messages": sample["messages"]}])["input_ids"].shape[0] == 1


def test_report__unused_fields__are_counted_over_the_samples() -> None:
    talked = {"messages": [{"role": "user", "content": "q"}, ANSWER]}
    found = prepare(
        [{**talked, "hardness": 3}, {**talked, "hardness": 4, "topic": "x"}, talked],
        ConversationCollator(build("llava")[1]),
    )
    assert found.report["unused_fields"] == {"hardness": 2, "topic": 1}
