"""Images, videos and dataset files that could hang, exhaust memory, run a program or fill the terminal are counted."""

from __future__ import annotations

import base64
import io
import json
import os
import resource
import socket
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from grace_plugin.data import (
    ConversationCollator,
    SampleError,
    StreamedSamples,
    load_samples,
    prepare,
    read_sample,
    stream_samples,
)
from grace_plugin.data.key import sample_key
from grace_plugin.data.media import FORMATS, decode_image, image_size
from grace_plugin.data.shown import shortened, shown
from grace_plugin.data.video import decode_video
from tests.data.test_bad_input import PROCESSORS, png, reason_of, talk, with_images
from tests.tiny import EVERY, build, make_samples


def entry_of(sample: Any, family: str = "llava", **limits: Any) -> Any:
    collator = ConversationCollator(PROCESSORS[family], **limits)
    return prepare([sample], collator, max_bad_samples=1.0, allow_empty=True).entries[0]


def with_video(video: Any) -> dict[str, Any]:
    content = [{"type": "video"}, {"type": "text", "text": "q"}]
    return {"id": "r", "messages": [{"role": "user", "content": content}, talk()[1]], "videos": [video]}


def encoded(image: Image.Image, form: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, form)
    return out.getvalue()


def uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


# Videos given as numbers


def levels(dtype: Any) -> np.ndarray:
    """Four frames of one level each: 0, 51, 204, 255 of 255."""
    steps = np.array([0, 51, 204, 255]).reshape(4, 1, 1, 1) * np.ones((4, 8, 8, 3), dtype=np.int64)
    return (steps / 255).astype(dtype) if np.dtype(dtype).kind == "f" else steps.astype(dtype)


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("form", ["array", "list", "tensor", "tensors"])
def test_video_of_numbers__any_type__keeps_its_levels(dtype: str, form: str) -> None:
    given: Any = levels(dtype)
    if form.startswith("tensor"):
        given = torch.from_numpy(given).permute(0, 3, 1, 2)
    video = given if form in ("array", "tensor") else list(given)
    found = decode_video(video, "r")
    assert found.frames.dtype == np.uint8
    assert found.frames.shape == (4, 8, 8, 3)
    assert found.frames[:, 3, 3, 1].tolist() == [0, 51, 204, 255]


def test_video_of_floats__above_one__is_not_scaled_and_is_rounded() -> None:
    given = levels("uint8").astype(np.float32) + 0.4
    given[3] = 254.6
    assert decode_video(given, "r").frames[:, 0, 0, 0].tolist() == [0, 51, 204, 255]
    dark = np.stack([np.full((8, 8, 3), 0.6), np.full((8, 8, 3), 200.0)])  # one range for the whole video
    assert decode_video(dark, "r").frames[:, 0, 0, 0].tolist() == [1, 200]
    assert decode_video(levels("uint8") > 100, "r").frames[:, 0, 0, 0].tolist() == [0, 0, 255, 255]
    half = torch.full((2, 3, 8, 8), 0.5, dtype=torch.bfloat16)
    assert decode_video(half, "r").frames.max() == 128


NUMBERS: dict[str, tuple[Any, str, str]] = {
    "not a number": (np.full((2, 8, 8, 3), np.nan), "unreadable_video", "from nan to nan"),
    "below 0": (np.full((2, 8, 8, 3), -0.5), "unreadable_video", "from -0.5 to -0.5"),
    "above 255": (
        np.full((2, 8, 8, 3), 300, dtype=np.int32),
        "unreadable_video",
        "from 300 to 300; give integers or floats",
    ),
    "two channels": (
        np.zeros((2, 8, 8, 2), np.uint8),
        "malformed",
        r"array of shape \[8, 8, 2\]; give images, an array",
    ),
    "transparent": (np.zeros((2, 8, 8, 4), np.uint8), "malformed", r"array of shape \[8, 8, 4\]"),
    "grey frames": (np.zeros((2, 8, 8), np.uint8), "malformed", r"array of shape \[8, 8\]"),
    "a batch": (np.zeros((1, 2, 8, 8, 3), np.uint8), "malformed", r"array of shape \[2, 8, 8, 3\]"),
    "one number": (np.array(3.0), "malformed", "a video is one number"),
    "complex": (np.zeros((2, 8, 8, 3), complex), "malformed", "of type .*complex128.*; give uint8"),
    "no pixels": (np.zeros((2, 0, 8, 3), np.uint8), "malformed", r"array of shape \[0, 8, 3\]"),
    "a tensor's channels last": (
        torch.zeros(2, 8, 8, 3),
        "malformed",
        r"tensor of shape \[8, 8, 3\]; .* \[F, 3, H, W\]",
    ),
    "frames above the limit": (np.zeros((2, 300, 300, 3), np.uint8), "image_too_large", "300 x 300 = 90,000 pixels"),
    "too many frames": (
        np.zeros((40, 90, 90, 3), np.uint8),
        "image_too_large",
        "40 of them kept; the limit is 10,000 for one",
    ),
    "a very long frame": (np.zeros((2, 1, 400, 3), np.uint8), "image_shape", "400 x 1 pixels"),
    "a generator": ((frame for frame in levels("uint8")), "malformed", "a video is of type generator"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_video_of_numbers__wrong_values_or_shape__counted_with_what_is_expected(name: str) -> None:
    video, reason, message = NUMBERS[name]
    found = entry_of(with_video(video), "qwen3_vl", max_pixels=10_000)
    assert found.reason == reason
    with pytest.raises(SampleError, match=message):
        read_sample(with_video(video), max_pixels=10_000)


def test_video_in_unit_floats__through_the_collator__same_batch_as_in_bytes() -> None:
    drawn = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), dtype=np.uint8)
    collator = ConversationCollator(PROCESSORS["qwen3_vl"])
    first, second = (collator([with_video(video)]) for video in (drawn, drawn.astype(np.float32) / 255))
    assert all(torch.equal(first[key], second[key]) for key in first)


# Where an image may come from


def test_image_in_every_form__same_pixels_and_key_of_its_bytes(tmp_path: Path) -> None:
    image = make_samples(1)[0]["images"][0]
    content, path = encoded(image), tmp_path / "with space.png"
    path.write_bytes(content)
    forms: list[Any] = [
        str(path),
        path,
        path.as_uri(),
        content,
        bytearray(content),
        uri(content),
        {"bytes": content},
        {"path": uri(content)},
        uri(content).replace(",", ",\n"),
        {"path": path.as_uri()},
    ]
    for form in forms:
        assert np.array_equal(np.asarray(decode_image(form, "r")), np.asarray(image))
        assert image_size(form, "r") == (image.height, image.width)
        assert entry_of(with_images(form)).reason == ""
        assert sample_key(with_images(form)) == sample_key(with_images(str(path)))


def test_data_uri_and_relative_path_of_a_file__both_read(tmp_path: Path) -> None:
    image = make_samples(1)[0]["images"][0]
    image.save(tmp_path / "a.png")
    lines = [
        with_images("a.png"),
        with_images(uri(encoded(image))),
        {**with_images((tmp_path / "a.png").as_uri()), "id": "s"},
    ]
    (tmp_path / "samples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    collator = ConversationCollator(PROCESSORS["llava"])
    found = prepare(load_samples(str(tmp_path / "samples.jsonl")), collator, cache=tmp_path / "cache")
    assert found.report["images_and_videos"] == 3


@pytest.mark.parametrize(
    ("image", "reason", "message"),
    [
        ("https://host/a.png", "missing_file", r"'https://host/a\.png' is an address, .*download it first"),
        ("s3://bucket/a.png", "missing_file", "download it first"),
        ("file://other/a.png", "missing_file", "download it first"),
        ("http://[broken", "missing_file", "download it first"),
        ("file://[broken", "malformed", "is no address"),
        ("data:image/png,abc", "malformed", "data URI without ;base64"),
        ("data:image/png;base64,$$$", "unreadable_image", "damaged base64"),
        ("data:image/png;base64,\u00e9", "unreadable_image", "damaged base64"),
        (uri(b"no image"), "unreadable_image", "in none of the formats that are read"),
        (b"no image", "unreadable_image", "cannot read image in the sample: "),
        ("a\0b.png", "missing_file", "no such file"),
        ("/", "missing_file", "it is a folder, not a regular file"),
    ],
)
def test_image_that_cannot_be_read__counted_and_said(image: Any, reason: str, message: str) -> None:
    assert entry_of(with_images(image)).reason == reason
    with pytest.raises(SampleError, match=message):
        read_sample(with_images(image))


@pytest.mark.parametrize("form", FORMATS)
def test_image_format_of_the_list__read(form: str) -> None:
    content = encoded(Image.new("RGB", (16, 16), (200, 40, 30)), form)
    pixel = decode_image(content, "r").getpixel((8, 8))
    assert np.abs(np.subtract(pixel, (200, 40, 30))).max() <= 8  # some of them lose a little


@pytest.mark.parametrize("suffix", ["eps", "png"])
def test_eps__refused_without_running_ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    """A `gs` that leaves a mark stands first on the path; Pillow runs it for this file, and the collator must not."""
    (tmp_path / "bin").mkdir()
    gs = tmp_path / "bin" / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 0\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(encoded(Image.new("RGB", (16, 16), (200, 40, 30)), "EPS"))
    script = f"from PIL import Image\ntry: Image.open({str(path)!r}).load()\nexcept Exception: pass"
    subprocess.run([sys.executable, "-c", script], check=True)  # a process of its own: Pillow looks for gs once
    assert (tmp_path / "ran").exists()
    (tmp_path / "ran").unlink()
    found = entry_of(with_images(str(path)))
    assert (found.reason, "PNG, JPEG, WEBP" in found.message) == ("unreadable_image", True)
    assert not (tmp_path / "ran").exists()


# What is no regular file


def special(kind: str, path: Path) -> Path:
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(str(path))
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    return path if kind != "device" else Path("/dev/zero")


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "link to a device"])
def test_special_file_as_image_and_video__counted_without_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = special(kind, Path("media"))
    for sample, family in (
        (with_images(str(path)), "llava"),
        (with_video(str(path)), "qwen3_vl"),
        (with_video([str(path)]), "qwen3_vl"),
    ):
        found = entry_of(sample, family)
        assert (found.reason, "not a regular file" in found.message) == ("missing_file", True)
        for use in (read_sample, sample_key):
            with pytest.raises(SampleError, match="not a regular file"):
                use(sample)


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("load", [load_samples, stream_samples])
def test_fifo_as_dataset__refused_by_name(tmp_path: Path, suffix: str, inside: bool, load: Any) -> None:
    path = tmp_path / f"samples.{suffix}"
    os.mkfifo(path)
    with pytest.raises(ValueError, match=rf"samples\.{suffix}") as caught:
        list(load(str(tmp_path if inside else path)))
    assert "regular file" in str(caught.value)


# What the processor makes of an image


@pytest.mark.parametrize(("family", "wide"), [*((family, True) for family in EVERY), ("llava", False)])
def test_image_of_one_by_a_million__every_family__memory_stays_bounded(tmp_path: Path, family: str, wide: bool) -> None:
    """A file of 2 kB of which one processor makes 56 x 56,000,000 pixels: checked and, where it is accepted, processed."""
    size = (1_000_000, 1) if wide else (1, 1_000_000)
    path = png(tmp_path / "a.png", *size, zlib.compress(b"\0" * (size[0] + 1) * size[1], 9))
    processor = PROCESSORS.get(family) or build(family)[1]
    collator = ConversationCollator(processor)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = prepare([with_images(str(path))], collator, max_bad_samples=1.0, allow_empty=True).entries[0]
    assert found.reason in ("", "image_shape", "image_too_large")
    if found.reason:
        with pytest.raises((SampleError, ValueError)):
            collator([with_images(str(path))])
    else:
        assert collator([with_images(str(path))])["input_ids"].shape[1] == found.tokens
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000  # kB


def test_image_that_the_processor_enlarges__counted_with_both_sizes() -> None:
    sample = with_images(Image.new("RGB", (1_000_000, 1)))
    found = entry_of(sample)
    assert found.reason == "image_too_large"
    assert "of an image of 1,000,000 x 1 pixels the model's processor makes 3,136,000,000 pixels" in found.message
    with pytest.raises(SampleError, match="makes 3,136,000,000 pixels"):  # a stream is not checked ahead
        ConversationCollator(PROCESSORS["llava"])([sample])
    long = with_images(Image.new("RGB", (20_000, 1)))
    assert entry_of(long).reason == ""  # 56 x 1,120,000: below 64 million
    assert entry_of(long, max_pixels=30_000).reason == ""  # a lower limit on images does not lower what is made of them


def test_padding_to_a_square_and_slow_processors__bounded_as_well() -> None:
    from transformers import LlavaImageProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    from grace_plugin.data.image_layout import ProcessedSizes

    square = ProcessedSizes(LlavaImageProcessor(do_pad=True), 64_000_000)
    with pytest.raises(SampleError, match="makes 100,000,000 pixels"):
        square.check((10, 10_000), "sample 0")
    square.check((600, 6_000), "sample 0")
    slow = ProcessedSizes(CLIPImageProcessorPil(), 64_000_000)
    with pytest.raises(SampleError, match="a side over 200 times as long as the other") as caught:
        slow.check((1, 300), "sample 0")
    assert caught.value.reason == "image_shape"
    slow.check((2, 300), "sample 0")
    ProcessedSizes(LlavaImageProcessor(do_pad=True), None).check((10, 10_000), "sample 0")
    ProcessedSizes(None, 64_000_000).check((1, 10_000), "sample 0")


# Values in messages


LONG = "x" * 1_000_000
URI = "data:image/png;base64," + base64.b64encode(b"\x89PNG" + b"x" * 750_000).decode()
HUGE: dict[str, dict[str, Any]] = {
    "image": with_images(URI),
    "image that is no path": with_images(LONG),
    "mapping": with_images({"path": URI}),
    "video": with_video(URI),
    "id": {**with_images("none.png"), "id": LONG},
    "id of many parts": {**with_images("none.png"), "id": [LONG] * 3},
    "id that is a long number": {**with_images("none.png"), "id": 10**5000},
    "role": {"messages": [{"role": LONG, "content": "q"}, talk()[1]]},
    "part's type": {"messages": [{"role": "user", "content": [{"type": LONG}]}, talk()[1]]},
    "speaker": {"conversations": [{"from": LONG, "value": "x"}]},
    "fps": {"messages": talk(), "fps": LONG},
    "keys": {LONG: 1},
    "many keys": {f"key {n}": n for n in range(10_000)},
    "bytes": with_images(b"x" * 1_000_000),
    "message": {"messages": [LONG]},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_message__value_of_a_megabyte__below_500_characters(name: str, tmp_path: Path) -> None:
    collator = ConversationCollator(PROCESSORS["qwen3_vl"])
    found = prepare([HUGE[name]] * 20, collator, max_bad_samples=1.0, allow_empty=True)
    found.write_report(tmp_path)
    assert len(found.rejected) == 20
    assert all(20 < len(line["message"]) < 500 for line in found.rejected)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000
    with pytest.raises(ValueError, match=r"^.{20,480}$"):
        read_sample(HUGE[name])


def test_shown__any_value__short_and_recognisable() -> None:
    assert shown("a.png") == "'a.png'"
    assert shown("\x00" * 10_000).startswith(r"'\x00\x00")
    assert shown(URI, 40).endswith(f"({len(URI):,} characters)")
    assert "..." in shown([1] * 1000)
    assert shown(10**5000) == "an integer of 16,610 bits"

    class Odd:
        def __repr__(self) -> str:
            raise KeyError

    values: list[Any] = [
        "\x00" * 99_999,
        b"\xff" * 99_999,
        {LONG: [LONG]},
        [Odd()],
        Odd(),
        {1: Odd()},
        np.zeros(10**6),
        10**5000,
    ]
    nested: Any = []
    for _ in range(5000):
        nested = [nested]
    assert all(len(shown(value)) <= 200 for value in [*values, nested, [10**5000]])
    assert shortened("a\nb\r\nc") == "a b c"
    assert shortened("start" + "x" * 500 + "end", 60).startswith("startx")
    assert shortened("start" + "x" * 500 + "end", 60).endswith("xend")
    assert len(shortened("start" + "x" * 500 + "end", 60)) <= 60


# JSON that Python cannot take


GOOD = json.dumps({"messages": talk()})
UNUSABLE = {
    "an integer of 4,301 digits": (
        '{"id": %s, "messages": []}' % ("7" * 4301),
        "holds an integer of 4,301 digits; write",
    ),
    "an integer inside": ('{"messages": [], "n": [{"a": [-%s]}]}' % ("7" * 9999), "holds an integer of 10,000 digits"),
    "a field twice": ('{"messages": [], "images": [], "images": ["a.png"]}', "holds the field 'images' twice"),
    "a number": ("7" * 5000, "holds an integer of 5,000 digits"),
}


@pytest.mark.parametrize("name", UNUSABLE)
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
@pytest.mark.parametrize("streamed", [False, True])
def test_json_that_python_cannot_take__error_of_its_sample_alone(
    tmp_path: Path, name: str, suffix: str, streamed: bool
) -> None:
    bad, message = UNUSABLE[name]
    lines, path = [GOOD, bad, GOOD], tmp_path / f"samples.{suffix}"
    path.write_text("\n".join(lines) if suffix == "jsonl" else "[" + ",\n".join(lines) + "]")
    collator = ConversationCollator(PROCESSORS["llava"])
    where = "line 2" if suffix == "jsonl" else "sample 1"
    if streamed:
        stream = StreamedSamples(stream_samples(str(path)), collator, max_bad_samples=0.4, folder=tmp_path)
        assert len(list(stream)) == 2
        assert stream.report()["rejected"] == {"not_json": 1}
        said = json.loads((tmp_path / "data_rejected.jsonl").read_text())["message"]
    else:
        found = prepare(load_samples(str(path)), collator, max_bad_samples=0.4, cache=tmp_path / "cache")
        assert (found.numbers.tolist(), found.entries[1].reason) == ([0, 2], "not_json")
        said = found.entries[1].message
    assert f"samples.{suffix}, {where} {message}" in said


def test_json_lines__nested_too_deep__error_of_their_line(tmp_path: Path) -> None:
    deep = '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}"
    (tmp_path / "samples.jsonl").write_text(f"{GOOD}\n{deep}\n{GOOD}")
    collator = ConversationCollator(PROCESSORS["llava"])
    found = prepare(
        load_samples(str(tmp_path / "samples.jsonl")), collator, max_bad_samples=0.4, cache=tmp_path / "cache"
    )
    assert (found.numbers.tolist(), found.entries[1].reason) == ([0, 2], "not_json")
    (tmp_path / "samples.json").write_text(f"[{GOOD}, {deep}]")
    with pytest.raises(ValueError, match=r"samples\.json, sample 1 is not JSON: maximum recursion depth"):
        load_samples(str(tmp_path / "samples.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"[{GOOD}, {{]", r"samples\.json, sample 1 is not JSON: .*line 1 column \d+"),
        (f"[{GOOD} {GOOD}]", r"sample 0 is not JSON: Expecting ',' delimiter: line 1 column \d+"),
        (f"[{GOOD}", r"sample 0 is not JSON: Expecting ',' delimiter"),
        (f"[{GOOD}] []", "there is more after its list"),
        (f"{GOOD}\n{GOOD}", "holds a dict, not a list of samples; one object a line is called .jsonl"),
        ("7", "holds a int, not a list of samples"),
        ("", "is not JSON: Expecting value: line 1 column 1"),
    ],
)
def test_json_list__not_json__one_sentence_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "samples.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_samples(str(tmp_path / "samples.json"))


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_json__byte_order_mark_and_odd_spaces__read(tmp_path: Path, suffix: str) -> None:
    text = f"\ufeff\n [ {GOOD}\t,\r\n{GOOD} ] \n" if suffix == "json" else f"\ufeff{GOOD}\r\n\r\n{GOOD}"
    (tmp_path / f"samples.{suffix}").write_text(text, encoding="utf-8", newline="")
    assert [sample["messages"] for sample in load_samples(str(tmp_path / f"samples.{suffix}"))] == [talk(), talk()]
    (tmp_path / "none.json").write_text("[ ]")
    assert len(load_samples(str(tmp_path / "none.json"))) == 0


def test_reason_helper__plain_sample__none() -> None:
    assert reason_of(make_samples(1)[0]) == ""


def test_opened_image_that_is_not_decoded_yet__cut_off_or_eps__counted_when_inspected() -> None:
    whole = encoded(Image.effect_noise((64, 64), 90.0).convert("RGB"))
    for content in (whole[: len(whole) // 2], encoded(Image.new("RGB", (16, 16)), "EPS")):
        opened = Image.open(io.BytesIO(content))
        assert entry_of(with_images(opened)).reason == "unreadable_image"
    assert entry_of(with_images(Image.open(io.BytesIO(whole)))).reason == ""


def test_json_text_with_an_endless_integer__refused_with_its_field() -> None:
    calls = f'[{{"name": "see", "arguments": {{"n": {"9" * 4301}}}}}]'
    for sample, field in (
        ({"messages": talk(), "tools": calls}, "tools is text that is not JSON"),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "function_call", "value": calls}]},
            "function_call",
        ),
    ):
        with pytest.raises(SampleError, match=field):
            read_sample(sample)
