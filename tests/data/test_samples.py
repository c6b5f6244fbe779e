"""Samples are checked before a run: every error is named with its sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from grace_plugin.data import SampleError, check_sample, check_samples, load_samples, read_sample
from tests.tiny import make_samples


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": [p if isinstance(p, dict) else {"type": "text", "text": p} for p in parts]}


ANSWER = {"role": "assistant", "content": "red"}
IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({"messages": [user(IMAGE, "q"), ANSWER], "id": 7}, r"sample 7 has 1 image placeholder\(s\) and 0 image\(s\)"),
        (
            {"messages": [user("q"), ANSWER], "images": ["a.png"], "name": "n"},
            r"sample 'n' has 0 image placeholder\(s\) and 1",
        ),
        (
            {"messages": [user(IMAGE, IMAGE, "q"), ANSWER], "images": ["a.png"]},
            r"sample 3 has 2 image placeholder\(s\) and 1",
        ),
        ({"messages": []}, "sample 3 has no messages"),
        ({"prompt": "x"}, "sample 3 has no messages: it has 'prompt'; give \"messages\" "),
        ({"messages": [user("q")]}, "sample 3 ends with a user turn"),
        ({"messages": [{"role": "critic", "content": "x"}, ANSWER]}, "sample 3: role 'critic' is not one of"),
        ({"messages": [{"role": "user"}, ANSWER]}, "sample 3: a user turn has no content"),
        ({"messages": ["hello", ANSWER]}, "sample 3: a message is a str"),
        ({"messages": [user({"type": "audio"}), ANSWER]}, "sample 3: a user turn holds a part of type 'audio'"),
        ({"messages": [user({"type": "text"}), ANSWER]}, "sample 3: a user turn holds a text part without text"),
        (
            {"messages": [user("q"), {"role": "assistant", "content": [IMAGE]}], "images": ["a.png"]},
            "sample 3: an assistant turn holds an image",
        ),
    ],
)
def test_check_sample__bad_sample__named(sample: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sample(sample, 3)


def test_check_sample__plain_strings__text_parts_and_input_unchanged() -> None:
    sample = {"messages": [{"role": "user", "content": "q"}, ANSWER], "image": None}
    before = json.dumps(sample)
    found = check_sample(sample)
    assert found.messages[0]["content"] == [{"type": "text", "text": "q"}]
    assert found.images == ()
    assert json.dumps(sample) == before


@pytest.mark.parametrize("column", ["images", "image"])
def test_check_sample__images_without_tags__before_the_first_users_text(column: str) -> None:
    """What TRL's SFT and DPO trainers make of a sample whose messages are strings and that has an images column."""
    talked = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "q"},
        ANSWER,
        {"role": "user", "content": "and?"},
        ANSWER,
    ]
    given = ["a.png", "b.png"] if column == "images" else "a.png"
    found = check_sample({"messages": talked, column: given})
    assert found.images == (("a.png", "b.png") if column == "images" else ("a.png",))
    text = [[part["type"] for part in message["content"]] for message in found.messages]
    assert text == [["text"], ["image"] * len(found.images) + ["text"], ["text"], ["text"], ["text"]]
    assert check_sample({"messages": talked, "images": []}).messages[1]["content"] == [{"type": "text", "text": "q"}]
    for other in (
        {"messages": [*talked[:3], user("and?"), ANSWER], "images": ["a.png"]},
        {"messages": talked, "videos": ["a.mp4"]},
    ):
        with pytest.raises(SampleError) as caught:
            check_sample(other)
        assert caught.value.reason == "placeholder_mismatch"


def test_check_sample__no_name_or_number__quoted() -> None:
    with pytest.raises(ValueError, match=r"where is the dog"):
        check_sample({"messages": [user("where is the dog"), ANSWER], "images": ["x"]})


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "LA", "1", "I;16"])
@pytest.mark.parametrize("from_file", [False, True])
def test_read_sample__image_of_any_mode__rgb(tmp_path: Path, mode: str, from_file: bool) -> None:
    original = make_samples(1)[0]["images"][0]
    original = original.convert("L").convert("I;16") if mode == "I;16" else original.convert(mode)
    image: Any = original
    if from_file:
        image = tmp_path / "picture.png"
        original.save(image)
    found = read_sample({"messages": [user(IMAGE, "q"), ANSWER], "images": [image]}).images[0]
    assert found.mode == "RGB"
    assert found.size == original.size


def test_read_sample__transparency__as_pillow_converts_it(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (4, 4), (10, 200, 30, 128))
    clear.save(tmp_path / "c.png")
    found = read_sample({"messages": [user(IMAGE, "q"), ANSWER], "image": str(tmp_path / "c.png")}).images[0]
    assert found.getpixel((0, 0)) == (10, 200, 30)


@pytest.mark.parametrize("content", [None, b"not a picture", b""])
def test_read_sample__missing_or_unreadable_image__named_with_its_path(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "p.png"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"sample 'r': cannot read image '{path}'"):
        read_sample({"messages": [user(IMAGE, "q"), ANSWER], "images": [str(path)], "id": "r"})


def test_read_sample__truncated_image__named_with_its_path(tmp_path: Path) -> None:
    path = tmp_path / "p.png"
    make_samples(1)[0]["images"][0].save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(ValueError, match=rf"cannot read image '{path}'"):
        read_sample({"messages": [user(IMAGE, "q"), ANSWER], "images": [path]})


def test_read_sample__no_image__refused() -> None:
    with pytest.raises(
        ValueError, match=r"sample 'r': an image is of type int; give a path, bytes, a data URI or a PIL image"
    ):
        read_sample({"messages": [user(IMAGE, "q"), ANSWER], "images": [7], "id": "r"})


def test_check_samples__limit__counted_and_sample_named() -> None:
    assert check_samples(make_samples(5), limit=3) == 3
    assert check_samples(make_samples(2)) == 2
    bad = [*make_samples(2), {"messages": []}]
    assert check_samples(bad, limit=2) == 2
    with pytest.raises(ValueError, match=r"sample 2 has no messages"):
        check_samples(bad)
    with pytest.raises(ValueError, match=r"the dataset has no samples"):
        check_samples([])


def written(tmp_path: Path) -> list[dict[str, Any]]:
    """Samples whose image is a path relative to the file's folder."""
    (tmp_path / "pictures").mkdir()
    make_samples(1)[0]["images"][0].save(tmp_path / "pictures" / "0.png")
    with_image = {"messages": [user(IMAGE, "q"), ANSWER], "images": ["pictures/0.png"]}
    return [
        with_image,
        {"messages": [user("q"), ANSWER]},
        {"messages": [user(IMAGE, "q"), ANSWER], "image": "pictures/0.png"},
    ]


@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_load_samples__json_with_relative_paths__resolved(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / f"samples.{suffix}"
    given = written(tmp_path)
    source.write_text(json.dumps(given) if suffix == "json" else "\n".join(map(json.dumps, given)) + "\n\n")
    monkeypatch.chdir("/")
    found = load_samples(str(source))
    assert [len(read_sample(sample).images) for sample in found] == [1, 0, 1]
    assert [sample["messages"] for sample in found] == [sample["messages"] for sample in given]


@pytest.mark.parametrize("as_dict", [False, True])
def test_load_samples__saved_dataset__read(tmp_path: Path, as_dict: bool) -> None:
    import datasets

    given = datasets.Dataset.from_list([{"messages": r["messages"], "images": r["images"]} for r in make_samples(3)])
    (datasets.DatasetDict({"train": given}) if as_dict else given).save_to_disk(str(tmp_path / "set"))
    found = load_samples(str(tmp_path / "set"))
    assert len(found) == 3
    sample = read_sample(found[0])
    assert sample.images[0].tobytes() == make_samples(3)[0]["images"][0].tobytes()
    assert check_samples(found[i] for i in range(3)) == 3


def test_load_samples__unreadable_line__error_in_its_place(tmp_path: Path) -> None:
    good = json.dumps({"messages": [user("q"), ANSWER]})
    (tmp_path / "bad.jsonl").write_bytes(
        b"\n".join([good.encode(), b"", b'{"messages": [}', b"[1]", b'{"messages": "\xff"}', good.encode()])
    )
    found = load_samples(str(tmp_path / "bad.jsonl"))
    assert len(found) == 5
    expected = {
        1: ("not_json", r"bad\.jsonl, line 3 is not JSON"),
        2: ("not_json", r"bad\.jsonl, line 4 is a list, not an object"),
        3: ("invalid_utf8", r"bad\.jsonl, line 5 is not valid UTF-8 at byte 14"),
    }
    for number, (reason, message) in expected.items():
        with pytest.raises(SampleError, match=message) as caught:
            check_sample(found[number], number)
        assert caught.value.reason == reason
    assert [check_sample(found[number]).messages[1]["content"][0]["text"] for number in (0, 4)] == ["red", "red"]
    (tmp_path / "texts.json").write_text(f'[{good}, "x"]')
    with pytest.raises(SampleError, match=r"texts\.json, sample 1 is a str, not an object"):
        check_sample(load_samples(str(tmp_path / "texts.json"))[1])
    (tmp_path / "latin.json").write_bytes(f"[{good}, {good}]".encode().replace(b"q", b"caf\xe9", 1))
    found = load_samples(str(tmp_path / "latin.json"))
    with pytest.raises(
        SampleError, match=r"sample 0: the text of a user turn is not valid UTF-8 at character 3"
    ) as caught:
        check_sample(found[0], 0)
    assert caught.value.reason == "invalid_utf8"
    assert check_sample(found[1], 1).images == ()


def test_load_samples__bad_source__named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no dataset file at {tmp_path}/none\.jsonl"):
        load_samples(str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json is not JSON"):
        load_samples(str(tmp_path / "bad.json"))
    (tmp_path / "dict.json").write_text('{"messages": []}')
    with pytest.raises(ValueError, match=r"dict\.json holds a dict, not a list of samples"):
        load_samples(str(tmp_path / "dict.json"))
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"bad\.parquet is not a readable parquet file"):
        load_samples(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match=r"no image folder at .*pictures"):
        load_samples(str(tmp_path / "bad.json"), images=str(tmp_path / "pictures"))
    with pytest.raises(ValueError, match=r"cannot read a dataset from .*nowhere.*Give a \.json or \.jsonl file"):
        load_samples(str(tmp_path / "nowhere"))
