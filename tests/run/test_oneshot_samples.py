"""`oneshot` inspects its samples as `train` does: counted, left out, ordered by a seed, and refused when too many fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import AutoProcessor

import grace_plugin
from grace_plugin.data import BadSamplesError, ConversationCollator, load_samples
from grace_plugin.run.samples import calibration_samples, training_samples
from tests.pairs import Pair, recipe_text
from tests.tiny import build, make_samples

ONESHOT = {"epochs": 1.0, "learning_rate": 1.0e-3}


def written(folder: Path, broken: int) -> str:
    """Ten samples on disk, the image of sample `broken` cut off."""
    lines = []
    for number, sample in enumerate(make_samples(10, seed=41)):
        path = folder / f"{number}.png"
        sample["images"][0].save(path)
        lines.append(json.dumps({"messages": sample["messages"], "images": [path.name]}))
    cut = folder / f"{broken}.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return str(folder / "samples.jsonl")


def asked(pair: Pair, out: Path, dataset: Any, **options: Any) -> Any:
    recipe = recipe_text(pair.teacher, oneshot=ONESHOT)
    return grace_plugin.oneshot(
        str(pair.student), recipe=recipe, dataset=dataset, output_dir=out, batch_size=4, **options
    )


@pytest.mark.slow
def test_a_broken_image_is_counted_and_left_out(llava: Pair, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    done = asked(llava, tmp_path / "out", load_samples(written(tmp_path, 7)), max_bad_samples=0.1)
    assert done.verification["verified"]
    assert (done.data["samples"], done.data["usable"], done.data["rejected"]) == (10, 9, {"unreadable_image": 1})
    assert json.loads((tmp_path / "out.run/data_report.json").read_text()) == done.data
    [line] = [json.loads(line) for line in (tmp_path / "out.run/data_rejected.jsonl").read_text().splitlines()]
    assert (line["number"], line["set"]) == (7, "samples.jsonl")
    assert "sample 7: cannot read image" in line["message"]
    assert "1 of 10 samples are not used" in caplog.text
    assert json.loads((done.checkpoint / "grace/record.json").read_text())["run"]["steps"] == 3  # nine samples by four


def test_too_many_broken_samples_stop_it_before_the_first_step(llava: Pair, tmp_path: Path) -> None:
    given = load_samples(written(tmp_path, 2))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        BadSamplesError,
        match=r"1 of 10 samples cannot be used, 10\.0%, above max_bad_samples = 5\.0% .*sample 2: cannot read image",
    ):
        asked(llava, tmp_path / "out", given)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (
            IterableDataset.from_generator(lambda: iter(make_samples(2))),
            {},
            r"a stream cannot be drawn from; .*islice\(stream, 512\)",
        ),
        ([], {}, "the dataset has no samples"),
        (
            make_samples(2),
            {"num_calibration_samples": 0},
            "num_calibration_samples and batch_size are at least 1, got 0 and 4",
        ),
        (make_samples(2), {"max_pixels": 5}, r"2 image_too_large.*limit is 5"),
    ],
)
def test_what_cannot_be_drawn_from_is_refused(
    llava: Pair, tmp_path: Path, dataset: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        asked(llava, tmp_path / "out", dataset, **options)
    assert list(tmp_path.iterdir()) == []


def drawn(dataset: Any, **change: Any) -> Any:
    limits = {"count": 6, "batch_size": 2, "share": 0.5, "seed": 3} | change
    return calibration_samples(dataset, ConversationCollator(build("llava")[1]), Path("unused"), **limits)


def numbered(count: int, start: int = 0) -> list[dict[str, Any]]:
    ask, answer = {"role": "user", "content": "which?"}, "say"
    return [{"messages": [ask, {"role": "assistant", "content": f"{answer} {n}"}]} for n in range(start, start + count)]


def said(found: Any) -> list[str]:
    """Answers in the order of an epoch."""
    return [found.dataset[place]["messages"][-1]["content"] for place in found.sampler]


def test_samples_are_drawn_and_ordered_by_the_seed_and_keep_their_numbers() -> None:
    given = numbered(40)
    one = drawn(given)
    assert said(one) == said(drawn(given))
    assert len(set(said(one))) == 6
    assert (
        set(said(one)) != set(said(drawn(given, seed=4))) != {sample["messages"][-1]["content"] for sample in given[:6]}
    )
    assert said(one) != (one.sampler.set_epoch(1), said(one))[1]
    given[int(one.dataset.samples.numbers[4])] = {"messages": []}
    broken = int(one.dataset.samples.numbers[4])
    found = drawn(given).dataset
    assert [line["number"] for line in found.rejected] == [broken]
    assert found.rejected[0]["message"].startswith(f"sample {broken} has no messages")


def test_every_set_of_a_mix_is_drawn_from(tmp_path: Path) -> None:
    """The first samples of a mix are those of its first set alone."""
    for name, start in (("one", 0), ("two", 100)):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, numbered(50, start))))
    (tmp_path / "mix.yaml").write_text("sets: [{path: one.jsonl}, {path: two.jsonl, weight: 2}]")
    found = drawn(load_samples(str(tmp_path / "mix.yaml")), count=20)
    report = found.report["sets"]
    assert report["one.jsonl"]["samples"] + report["two.jsonl"]["samples"] == 20
    assert min(one["samples"] for one in report.values()) >= 4
    assert found.count == report["one.jsonl"]["samples"] + 2 * report["two.jsonl"]["samples"]
    assert sum(int(text.split()[1]) >= 100 for text in said(found)) == 2 * report["two.jsonl"]["samples"]


def test_without_any_image_it_says_that_the_relation_is_absent(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        drawn(make_samples(4))
        assert caplog.text == ""
        drawn(make_samples(4, images=0))
    assert "no sample has an image or a video: the relational term is absent" in caplog.text


@pytest.mark.parametrize("images", [0, 1])
def test_a_stream_says_so_too(images: int, caplog: pytest.LogCaptureFixture, tmp_path: Path, llava: Pair) -> None:
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    arguments = SimpleNamespace(process_index=0, world_size=1)

    class Stream:
        def __iter__(self) -> Any:
            return iter(make_samples(3, images=images))

    training_samples(Stream(), collator, arguments, tmp_path, 0.0)
    absent = "none of the stream's first 3 samples has an image or a video: the relational term is absent"
    assert (absent in caplog.text) == (images == 0)
