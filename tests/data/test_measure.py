"""Lengths counted without the pixels are those of the batches, for every family, whatever stands around the images."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from grace_plugin.data import ConversationCollator, SampleError
from grace_plugin.data.image_layout import Layout
from grace_plugin.data.measure import Measure
from grace_plugin.vlm import family_of
from tests.tiny import EVERY, build

SIZES = ((64, 48), (48, 64), (112, 112), (100, 40), (57, 83), (90, 61), (64, 48), (20, 110))
AROUND = (("", "what is it?"), ("", "\n\nsay\n"), ("inspect this\n\n", "what <image> is it?"), ("say ", " left"))


def sample(number: int, images: int) -> dict[str, Any]:
    """A sample whose images differ in size from sample to sample, with text that may run into what stands around an image."""
    before, after = AROUND[number % len(AROUND)]
    shown = [Image.new("RGB", SIZES[(number + k) % len(SIZES)]) for k in range(images)]
    asked = [{"type": "text", "text": before}, *[{"type": "image"}] * images, {"type": "text", "text": after}]
    again = [{"role": "user", "content": "and which?"}, {"role": "assistant", "content": "two"}]
    talk = [{"role": "user", "content": asked}, {"role": "assistant", "content": "a red square"}]
    return {"messages": talk + again * (number % 2), "images": shown}


@pytest.mark.parametrize("name", EVERY)
def test_measure__counted_lengths__those_of_the_batches(name: str) -> None:
    model, processor = build(name)
    collator = ConversationCollator(processor)
    measure = Measure(collator)
    token = family_of(model).token_ids(model.config)["image"]
    for number in range(12):
        for images in (1, 2):
            given = sample(number, images)
            entry, batch = measure(given, number), collator([given])
            assert entry.reason == ""
            assert entry.tokens == batch["input_ids"].shape[1]
            assert entry.visual == int((batch["input_ids"] == token).sum()) >= 4
            assert entry.supervised == int((batch["labels"] != -100).sum())


@pytest.mark.parametrize("name", EVERY)
def test_layout__image_token__the_models_own(name: str) -> None:
    model, processor = build(name)
    own = family_of(model).token_ids(model.config)
    layout = Layout(processor, ConversationCollator(processor).segmenter.placeholders["image"])
    assert set(own.values()) <= layout.visual_ids()


class Blind(Layout):
    """A layout that can no longer run its processor."""

    def _expanded(self, size: tuple[int, int], alone: bool) -> str:
        raise OSError("no more images")


@pytest.mark.parametrize(("name", "believed"), [("qwen2_vl", True), ("llava_onevision", True), ("pixtral", False)])
def test_layout__stated_counts__used_only_after_they_agreed(name: str, believed: bool) -> None:
    """With arithmetic that is right, no more images are run after three sizes; where text varies with the size, each is."""
    processor = build(name)[1]
    layout = Layout(processor, ConversationCollator(processor).segmenter.placeholders["image"])
    for size in SIZES[:4]:
        layout.written(size, True, "r")
    before = layout.written((84, 112), True, "r")
    layout.__class__ = Blind
    assert layout.written((84, 112), True, "r") == before
    if believed:
        assert layout.written((56, 112), True, "r").visual > 0
    else:
        with pytest.raises(SampleError, match=r"r: the model's processor refuses an image of 112 x 56 pixels: no more"):
            layout.written((56, 112), True, "r")


class Changing(Layout):
    """Qwen's layout, but that at the third size its text or its arithmetic is another; counts the images it ran."""

    ran = 0
    what = "text"

    def _expanded(self, size: tuple[int, int], alone: bool) -> str:
        self.ran += 1
        return super()._expanded(size, alone) + "\n" * (size == SIZES[2] and self.what == "text")

    def _states(self, size: tuple[int, int]) -> int | None:
        stated = super()._states(size)
        return stated if size != SIZES[2] or stated is None or self.what == "text" else stated + 1


@pytest.mark.parametrize("what", ["text", "arithmetic"])
def test_layout__stated_counts_wrong_once__never_used(what: str) -> None:
    processor = build("qwen2_vl")[1]
    layout = Changing(processor, ConversationCollator(processor).segmenter.placeholders["image"])
    layout.what = what
    found = [layout.written(size, True, "r") for size in SIZES[:6]]
    assert [one.text.endswith("\n") for one in found] == [number == 2 and what == "text" for number in range(6)]
    before = layout.ran
    layout.written((84, 112), True, "r")
    assert layout.ran == before + 1
