"""Every sample of a dataset is accounted for, the index is resumed and believed, and lengths are those of the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from grace_plugin.data import BadSamplesError, ConversationCollator, is_scannable, load_samples, prepare
from grace_plugin.data.index import index_file, scan
from tests.mixed_files import Mixed, write_mixed
from tests.tiny import FAMILIES, build, make_samples

PROCESSORS = {family: build(family)[1] for family in FAMILIES}
ROWS = 132


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "set", ROWS, videos=6)


@pytest.mark.parametrize(("family", "workers"), [("llava", 2), ("qwen2_vl", 0), ("qwen3_vl", 0)])
def test_prepare__report__counts_every_sample(family: str, workers: int, mixed: Mixed, tmp_path: Path) -> None:
    collator = ConversationCollator(PROCESSORS[family])
    found = prepare(
        load_samples(str(mixed.mix)), collator, max_bad_samples=0.1, workers=workers, cache=tmp_path / "cache"
    )
    found.write_report(tmp_path)
    expected = dict(mixed.reasons)
    if family == "llava":
        expected["video_unsupported"] = mixed.videos
    report = json.loads((tmp_path / "data_report.json").read_text())
    assert report["rejected"] == expected
    assert report["samples"] == ROWS == report["usable"] + sum(expected.values())
    assert report["usable"] == len(found) == sum(one["usable"] for one in report["sets"].values())
    lines = [json.loads(line) for line in (tmp_path / "data_rejected.jsonl").read_text().splitlines()]
    assert len(lines) == sum(expected.values())
    given = load_samples(str(mixed.mix))
    for line in lines:
        if line["set"] == "llava.json":
            assert given[line["number"]]["id"].startswith("broken-")
            assert repr(given[line["number"]]["id"]) in line["message"]
    assert sorted({line["number"] for line in lines} | set(found.numbers.tolist())) == list(range(ROWS))


@pytest.mark.parametrize("family", FAMILIES)
def test_prepare__lengths__those_of_the_batches(family: str, mixed: Mixed, tmp_path: Path) -> None:
    collator = ConversationCollator(PROCESSORS[family])
    found = prepare(load_samples(str(mixed.mix)), collator, max_bad_samples=0.1, cache=tmp_path)
    for place in range(0, len(found), 5):
        batch = collator([found[place]])
        entry = found.entries[found.numbers[place]]
        assert batch["input_ids"].shape[1] == found.lengths[place] == entry.tokens
        assert int((batch["labels"] != -100).sum()) == entry.supervised
        types = [
            PROCESSORS[family].tokenizer.convert_tokens_to_ids(t) for t in ("<image>", "<|image_pad|>", "<|video_pad|>")
        ]
        assert sum(int((batch["input_ids"] == t).sum()) for t in types if t is not None) == entry.visual


def test_index__torn_last_line__continued_after_the_last_whole_one(mixed: Mixed, tmp_path: Path) -> None:
    """Counts changed by hand in the index come back for every sample that is not inspected again."""
    given, collator = load_samples(str(mixed.mix)), ConversationCollator(PROCESSORS["llava"])
    assert given.fingerprint is not None
    file = index_file(given.fingerprint, collator, True, tmp_path)
    whole = scan(given, collator, file=file)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == ROWS
    marked = [json.dumps([line[0] + 1000, *line[1:]]) for line in lines]
    file.write_text("\n".join(marked[:100]) + "\n" + marked[100][:9])
    found = scan(given, collator, file=file)
    assert [entry.tokens for entry in found] == [e.tokens + 1000 * (n < 100) for n, e in enumerate(whole)]
    assert len(file.read_text().splitlines()) == ROWS
    assert scan(given, collator, file=file, workers=2) == found
    assert index_file(given.fingerprint, collator, True, tmp_path) == file
    others = [
        index_file("another", collator, True, tmp_path),
        index_file(given.fingerprint, collator, False, tmp_path),
        index_file(given.fingerprint, ConversationCollator(PROCESSORS["qwen2_vl"]), True, tmp_path),
        index_file(given.fingerprint, ConversationCollator(PROCESSORS["llava"], max_pixels=9), True, tmp_path),
    ]
    assert len({file, *others}) == 5


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("llava", "patch_size", 28),
        ("llava", "num_additional_image_tokens", 0),
        ("gemma3", "image_seq_length", 64),
        ("internvl", "image_seq_length", 16),
        ("llava_onevision", "num_image_tokens", 4),
    ],
)
def test_index_file__processor_fields__part_of_its_name(name: str, field: str, value: int, tmp_path: Path) -> None:
    """They decide tokens and lie neither in the image processor nor in the tokenizer."""
    processor = build(name)[1]
    before = index_file("samples", ConversationCollator(processor), True, tmp_path)
    assert getattr(processor, field) != value
    setattr(processor, field, value)
    assert index_file("samples", ConversationCollator(processor), True, tmp_path) != before


@pytest.mark.parametrize("workers", [0, 2])
def test_scan__image_files_changed__samples_inspected_again(workers: int, tmp_path: Path) -> None:
    """A image put in place, one replaced, one removed: each sample is judged again, and no other sample."""
    talk = [{"from": "human", "value": "<image>\nq"}, {"from": "gpt", "value": "red"}]
    lines = [{"id": n, "image": f"{n}.png", "conversations": talk} for n in range(5)]
    (tmp_path / "samples.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    for number in (0, 1, 2, 4):
        make_samples(1, seed=number, size=64)[0]["images"][0].save(tmp_path / f"{number}.png")
    given, collator = load_samples(str(tmp_path / "samples.jsonl")), ConversationCollator(PROCESSORS["qwen2_vl"])
    file = tmp_path / "index.jsonl"
    before = scan(given, collator, file=file, workers=workers)
    assert [entry.reason for entry in before] == ["", "", "", "missing_file", ""]
    marked = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps([line[0], 777, *line[2:]]) + "\n" for line in marked))
    make_samples(1, size=112)[0]["images"][0].save(tmp_path / "1.png")
    (tmp_path / "2.png").unlink()
    make_samples(1, size=64)[0]["images"][0].save(tmp_path / "3.png")
    after = scan(given, collator, file=file, workers=workers)
    assert [entry.reason for entry in after] == ["", "", "missing_file", "", ""]
    assert [entry.visual for entry in after] == [777, 16, 0, before[0].visual, 777]
    assert [json.loads(line)[:2] for line in file.read_text().splitlines()] == [list(e[:2]) for e in after]
    assert sorted(path.suffix for path in tmp_path.iterdir()).count(".new") == 0


def test_scan__write_false__index_unchanged(mixed: Mixed, tmp_path: Path) -> None:
    given, collator = load_samples(str(mixed.mix)), ConversationCollator(PROCESSORS["llava"])
    found = prepare(
        given, collator, folder=tmp_path / "out", max_bad_samples=0.1, cache=tmp_path / "cache", write=False
    )
    assert found.report["samples"] == ROWS
    assert list(tmp_path.iterdir()) == []


def test_load_samples__file_changed__other_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    line = json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red"}]})
    file.write_text(line)
    before = load_samples(str(file)).fingerprint
    assert load_samples(str(file)).fingerprint == before
    file.write_text(f"{line}\n{line}")
    assert load_samples(str(file)).fingerprint != before


def test_prepare__more_than_max_bad_samples__refused_and_listed(tmp_path: Path) -> None:
    collator = ConversationCollator(PROCESSORS["llava"])
    given = [*make_samples(18), {"messages": [], "id": "a"}, {"messages": [], "id": "b"}]
    kept = prepare(given, collator, max_bad_samples=0.1)
    assert len(kept) == 18
    with pytest.raises(
        BadSamplesError,
        match=r"2 of 20 samples cannot be used, 10\.0%, above max_bad_samples = 9\.9% \(2 empty_conversation\)",
    ) as caught:
        prepare(given, collator, folder=tmp_path / "out", max_bad_samples=0.099)
    assert "sample 'a' has no messages" in str(caught.value)
    assert "sample 'b' has no messages" in str(caught.value)
    assert not (tmp_path / "out").exists()  # the error names them all
    many = [{"messages": [], "id": f"sample-{n}"} for n in range(21)]
    with pytest.raises(BadSamplesError, match=r"All are listed in .*data_rejected\.jsonl"):
        prepare([*make_samples(3), *many], collator, folder=tmp_path / "out")
    listed = (tmp_path / "out" / "data_rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["number"] for line in listed] == list(range(3, 24))
    with pytest.raises(BadSamplesError, match=r"1 of 1 samples cannot be used"):
        prepare(given[-1:], collator, max_bad_samples=1.0)
    with pytest.raises(ValueError, match=r"the dataset has no samples"):
        prepare([], collator)
    with pytest.raises(ValueError, match=r"max_bad_samples is a share of the samples between 0 and 1, got 5"):
        prepare(given, collator, max_bad_samples=5)


def text_samples(count: int, word: str) -> str:
    return "\n".join(
        json.dumps(
            {
                "id": f"{word}{n}",
                "messages": [{"role": "user", "content": f"{word} {n}"}, {"role": "assistant", "content": "red"}],
            }
        )
        for n in range(count)
    )


def write_mix(tmp_path: Path, text: str) -> str:
    for word, count in (("one", 20), ("two", 10), ("three", 4)):
        (tmp_path / f"{word}.jsonl").write_text(text_samples(count, word))
    (tmp_path / "mix.yaml").write_text(text)
    return str(tmp_path / "mix.yaml")


def words_of(found: Any) -> list[str]:
    return [found[place]["messages"][0]["content"] for place in range(len(found))]


def test_mix__caps_and_weights__kept(tmp_path: Path) -> None:
    text = "seed: 3\nsets:\n - {path: one.jsonl, cap: 6}\n - {path: two.jsonl, weight: 0.5}\n"
    text += " - {path: three.jsonl, weight: 2.25}\n"
    source = write_mix(tmp_path, text)
    collator = ConversationCollator(PROCESSORS["llava"])
    found = prepare(load_samples(source), collator, cache=tmp_path / "cache")
    words = words_of(found)
    counts = {word: sum(w.startswith(word) for w in words) for word in ("one", "two", "three")}
    assert counts == {"one": 6, "two": 5, "three": 9}
    assert len({w for w in words if w.startswith("one")}) == 6
    assert len({w for w in words if w.startswith("two")}) == 5
    assert sorted(words.count(f"three {n}") for n in range(4)) == [2, 2, 2, 3]
    assert found.report["samples"] == 20
    assert found.report["sets"]["three.jsonl"] == {"samples": 4, "usable": 4, "weight": 2.25, "samples_per_epoch": 9}
    assert words_of(prepare(load_samples(source), collator, cache=tmp_path / "cache")) == words
    other = prepare(
        load_samples(write_mix(tmp_path, text.replace("seed: 3", "seed: 4"))), collator, cache=tmp_path / "cache"
    )
    assert {w for w in words_of(other) if w.startswith("one")} != {w for w in words if w.startswith("one")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sets: []", r"mix\.yaml is no mix; give `sets:`"),
        ("- a", r"mix\.yaml is no mix"),
        ("sets: [", r"mix\.yaml is no mix: no YAML: line 2, column 1"),
        ("sets:\n - {path: one.jsonl, wieght: 2}", r"set 0: [\s\S]*wieght"),
        ("sets:\n - {path: one.jsonl, weight: 0}", r"set 0: [\s\S]*greater than 0"),
        ("sets:\n - {path: one.jsonl, cap: 0}", r"set 0: [\s\S]*greater than or equal to 1"),
        ("sets:\n - {path: none.jsonl}", r"no dataset file at none\.jsonl"),
    ],
)
def test_mix__errors__named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_samples(write_mix(tmp_path, text))


def test_prepare__duplicates_and_repeated_ids__dropped_and_kept(tmp_path: Path) -> None:
    one, two, three = make_samples(3)
    given = [{**one, "id": "a"}, {**two, "id": "a"}, {**one, "id": "a"}, {**three}, {**three}]
    found = prepare(given, ConversationCollator(PROCESSORS["llava"]), max_bad_samples=0.2)
    found.write_report(tmp_path)
    assert found.numbers.tolist() == [0, 1, 3, 4]
    assert found.report["rejected"] == {"duplicate": 1}
    assert found.report["repeated_ids"] == 1
    assert found.report["repeated"] == [{"id": "a", "number": 1, "first": 0}]
    listed = json.loads((tmp_path / "data_rejected.jsonl").read_text())
    assert listed["message"] == "sample 'a' (number 2) repeats sample number 0; drop one of them"


def test_is_scannable__samples_made_on_access__false() -> None:
    import datasets

    class Made:
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> Any:
            return make_samples(1)[0]

    assert not is_scannable(Made())
    assert is_scannable(make_samples(1))
    assert is_scannable(datasets.Dataset.from_list([{"messages": []}]))


@pytest.mark.parametrize("kind", ["parquet", "saved", "folder"])
def test_prepare__parquet_and_saved_dataset__indexed(tmp_path: Path, kind: str) -> None:
    import datasets

    features = datasets.Features(
        messages=datasets.List(
            {
                "role": datasets.Value("string"),
                "content": datasets.List({"type": datasets.Value("string"), "text": datasets.Value("string")}),
            }
        ),
        images=datasets.List(datasets.Image()),
    )
    given = datasets.Dataset.from_list(make_samples(6), features=features)
    if kind == "saved":
        given.save_to_disk(str(tmp_path / "set"))
    else:
        (tmp_path / "set").mkdir()
        given.to_parquet(str(tmp_path / "set" / "samples.parquet"))
    source = tmp_path / "set" / "samples.parquet" if kind == "parquet" else tmp_path / "set"
    collator = ConversationCollator(PROCESSORS["qwen2_vl"])
    found = prepare(load_samples(str(source)), collator, cache=tmp_path / "cache")
    assert len(found) == 6
    assert len(list((tmp_path / "cache").glob("*.jsonl"))) == 1
    expected = collator(make_samples(6))
    batch = collator([found[place] for place in range(6)])
    assert all(np.array_equal(batch[key], expected[key]) for key in expected)
