"""What the collator remembers and does together changes no bit: the oracle makes every sample again, piece by piece.

The oracle shares the cutting of samples (`Segmenter`, made new for each sample) with the collator, and none of its memories:
images are opened by Pillow and turned in every case, texts without images are tokenised one by one, and images of one
size are not processed together.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps

from grace_plugin.data import ConversationCollator, check_sample
from grace_plugin.data.collate import TOGETHER
from grace_plugin.data.media import decode_image
from grace_plugin.data.segments import Segmenter
from grace_plugin.data.tokens import Recent
from tests.tiny import EVERY, build, make_samples

ALONG = ("input_ids", "token_type_ids", "mm_token_type_ids")


def opened(path: str) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def straightforward(processor: Any, given: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch without memory."""
    pieces: list[tuple[int, bool, str, list[Image.Image]]] = []
    for number, sample in enumerate(map(check_sample, given)):
        segmenter, images = Segmenter(processor), list(sample.images)
        for segment in segmenter.segments(sample):
            count = segmenter.count(segment.text, "image")
            pieces.append((number, segment.supervised, segment.text, [opened(path) for path in images[:count]]))
            images = images[count:]
    out: list[dict[str, list[int]]] = [{} for _ in pieces]
    shown = [i for i, piece in enumerate(pieces) if piece[3]]
    common = {"add_special_tokens": False, "return_tensors": "pt"}
    batch = dict(
        processor(
            text=[pieces[i][2] for i in shown],
            images=[pieces[i][3] for i in shown],
            padding=True,
            padding_side="right",
            **common,
        )
    )
    mask = batch.pop("attention_mask").bool()
    along = {key: batch.pop(key) for key in ALONG if key in batch}
    for place, i in enumerate(shown):
        out[i] = {key: value[place][mask[place]].tolist() for key, value in along.items()}
    for i, (_, _, text, images) in enumerate(pieces):
        if not images:
            out[i] = {"input_ids": processor.tokenizer(text=[text], **common)["input_ids"][0].tolist()}
    start = processor.tokenizer("")["input_ids"]
    joined: list[dict[str, list[int]]] = []
    for number in range(len(given)):
        own = [(piece, ids) for piece, ids in zip(pieces, out, strict=True) if piece[0] == number]
        bos = processor.tokenizer.bos_token
        before = [] if bos and own[0][0][2].startswith(bos) else start
        sample = {
            "labels": [-100] * len(before),
            **{key: [0] * len(before) for key in ALONG},
            "input_ids": list(before),
        }
        for (_, supervised, _, _), ids in own:
            tokens = ids["input_ids"]
            sample["labels"] += tokens if supervised else [-100] * len(tokens)
            for key in ALONG:
                sample[key] += ids.get(key, [0] * len(tokens))
        joined.append(sample | {"attention_mask": [1] * len(sample["input_ids"])})
    fills = {"input_ids": processor.tokenizer.pad_token_id, "labels": -100}
    kept = {"input_ids", "labels", "attention_mask"}
    kept |= {"mm_token_type_ids"} & set(processor.model_input_names)
    kept |= {"token_type_ids"} if any(any(sample["token_type_ids"]) for sample in joined) else set()
    width = max(len(sample["input_ids"]) for sample in joined)
    for key in kept:
        batch[key] = torch.tensor([sample[key] + [fills.get(key, 0)] * (width - len(sample[key])) for sample in joined])
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def on_disk(folder: Path) -> list[dict[str, Any]]:
    """Samples whose images are PNG and JPEG files of two sizes, some turned by EXIF; questions and answers repeat."""
    turned = Image.Exif()
    turned[0x0112] = 6
    made = (
        make_samples(6, seed=41)
        + make_samples(2, seed=42, images=2)
        + make_samples(2, seed=43, images=0)
        + make_samples(3, seed=41)
    )
    for number, sample in enumerate(made):
        files = []
        for place, image in enumerate(sample["images"]):
            files.append(str(folder / f"{number}-{place}.{'png' if number % 2 else 'jpg'}"))
            exif = {"exif": turned} if number % 3 == 0 else {}
            image.resize((72, 56) if number % 4 else (56, 56)).save(files[-1], **exif)
        sample["images"] = files
    return made


@pytest.mark.parametrize("family", EVERY)
def test_collate__remembered_texts__equal_to_fresh_ones_bit_for_bit(family: str, tmp_path: Path) -> None:
    """Cold, warm, in another order, and from a copy in a worker."""
    processor = build(family)[1]
    given = on_disk(tmp_path)
    expected = straightforward(processor, given)
    collator = ConversationCollator(processor)
    copied = pickle.loads(pickle.dumps(collator))
    collator(given[::-1][:7])
    for found in (ConversationCollator(processor)(given), collator(given), collator(given), copied(given)):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert found[key].dtype == value.dtype, key
            assert torch.equal(found[key], value), key


def test_collate__repeated_texts__rendered_and_tokenized_once() -> None:
    processor = build("qwen2_vl")[1]
    collator = ConversationCollator(processor)
    given = make_samples(4, seed=7, images=0)
    first = collator(given)
    processor.chat_template = "{{ raise_exception('rendered again') }}"
    again = collator(given)
    assert all(torch.equal(first[key], again[key]) for key in first)
    with pytest.raises(ValueError, match="rendered again"):
        collator(make_samples(1, seed=8))
    pairs = [[piece for sample in given for piece in collator.pieces(0, check_sample(sample))] for _ in range(2)]
    for pieces in pairs:
        collator._tokens.plain(pieces)
    assert all(one.ids["input_ids"] is other.ids["input_ids"] for one, other in zip(*pairs, strict=True))


def test_collate__same_error_twice__each_names_its_sample() -> None:
    """Only what went well is remembered, and a sample's name is no part of it."""
    processor = build("qwen2_vl")[1]
    processor.chat_template = processor.chat_template.replace("<|vision_start|><|image_pad|><|vision_end|>", "")
    collator = ConversationCollator(processor)
    for name in ("a", "b"):
        with pytest.raises(ValueError, match=f"sample '{name}' has 1 image"):
            collator([{**make_samples(1)[0], "id": name}])


def test_recent__many_entries__bounded_and_not_pickled() -> None:
    recent: Recent[int] = Recent(entries=2, longest=3)
    for key, value in (("a", 1), ("b", 2)):
        recent.put(key, value, 1)
    assert recent.get("a") == 1
    recent.put("c", 3, 3)
    recent.put("long", 4, 4)
    assert [recent.get(key) for key in ("a", "b", "c", "long")] == [1, None, 3, None]
    copied = pickle.loads(pickle.dumps(recent))
    assert (len(recent), len(copied), copied.entries, copied.longest) == (2, 0, 2, 3)


@pytest.mark.parametrize(("count", "together"), [(1, True), (2, False)])
def test_collate__small_images__processed_as_one_tensor(count: int, together: bool) -> None:
    collator = ConversationCollator(build("llava")[1])
    side = int((TOGETHER / 1.5) ** 0.5)
    sample = {**make_samples(1)[0], "images": [Image.new("RGB", (side, side))]}
    pieces = [
        piece for number in range(count) for piece in collator.pieces(number, check_sample(sample)) if piece.images
    ]
    assert collator._pixels(pieces).get("disable_grouping", True) is not together


@pytest.mark.parametrize("name", ["plain.png", "animated.png", "plain.jpg", "animated.gif", "animated.webp"])
def test_decode_image__file__closed(name: str, tmp_path: Path) -> None:
    frames = [sample["images"][0].resize((64, 48)) for sample in make_samples(3, seed=5)]
    more = {"save_all": True, "append_images": frames[1:]} if name.startswith("animated") else {}
    frames[0].save(tmp_path / name, **more)
    before = len(os.listdir("/proc/self/fd"))
    held = [decode_image(str(tmp_path / name), "sample") for _ in range(3)]
    assert len(os.listdir("/proc/self/fd")) == before
    assert [image.size for image in held] == [frames[0].size] * 3
