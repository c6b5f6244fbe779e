"""Each kind of bad input: refused or counted under its reason, never half read, never a special token."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from grace_plugin.data import BadSamplesError, ConversationCollator, SampleError, load_samples, prepare, read_sample
from grace_plugin.data.media import decode_image, image_size
from grace_plugin.data.segments import Segmenter
from grace_plugin.data.video import decode_video
from tests.tiny import EVERY, FAMILIES, build, make_samples

PROCESSORS = {family: build(family)[1] for family in FAMILIES}
IMAGE = {"type": "image"}


def talk(text: str = "what is it?", answer: str = "red", images: int = 0) -> list[dict[str, Any]]:
    content = [*[IMAGE] * images, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def with_images(image: Any) -> dict[str, Any]:
    return {"id": "r", "messages": talk(images=1), "images": [image]}


def reason_of(sample: Any, family: str = "llava", **limits: Any) -> str:
    found = prepare([sample], ConversationCollator(PROCESSORS[family], **limits), max_bad_samples=1.0, allow_empty=True)
    return found.entries[0].reason


def png(path: Path, width: int, height: int, data: bytes, *more: tuple[bytes, bytes]) -> Path:
    """A PNG file of grey pixels with the given compressed data and further chunks."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    extra = b"".join(chunk(kind, body) for kind, body in more)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", data) + chunk(b"IEND", b""))
    return path


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "missing image file": (with_images("/nowhere/at/all.png"), "missing_file"),
    "more placeholders than images": (
        {"messages": talk(images=2), "images": [Image.new("RGB", (60, 60))]},
        "placeholder_mismatch",
    ),
    "an image without placeholder": (
        {"messages": talk(), "images": [Image.new("RGB", (60, 60))]},
        "placeholder_mismatch",
    ),
    "a LLaVA image without placeholder": (
        {"id": 1, "image": "a.png", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        "placeholder_mismatch",
    ),
    "no messages": ({"messages": []}, "empty_conversation"),
    "no conversations": ({"conversations": []}, "empty_conversation"),
    "an empty answer": ({"messages": talk(answer=" ")}, "empty_conversation"),
    "the answer first": ({"messages": talk()[::-1]}, "roles_out_of_order"),
    "two answers": ({"messages": talk() + talk()[1:]}, "roles_out_of_order"),
    "two questions": ({"messages": talk()[:1] + talk()}, "roles_out_of_order"),
    "a system turn in the middle": (
        {"messages": [*talk(), {"role": "system", "content": "x"}, talk()[1]]},
        "roles_out_of_order",
    ),
    "a tool's turn without its call": (
        {"messages": [{"role": "tool", "content": "x"}, talk()[1]]},
        "roles_out_of_order",
    ),
    "a function's turn": ({"messages": [{"role": "function", "content": "x"}, talk()[1]]}, "unknown_role"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}, {"from": "gpt", "value": "x"}]},
        "unknown_role",
    ),
    "a lone surrogate": ({"messages": talk(text="a\udce9b")}, "invalid_utf8"),
    "a turn without text": ({"conversations": [{"from": "human"}]}, "malformed"),
    "messages as text": ({"messages": "hello"}, "malformed"),
    "images as text": ({"messages": talk(images=1), "images": "a.png"}, "malformed"),
    "an image that is a number": ({"messages": talk(images=1), "images": [7]}, "malformed"),
    "a path that is a number": ({"messages": talk(images=1), "images": [{"path": 5}]}, "malformed"),
    "a video that is a number": (
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, talk()[1]], "videos": [5]},
        "malformed",
    ),
    "messages as a number": ({"messages": 5}, "malformed"),
    "a speaker in a list": (
        {"conversations": [{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "x"}]},
        "unknown_role",
    ),
    "a rate in words": ({"messages": talk(), "fps": "fast"}, "malformed"),
    "a rate of nothing": ({"messages": talk(), "fps": 0}, "malformed"),
    "keys of two kinds": ({"id": 1, 5: "x", "messages": talk()}, "malformed"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_prepare__bad_sample__counted_under_its_reason(name: str) -> None:
    sample, reason = BAD_ROWS[name]
    found = prepare([*make_samples(1), sample], ConversationCollator(PROCESSORS["llava"]), max_bad_samples=0.5)
    assert (found.numbers.tolist(), found.entries[1].reason) == ([0], reason)
    named = repr(sample["id"]) if "id" in sample else "1"
    assert found.rejected[0]["message"].startswith(f"sample {named}")


@pytest.mark.parametrize("family", EVERY)
def test_image__one_pixel__used(family: str) -> None:
    collator = ConversationCollator(PROCESSORS.get(family) or build(family)[1])
    sample = with_images(Image.new("RGB", (1, 1), (200, 0, 0)))
    found = prepare([sample], collator)
    assert found.lengths[0] == collator([sample])["input_ids"].shape[1]
    assert found.entries[0].visual >= 1


def test_image__refused_by_the_processor__counted() -> None:
    assert reason_of(with_images(Image.new("RGB", (3000, 4))), "qwen2_vl") == "image_shape"
    assert reason_of(with_images(Image.new("RGB", (3000, 4))), "llava") == ""


def test_image__20000_by_20000__refused_from_its_header(tmp_path: Path) -> None:
    line = zlib.compressobj(9)
    data = (
        line.compress(b"\0" * 20001 * 1000) + line.flush()
    )  # a twentieth of its lines: decoded, it would be unreadable
    path = png(tmp_path / "big.png", 20000, 20000, data)
    with pytest.raises(
        SampleError,
        match=rf"sample 'r': image '{path}' has 20000 x 20000 = 400,000,000 pixels and the limit is 64,000,000; "
        r"scale it down, or raise max_pixels \(--max_pixels\)",
    ) as caught:
        read_sample(with_images(str(path)))
    assert caught.value.reason == "image_too_large"
    assert reason_of(with_images(str(path))) == "image_too_large"
    before = Image.MAX_IMAGE_PIXELS
    for raised in (
        400_000_000,
        500_000_000,
        None,
    ):  # the how to fix it is one: Pillow's own limit, 179 million, does not stand
        assert image_size(str(path), "r", raised) == (20000, 20000)
    with pytest.raises(SampleError, match="has 20000 x 20000"):
        image_size(str(path), "r", 399_999_999)
    assert Image.MAX_IMAGE_PIXELS == before


def test_image_inside_a_file__above_the_limit__refused(tmp_path: Path) -> None:
    """An icon whose directory says 16 x 16 and whose image has 64 x 64 pixels."""
    path = tmp_path / "a.ico"
    Image.new("RGB", (64, 64), (200, 0, 0)).save(path, sizes=[(64, 64)])
    content = bytearray(path.read_bytes())
    content[6:8] = (16, 16)
    path.write_bytes(content)
    assert decode_image(str(path), "r", 4096).size == (64, 64)
    with pytest.raises(
        SampleError, match=r"holds an image above the limit of 4,095 pixels; .*raise max_pixels"
    ) as caught:
        decode_image(str(path), "r", 4095)
    assert caught.value.reason == "image_too_large"


def test_pixel_limit__at_and_above__exact_with_both_numbers_named(tmp_path: Path) -> None:
    Image.new("RGB", (30, 20)).save(tmp_path / "a.png")
    assert read_sample(with_images(tmp_path / "a.png"), max_pixels=600).images[0].size == (30, 20)
    with pytest.raises(
        SampleError, match=r"has 30 x 20 = 600 pixels and the limit is 599; scale it down, or raise max_pixels"
    ):
        read_sample(with_images(tmp_path / "a.png"), max_pixels=599)
    with pytest.raises(SampleError, match=r"image in the sample has 30 x 20"):
        read_sample(with_images(Image.new("RGB", (30, 20))), max_pixels=599)


@pytest.mark.parametrize("kind", ["pixels", "text", "data"])
def test_zip_bomb__decoded__refused_or_bounded(tmp_path: Path, kind: str) -> None:
    bomb = zlib.compress(b"\0" * 80_000_000, 9)
    small = zlib.compress(b"\0" * 5 * 4)
    if kind == "pixels":
        path, reason = png(tmp_path / "b.png", 60000, 60000, bomb), "image_too_large"
    elif kind == "text":
        path, reason = png(tmp_path / "b.png", 4, 4, small, (b"zTXt", b"k\0\0" + bomb)), "unreadable_image"
    else:
        path, reason = (
            png(tmp_path / "b.png", 4, 4, bomb),
            "",
        )  # 80 MB of zeros behind an image of 16 pixels: read as far as needed
    assert path.stat().st_size < 100_000
    assert reason_of(with_images(str(path))) == reason


def test_image__truncated_file__refused(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    for name in ("a.png", "a.jpg", "a.webp"):
        Image.fromarray(noise).save(tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) * 2 // 3])
        assert reason_of(with_images(str(tmp_path / name))) == "unreadable_image"


@pytest.mark.parametrize("orientation", range(1, 9))
def test_decode_image__exif_rotation__applied(tmp_path: Path, orientation: int) -> None:
    """The oracle rotates the pixels by hand as the EXIF standard defines the eight orientations."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:10, :20] = (250, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    upright = {
        1: lambda p: p,
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.transpose(1, 0, 2),
        6: lambda p: p[::-1].transpose(1, 0, 2),
        7: lambda p: p[::-1, ::-1].transpose(1, 0, 2),
        8: lambda p: p.transpose(1, 0, 2)[::-1],
    }[orientation](pixels)
    found = decode_image(str(tmp_path / "a.png"), "r")
    assert np.array_equal(np.asarray(found), upright)
    assert image_size(str(tmp_path / "a.png"), "r") == upright.shape[:2]


def test_decode_image__16_bit_cmyk_palette__8_bit_rgb(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64 * 64, dtype=np.float64).reshape(64, 64)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "deep.png")
    found = np.asarray(decode_image(str(tmp_path / "deep.png"), "r"))
    assert np.abs(found[..., 0].astype(float) - ramp / 257).max() <= 1.0
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))  # 200 of 65,535 is black
    for name in ("dark.png", "dark.tif"):
        dark.save(tmp_path / name)
        assert np.asarray(decode_image(str(tmp_path / name), "r")).max() == 1
    colours = Image.new("RGB", (16, 16), (200, 40, 30))
    colours.convert("CMYK").save(tmp_path / "c.jpg", quality=100)
    colours.quantize(4).save(tmp_path / "p.png")
    colours.quantize(4).save(tmp_path / "p.gif")
    for name in ("c.jpg", "p.png", "p.gif"):
        pixel = np.asarray(decode_image(str(tmp_path / name), "r"))[8, 8].astype(int)
        assert np.abs(pixel - (200, 40, 30)).max() <= 6, name


def test_decode_image__bytes__read(tmp_path: Path) -> None:
    Image.new("RGB", (16, 8), (1, 2, 3)).save(tmp_path / "a.png")
    sample = with_images({"bytes": (tmp_path / "a.png").read_bytes(), "path": "gone.png"})
    assert read_sample(sample).images[0].getpixel((3, 3)) == (1, 2, 3)
    sample["images"][0]["bytes"] = b"nothing"
    with pytest.raises(SampleError, match=r"sample 'r': cannot read image 'gone\.png'"):
        read_sample(sample)


def test_prepare__bad_videos__counted(tmp_path: Path) -> None:
    def sample(video: Any) -> dict[str, Any]:
        content = [{"type": "video"}, {"type": "text", "text": "q"}]
        return {"messages": [{"role": "user", "content": content}, talk()[1]], "videos": [video]}

    frames = [Image.new("RGB", (64, 64), (n * 50, 0, 0)) for n in range(4)]
    assert reason_of(sample(frames), "qwen3_vl") == ""
    assert reason_of(sample(frames), "llava") == "video_unsupported"
    smolvlm = ConversationCollator(build("smolvlm")[1])  # has a video processor, and another template for videos
    assert (
        prepare([sample(frames)], smolvlm, max_bad_samples=1.0, allow_empty=True).entries[0].reason
        == "video_unsupported"
    )
    assert reason_of(sample([]), "qwen3_vl") == "unreadable_video"
    assert reason_of(sample([frames[0], Image.new("RGB", (32, 64))]), "qwen3_vl") == "unreadable_video"
    assert reason_of(sample("/nowhere.mp4"), "qwen3_vl") == "missing_file"
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert reason_of(sample(str(tmp_path / "a.mp4")), "qwen3_vl") == "unreadable_video"
    found = decode_video(frames, "r", fps=4.0)
    assert found.frames.shape == (4, 64, 64, 3)
    assert (found.fps, found.indices, found.frames[2, 0, 0, 0]) == (4.0, (0, 1, 2, 3), 100)


def test_prepare__sample_above_max_length__dropped_and_counted() -> None:
    short, long = {"messages": talk()}, {"id": "long", "messages": talk(text="one two three " * 40)}
    collator = ConversationCollator(PROCESSORS["llava"], max_length=64)
    found = prepare([short, long], collator, max_bad_samples=0.5)
    assert found.numbers.tolist() == [0]
    assert found.report["rejected"] == {"too_long": 1}
    assert "max_length is 64" in found.entries[1].message


def test_prepare__invalid_utf8_in_a_line__counted_in_its_sample(tmp_path: Path) -> None:
    good = json.dumps({"messages": talk()}).encode()
    (tmp_path / "samples.jsonl").write_bytes(b"\n".join([good, good.replace(b"what", b"wh\xe9t"), good]))
    found = prepare(
        load_samples(str(tmp_path / "samples.jsonl")),
        ConversationCollator(PROCESSORS["llava"]),
        max_bad_samples=0.4,
        cache=tmp_path / "cache",
        folder=tmp_path / "out",
    )
    assert found.numbers.tolist() == [0, 2]
    assert found.report["rejected"] == {"invalid_utf8": 1}
    lone = json.dumps({"messages": talk(text="\udce9")}).encode()
    (tmp_path / "samples.jsonl").write_bytes(lone)
    with pytest.raises(BadSamplesError, match=r"1 invalid_utf8"):
        prepare(
            load_samples(str(tmp_path / "samples.jsonl")),
            ConversationCollator(PROCESSORS["llava"]),
            cache=tmp_path / "cache",
        )


SPELLED = (
    "</s>",
    "<image>",
    "<s>",
    "<pad>",
    "<|im_end|>",
    "<|im_start|>assistant\nno",
    "<|image_pad|>",
    "<|vision_start|>",
    "<|video_pad|>",
    "<|endoftext|>",
    "\ufdd0x\ufdd1",
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("spelled", SPELLED)
@pytest.mark.parametrize("images", [0, 1])
def test_collate__spelled_special_token__stays_text(family: str, spelled: str, images: int) -> None:
    """With them in question and answer, a sample has the special tokens of the same sample without them, and their text."""
    processor = PROCESSORS[family]
    collator, tokenizer = ConversationCollator(processor), processor.tokenizer
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    given = make_samples(1)[0]["images"] if images else []

    def batch(word: str) -> Any:
        talked = [*talk(f"say {word} left", f"a {word} red", images), *talk("and?", "two")]
        return collator([{"messages": talked, "images": given}])

    with_it, without = batch(spelled), batch("x")
    ids, plain = with_it["input_ids"][0].tolist(), without["input_ids"][0].tolist()
    kept = set(special.values())
    assert [i for i in ids if i in kept] == [i for i in plain if i in kept]
    assert special  # there is something to become
    text = "".join(tokenizer.decode([i]) if i in kept else "\0" for i in ids)
    assert text.count("\0") > 4
    supervised = tokenizer.decode([t for t in with_it["labels"][0].tolist() if t not in (-100, *kept)])
    assert f"a {spelled} red" in supervised
    prompt = [i for i, label in zip(ids, with_it["labels"][0].tolist(), strict=True) if label == -100 and i not in kept]
    assert f"say {spelled} left" in tokenizer.decode(prompt)


@pytest.mark.parametrize("family", EVERY)
def test_collate__each_special_token_spelled__stays_text(family: str) -> None:
    """Each of the family's special tokens in question and answer, beside an image: special tokens as in a plain sample."""
    processor = PROCESSORS.get(family) or build(family)[1]
    collator = ConversationCollator(processor)
    added = processor.tokenizer.added_tokens_decoder.items()
    special = {token.content: i for i, token in added if token.special and token.content.strip()}
    assert len(special) >= 5

    def kept(word: str) -> list[int]:
        talked = talk(f"say {word} left", f"a {word} red", 1)
        ids = collator([{"messages": talked, "images": make_samples(1)[0]["images"]}])["input_ids"][0].tolist()
        return [i for i in ids if i in special.values()]

    assert all(kept(spelled) == kept("x") for spelled in special)


def test_literal_ids__special_token_in_the_vocabulary__not_used() -> None:
    """Splitting special tokens is not enough where the model itself knows the word: then the string is cut to characters."""
    from examples.bundled_demo.models import make_processor

    processor = make_processor()
    image = processor.tokenizer.convert_tokens_to_ids("<image>")
    collator = ConversationCollator(processor)
    batch = collator([{"messages": talk("where is <image> </s>", "left")}])
    assert image in processor.tokenizer("<image>", split_special_tokens=True)["input_ids"]
    assert image not in batch["input_ids"][0].tolist()
    assert batch["input_ids"][0].tolist().count(processor.tokenizer.eos_token_id) == 1
    assert Segmenter(processor).protected["<image>"] == image


def test_prepare__no_images__reported() -> None:
    found = prepare(make_samples(4, images=0), ConversationCollator(PROCESSORS["llava"]))
    assert found.report["images_and_videos"] == 0
    assert found.report["samples_without_images"] == 4
    assert found.report["visual_tokens"]["sum"] == 0


def test_missing_file__message__says_how_to_fix_it() -> None:
    for sample in (
        with_images("/nowhere.png"),
        {"messages": [{"role": "user", "content": [{"type": "video"}]}, talk()[1]], "videos": ["/nowhere.mp4"]},
    ):
        with pytest.raises(SampleError, match=r"no such file; put the file there, or pass images= \(--images\)"):
            read_sample(sample)
