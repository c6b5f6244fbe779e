"""Where samples come from: image folders, streams of files whose samples differ in type, datasets laid out as on the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.data import ConversationCollator, StreamedSamples, load_samples, prepare, read_sample, stream_samples
from tests.tiny import build, make_samples

ANSWER = {"from": "gpt", "value": "red"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "cache"))


def images(folder: Path, count: int = 3) -> Path:
    folder.mkdir(parents=True)
    for number, sample in enumerate(make_samples(count, seed=5)):
        sample["images"][0].save(folder / f"{number}.png")
    return folder


def mixed_types() -> list[dict[str, Any]]:
    """A image, two images, none; ids as text and as numbers: what Arrow cannot hold in one column."""
    one = {"id": "x1", "image": "0.png", "conversations": [{"from": "human", "value": "<image>\nq"}, ANSWER]}
    two = {
        "id": "x2",
        "image": ["1.png", "2.png"],
        "conversations": [{"from": "human", "value": "<image><image>q"}, ANSWER],
    }
    none = {"id": 3, "conversations": [{"from": "human", "value": "q"}, ANSWER]}
    return [one, two, none, {**one, "id": "x4", "fps": 1}]


def write(path: Path, given: list[dict[str, Any]]) -> Path:
    path.write_text(json.dumps(given) if path.suffix == ".json" else "\n".join(map(json.dumps, given)))
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_stream_samples__one_and_several_images__none_rejected(tmp_path: Path, suffix: str) -> None:
    given = mixed_types()
    path = write(images(tmp_path / "set") / f"samples{suffix}", given)
    for source in (path, path.parent):
        stream = StreamedSamples(
            stream_samples(str(source)), ConversationCollator(build("llava")[1]), max_bad_samples=0.0
        )
        found = list(stream)
        assert [sample["id"] for sample in found] == [repr(sample["id"]) for sample in given]
        assert [len(sample["images"]) for sample in found] == [1, 2, 0, 1]
        assert stream.report()["rejected"] == {}
    assert list(stream_samples(str(path))) == [load_samples(str(path))[n] for n in range(4)]


def test_stream_samples__broken_line__counted_in_its_place(tmp_path: Path) -> None:
    path = write(images(tmp_path / "set") / "samples.jsonl", mixed_types())
    path.write_text(path.read_text() + "\n{torn")
    stream = StreamedSamples(stream_samples(str(path)), ConversationCollator(build("llava")[1]), max_bad_samples=0.2)
    assert len(list(stream)) == 4
    assert stream.report()["rejected"] == {"not_json": 1}


def test_stream_samples__images_folder__paths_begin_there(tmp_path: Path) -> None:
    folder = images(tmp_path / "elsewhere")
    path = write(tmp_path / "samples.jsonl", mixed_types())
    collator = ConversationCollator(build("llava")[1])
    assert prepare(load_samples(str(path)), collator, max_bad_samples=1.0).report["rejected"] == {"missing_file": 3}
    found = prepare(load_samples(str(path), images=str(folder)), collator)
    assert (found.report["usable"], found.report["images_and_videos"]) == (4, 4)
    assert [len(read_sample(sample).images) for sample in stream_samples(str(path), images=str(folder))] == [1, 2, 0, 1]
    (tmp_path / "mix.yaml").write_text("sets: [{path: samples.jsonl, images: elsewhere}]")
    assert prepare(load_samples(str(tmp_path / "mix.yaml")), collator).report["images_and_videos"] == 4


def test_stream_samples__no_stream__says_what_can_be_streamed(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("sets: [{path: samples.jsonl}]")
    with pytest.raises(ValueError, match=r"mix\.yaml is a mix, .*leave streaming out, or stream one of its sets"):
        stream_samples(str(tmp_path / "mix.yaml"))
    with pytest.raises(ValueError, match=r"cannot stream .*nowhere") as caught:
        stream_samples(str(tmp_path / "nowhere"))
    assert "mix" not in str(caught.value).partition("Give a")[2]
    with pytest.raises(ValueError, match=r"no dataset file at .*none\.jsonl"):
        stream_samples(str(tmp_path / "none.jsonl"))
    (tmp_path / "both").mkdir()
    (tmp_path / "both/a.jsonl").touch()
    (tmp_path / "both/b.parquet").touch()
    with pytest.raises(ValueError, match=r"holds JSON and parquet files; stream one kind"):
        stream_samples(str(tmp_path / "both"))


@pytest.mark.parametrize("stream", [False, True])
def test_load_samples__configuration_and_split__read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    monkeypatch.chdir("/")
    folder = images(tmp_path / "hub" / "pictures").parent
    lines = [
        {
            "messages": [
                {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "q"}]},
                {"role": "assistant", "content": [{"type": "text", "text": name}]},
            ],
            "images": ["pictures/0.png"],
        }
        for name in ("plain", "train", "test")
    ]
    for line, place in zip(lines, ("plain/train", "other/train", "other/test"), strict=True):
        (folder / place).parent.mkdir(exist_ok=True)
        (folder / f"{place}.jsonl").write_text(json.dumps(line))
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: plain\n  default: true\n  data_files: plain/*.jsonl\n"
        "- config_name: other\n  data_files:\n  - {split: train, path: other/train.jsonl}\n"
        "  - {split: test, path: other/test.jsonl}\n---\n"
    )

    def said(source: str) -> str:
        [sample] = stream_samples(source) if stream else load_samples(source)
        assert len(read_sample(sample).images) == 1
        return str(sample["messages"][1]["content"][0]["text"])

    found = [said(f"{folder}{part}") for part in ("", ":train", ":other:test", ":other:", "::train")]
    assert found == ["plain", "plain", "test", "train", "plain"]
    for part, message in (("none:train", "none"), ("other:none", "none"), ("a:b:c", "more than two colons")):
        with pytest.raises(ValueError, match=message):
            said(f"{folder}:{part}")
