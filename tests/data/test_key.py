"""A sample's key is its content: the same however it is spelled, another when a word, a pixel or the order changes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace_plugin.data import ConversationCollator, SampleError, processor_settings, sample_key
from tests.tiny import build, make_samples, save
from tests.tiny_text import make_samples as draw


def turned(image: Image.Image) -> Image.Image:
    copy = image.copy()
    copy.getexif()[0x0112] = 6
    return copy


def test_sample_key__changed_fields__content_counts_and_names_do_not() -> None:
    (sample,) = make_samples(1, images=2)
    first, second = sample["images"]
    key = sample_key(sample)
    assert len(key) == 64 and sample_key(draw(1, images=2)[0]) == key
    assert sample_key({**sample, "id": "a", "name": "b"}) == key
    plain = [{"role": "assistant", "content": sample["messages"][1]["content"][0]["text"]}]
    assert sample_key({**sample, "messages": [sample["messages"][0], *plain]}) == key
    one = first.copy()
    one.putpixel((0, 0), tuple(255 - c for c in one.getpixel((0, 0))))
    said = [sample["messages"][0], {"role": "assistant", "content": "something else"}]
    others = [
        {**sample, "images": [second, first]},
        {**sample, "images": [one, second]},
        {**sample, "messages": said},
        {**sample, "images": [first.convert("RGBA"), second]},
        {**sample, "images": [turned(first), second]},
    ]
    keys = {sample_key(other) for other in others}
    assert len(keys) == 5 and key not in keys


def test_sample_key__files__hashed_by_their_bytes(tmp_path: Path) -> None:
    (sample,) = make_samples(1)
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        sample["images"][0].save(path)
    content = paths[0].read_bytes()
    ways: list[Any] = [
        str(paths[0]),
        paths[1],
        {"bytes": content, "path": None},
        {"bytes": None, "path": str(paths[0])},
    ]
    assert len({sample_key({**sample, "images": [way]}) for way in ways}) == 1
    sample["images"][0].rotate(90).save(paths[1])
    assert sample_key({**sample, "images": [paths[0]]}) != sample_key({**sample, "images": [paths[1]]})
    with pytest.raises(SampleError, match=r"sample 7: cannot read image '.*none\.png'"):
        sample_key({**sample, "images": [tmp_path / "none.png"]}, 7)


def test_sample_key__videos_as_frames_arrays_files__told_apart(tmp_path: Path) -> None:
    frames = [sample["images"][0].resize((64, 64)) for sample in make_samples(3)]
    content = [{"type": "video"}, {"type": "text", "text": "what?"}]
    said = [{"role": "user", "content": content}, {"role": "assistant", "content": "this"}]
    (tmp_path / "film.mp4").write_bytes(b"film")
    array = np.stack([np.asarray(frame) for frame in frames])
    forms: list[Any] = [frames, frames[::-1], array, array[::-1], array[:2], str(tmp_path / "film.mp4")]
    keys = [sample_key({"messages": said, "videos": [video]}) for video in forms]
    assert len(set(keys)) == 6
    assert sample_key({"messages": said, "videos": [frames], "fps": 1.0}) != keys[0]
    assert sample_key({"messages": said, "videos": [frames], "fps": 2.0}) == keys[0]


def test_collate__keys_false__no_keys() -> None:
    _, processor = build("llava")
    dataset = make_samples(2)
    assert "sample_key" not in ConversationCollator(processor)(dataset)
    assert ConversationCollator(processor, keys=True)(dataset)["sample_key"] == [
        sample_key(sample) for sample in dataset
    ]


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_processor_settings__saved_and_read_again__equal(family: str, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    model, processor = build(family)
    save(model, processor, tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    settings = processor_settings(AutoProcessor.from_pretrained(tmp_path / "a"))
    again = AutoProcessor.from_pretrained(tmp_path / "b")
    again(text=["a", "a longer text"], padding=True, truncation=True, max_length=3)
    assert processor_settings(again) == settings
    again.image_processor.size = {"shortest_edge": 28, "longest_edge": 56}
    again.tokenizer.add_tokens(["zyzzyva"])
    again.chat_template += " "
    changed = processor_settings(again)
    different = {key for key in settings.keys() | changed.keys() if settings.get(key) != changed.get(key)}
    assert different == {"image_processor.size", "tokenizer", "chat_template"}
