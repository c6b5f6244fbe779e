"""What may be passed as a dataset: a table or a path is read, what can be read only once is refused."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

import grace_plugin
from grace_plugin.data import ConversationCollator, as_samples, prepare
from tests.pairs import Pair, recipe_text
from tests.tiny import build, make_samples

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "red"}]
SAMPLES = [{"id": str(n), "messages": TALK} for n in range(3)]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(sample) + "\n" for sample in SAMPLES))
    return path


FORMS = {
    "a list": lambda _file: SAMPLES,
    "a path": lambda file: file,
    "a path as text": str,
    "a DataFrame": lambda _file: pd.DataFrame(SAMPLES),
    "a dict of lists": lambda _file: {key: [sample[key] for sample in SAMPLES] for key in SAMPLES[0]},
    "a DatasetDict": lambda _file: datasets.DatasetDict(
        train=datasets.Dataset.from_list(SAMPLES), test=datasets.Dataset.from_list(SAMPLES[:1])
    ),
    "a dict of splits": lambda _file: {"train": SAMPLES, "test": SAMPLES[:1]},
    "a dict of arrays": lambda _file: {
        "id": np.array(["0", "1", "2"]),
        "messages": np.array([TALK] * 3 + [None], dtype=object)[:3],
    },
    "an Arrow table": lambda _file: pa.Table.from_pylist(SAMPLES),
    "a DatasetDict of one split": lambda _file: datasets.DatasetDict(all=datasets.Dataset.from_list(SAMPLES)),
}


@pytest.mark.parametrize("form", FORMS)
def test_as_samples__obvious_form__is_read(form: str, file: Path, tmp_path: Path) -> None:
    found = prepare(FORMS[form](file), ConversationCollator(build("qwen2_vl")[1]), cache=tmp_path / "cache")
    assert [found[n]["id"] for n in range(len(found))] == ["0", "1", "2"]


def test_as_samples__missing_cells_of_a_dataframe__are_no_fields() -> None:
    table = pd.DataFrame([{"messages": TALK, "images": None}, {"messages": TALK, "system": "short"}])
    assert as_samples(table)[0]["system"] is None
    found = prepare(table, ConversationCollator(build("qwen2_vl")[1]))
    assert found.report["usable"] == 2


REFUSED: dict[str, tuple[Any, str]] = {
    "a generator": ((one for one in SAMPLES), r"the dataset is a generator, which can be read once.*list\(...\)"),
    "a map": (map(dict, SAMPLES), "the dataset is a map, which can be read once"),
    "splits": (
        datasets.DatasetDict(a=datasets.Dataset.from_list(SAMPLES), b=datasets.Dataset.from_list(SAMPLES)),
        r"has the splits \['a', 'b'\] and none is named train",
    ),
    "one sample": ({"messages": TALK}, "the dataset is one sample; pass a list"),
    "columns of two lengths": ({"messages": [TALK, TALK], "id": ["0"]}, "not lists of one length"),
    "a number": (7, "the dataset is a int; give a list of samples"),
    "nothing": (None, "the dataset is a NoneType"),
    "a function": (lambda: SAMPLES, "the dataset is a function"),
    "values of a dict": ({"a": SAMPLES}.values(), "the dataset is a dict_values; give a list"),
    "a type": (list, "the dataset is a type; give a list"),
    "samples as JSON text": (json.dumps(SAMPLES * 20), "is no path and no name of a dataset"),
    "an empty text": ("", "the dataset '' is no path"),
    "a missing file": ("gone.jsonl", "no dataset file at gone.jsonl"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_train_and_oneshot__dataset_that_cannot_be_read__is_refused_before_anything_is_written(
    name: str, llava: Pair, tmp_path: Path
) -> None:
    dataset, message = REFUSED[name]
    given = {"recipe": recipe_text(llava.teacher), "dataset": dataset, "output_dir": tmp_path / "out"}
    for run, more in ((grace_plugin.train, {"max_steps": 1}), (grace_plugin.oneshot, {})):
        with pytest.raises(ValueError, match=message):
            run(llava.student, **given, **more)
    assert not list(tmp_path.iterdir())


def test_prepare__generator__is_refused_and_not_half_read() -> None:
    given = iter(make_samples(2))
    with pytest.raises(ValueError, match="which can be read once"):
        prepare(given, ConversationCollator(build("qwen2_vl")[1]))
    assert len(list(given)) == 2


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("damaged", [b"no image", EPS], ids=["bytes", "EPS"])
@pytest.mark.parametrize("place", ["image", "images", "parts"])
def test_prepare__damaged_image_in_a_dataset_of_images__is_counted_and_not_raised(place: str, damaged: bytes) -> None:
    out = io.BytesIO()
    Image.new("RGB", (56, 56), (9, 90, 200)).save(out, "PNG")
    samples, image = [], datasets.Image()
    for content in (out.getvalue(), damaged, out.getvalue()):
        held = {"bytes": content, "path": None}
        sample: dict[str, Any] = {"messages": TALK, **({"image": held} if place == "image" else {"images": [held]})}
        if place == "parts":
            asked = [{"role": "user", "content": [{"type": "image", "image": held, "text": None}]}]
            answer = [{"role": "assistant", "content": [{"type": "text", "image": None, "text": "red"}]}]
            sample = {"messages": asked + answer}
        samples.append(sample)
    dataset = datasets.Dataset.from_list(samples)
    features = dataset.features.copy()
    if place == "parts":
        turn = features["messages"].feature
        turn["content"] = datasets.List({**turn["content"].feature, "image": image})
        features["messages"] = datasets.List(turn)
    else:
        features[place] = image if place == "image" else datasets.List(image)
    given = dataset.cast(features).select([2, 1, 0])
    found = prepare(given, ConversationCollator(build("qwen2_vl")[1]), max_bad_samples=0.5)
    assert found.report["rejected"] == {"unreadable_image": 1}
    assert found.numbers.tolist() == [0, 2]
    assert found.report["images_and_videos"] == 2


def test_as_samples__dataset_with_a_transform__keeps_its_images() -> None:
    out = io.BytesIO()
    Image.new("RGB", (8, 8)).save(out, "PNG")
    dataset = datasets.Dataset.from_list([{"image": {"bytes": out.getvalue(), "path": None}}])
    given = dataset.cast_column("image", datasets.Image())
    given.set_transform(lambda batch: {"size": [image.size for image in batch["image"]]})
    assert as_samples(given)[0] == {"size": (8, 8)}
