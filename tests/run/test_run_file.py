"""`run.yaml` holds what a run was given, and a run from it gives the same bits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset

import grace_plugin
from grace_plugin.data import load_samples, stream_samples
from grace_plugin.run.manifest import dataset_digest, read_run_file, without_paths
from tests.pairs import Pair, loaded, mixed_samples, recipe_text, run
from tests.tiny import make_samples


def write_samples(folder: Path, count: int = 6) -> Path:
    """A JSONL dataset with images next to it."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, sample in enumerate(mixed_samples(count)):
        for place, image in enumerate(sample["images"]):
            image.save(folder / f"{number}-{place}.png")
        names = [f"{number}-{place}.png" for place in range(len(sample["images"]))]
        lines.append(json.dumps({**sample, "images": names}))
    (folder / "samples.jsonl").write_text("\n".join(lines))
    return folder / "samples.jsonl"


OPTIONS: dict[str, Any] = {
    "max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2, "lr_scheduler_type": "linear",
    "warmup_steps": 1, "weight_decay": 0.1, "seed": 3, "max_length": 400,
}  # fmt: skip


@pytest.fixture(scope="module")
def first(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run from files; its checkpoint is `out`."""
    folder = tmp_path_factory.mktemp("first")
    recipe = folder / "recipe.yaml"
    recipe.write_text(recipe_text(llava.teacher, relational={"weight": 1.0}))
    run(llava, folder / "out", load_samples(str(write_samples(folder / "data"))), recipe=recipe, **OPTIONS)
    recipe.unlink()  # what is in it is in run.yaml
    return folder


def test_run_file__after_a_run__has_all_inputs(llava: Pair, first: Path) -> None:
    content = read_run_file(first / "out.run")
    assert content["model"]["path"] == str(llava.student) and len(content["model"]["fingerprint"]) == 64
    assert content["teacher"]["path"] == str(llava.teacher) and len(content["teacher"]["fingerprint"]) == 64
    asked = content["recipe"]["grace_stage"]["grace_modifiers"]["GraceModifier"]
    assert asked["relational"]["weight"] == 1.0 and asked["ignore"] == []
    assert content["dataset"] | {"fingerprint": ""} == {
        "path": str(first / "data/samples.jsonl"), "samples": 6, "fingerprint": ""
    }  # fmt: skip
    assert content["max_length"] == 400 and "max_pixels" not in content and "packing" not in content
    wanted = {
        "num_train_epochs": 2.0, "lr_scheduler_type": "linear", "seed": 3, "save_strategy": "no", "learning_rate": 1e-3,
        "use_cpu": True, "per_device_train_batch_size": 2, "warmup_steps": 1.0,
    }  # fmt: skip
    assert content["arguments"].items() >= wanted.items()
    assert not {"max_steps", "output_dir", "adam_beta1", "label_names"} & content["arguments"].keys()
    assert content["environment"]["processes"] == 1 and content["environment"]["torch"]


@pytest.mark.slow
def test_train_from__same_inputs__same_bits(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_commands import in_process

    monkeypatch.chdir(tmp_path)
    assert in_process(monkeypatch, "train", "--from", str(first / "out.run/run.yaml"), "--output_dir", "again") == 0
    left, right = (folder / "model.safetensors" for folder in (first / "out", tmp_path / "again"))
    assert left.read_bytes() == right.read_bytes()
    one, two = read_run_file(first / "out.run"), read_run_file(tmp_path / "again.run")
    assert one == two
    assert "verified checkpoint: again" in capsys.readouterr().out


@pytest.mark.slow
def test_train_from__argument_given__replaces_the_recorded(first: Path, tmp_path: Path) -> None:
    result = grace_plugin.train_from(first / "out.run", output_dir=tmp_path / "out", max_steps=1, seed=4)
    assert json.loads((result.checkpoint / "grace/record.json").read_text())["run"]["steps"] == 1
    content = read_run_file(tmp_path / "out.run")
    assert (content["arguments"]["max_steps"], content["arguments"]["seed"]) == (1, 4)
    assert "num_train_epochs" not in content["arguments"]


def test_option_given_with_the_default_of_train__replaces_what_is_recorded(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.cli.test_commands import in_process

    shutil.copytree(first / "data", tmp_path / "data")
    next((tmp_path / "data").glob("0-*.png")).unlink()  # one sample of six cannot be used
    content = yaml.safe_load((first / "out.run/run.yaml").read_text())
    content["dataset"] = {"path": str(tmp_path / "data/samples.jsonl")}
    content["max_bad_samples"] = 0.9
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    given = ["--from", str(tmp_path / "run.yaml"), "--output_dir", str(tmp_path / "out"), "--max_bad_samples", "0.05"]
    assert in_process(monkeypatch, "train", *given) == 2
    assert "above max_bad_samples = 5.0%" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("changed", ["an answer", "an image"])
def test_train_from__another_dataset_in_the_same_place__refused(first: Path, tmp_path: Path, changed: str) -> None:
    shutil.copytree(first / "data", tmp_path / "data")
    content = yaml.safe_load((first / "out.run/run.yaml").read_text())
    content["dataset"]["path"] = str(tmp_path / "data/samples.jsonl")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(content))
    if changed == "an answer":
        lines = (tmp_path / "data/samples.jsonl").read_text()
        (tmp_path / "data/samples.jsonl").write_text(lines.replace("is", "was", 1))
    else:
        with next((tmp_path / "data").glob("*.png")).open("ab") as image:
            image.write(b"\0")
    with pytest.raises(
        ValueError, match=r"the dataset of the run was read from .*, and another one is there now; give"
    ):
        grace_plugin.train_from(tmp_path / "run.yaml", output_dir=tmp_path / "out")
    assert not (tmp_path / "out.run").exists()


def test_train_from__file_without_paths__asks_for_them(
    llava: Pair, first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (first / "out/run.yaml").read_text()
    assert yaml.safe_load(text) == without_paths(read_run_file(first / "out.run"))
    assert str(llava.student.parent) not in text and str(first) not in text and "samples.jsonl" in text
    assert "run.yaml" in json.loads((first / "out/grace/record.json").read_text())["files"]
    (tmp_path / "run.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"the teacher of the run was read from 'teacher', and nothing readable is there"
    ):
        grace_plugin.train_from("run.yaml", output_dir="out")
    with pytest.raises(ValueError, match=r"the model of the run was read from 'student', .* give model= \(--model\)"):
        grace_plugin.train_from("run.yaml", output_dir="out", teacher=llava.teacher)
    with pytest.raises(ValueError, match=r"the dataset of the run cannot be read: .*samples.jsonl.* give dataset="):
        grace_plugin.train_from("run.yaml", output_dir="out", teacher=llava.teacher, model=llava.student)


@pytest.mark.slow
def test_train_from__python_objects__have_to_be_given_again(llava: Pair, tmp_path: Path) -> None:
    held = make_samples(4)
    result = run(llava, tmp_path / "a", held, model=loaded(llava), max_steps=1)
    content = read_run_file(tmp_path / "a.run")
    assert content["model"] == {"given": True, "class": "LlavaForConditionalGeneration", "name": "student"}
    assert content["dataset"]["class"] == "list" and len(content["dataset"]["fingerprint"]) == 64
    with pytest.raises(ValueError, match=r"train_from with model= \(LlavaFor.* of student\), dataset= \(list\)"):
        grace_plugin.train_from(tmp_path / "a.run", output_dir=tmp_path / "b")
    again = grace_plugin.train_from(tmp_path / "a.run", output_dir=tmp_path / "b", model=loaded(llava), dataset=held)
    left, right = (r.checkpoint / "model.safetensors" for r in (result, again))
    assert left.read_bytes() == right.read_bytes()


def test_dataset_digest__content__alone_counts(tmp_path: Path) -> None:
    file = write_samples(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    one = dataset_digest(load_samples(str(file)))
    assert one == dataset_digest(load_samples(str(tmp_path / "b/samples.jsonl")))
    lines = file.read_text().splitlines()
    file.write_text("\n".join(reversed(lines)))
    assert one != dataset_digest(load_samples(str(file)))
    held = make_samples(2)
    assert dataset_digest(held) == dataset_digest(make_samples(2)) != dataset_digest(make_samples(2, seed=5))
    texts = [{"messages": [{"role": "user", "content": str(n)}]} for n in range(3)]
    assert dataset_digest(Dataset.from_list(texts)) == dataset_digest(Dataset.from_list(texts))
    assert dataset_digest(Dataset.from_list(texts)) != dataset_digest(Dataset.from_list(texts[::-1]))
    assert dataset_digest(stream_samples(str(file))) is None


def test_dataset_digest__weights_of_a_mix__count(tmp_path: Path) -> None:
    write_samples(tmp_path)
    found = set()
    for weight in (1, 2):
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"sets": [{"path": "samples.jsonl", "weight": weight}]}))
        found.add(dataset_digest(load_samples(str(tmp_path / "mix.yaml"))))
    assert len(found) == 2


WHOLE = "version: 1, model: {}, recipe: {}, dataset: {}, arguments: {}"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "no run file at .*run.yaml"),
        ("", "is no run file: it holds a NoneType"),
        ("a: [", "is not a readable YAML file"),
        ("- 1", "is no run file: it holds a list"),
        ("a: !!int ''", "is not a readable YAML file"),
        ("a: &x [1]\nb: *x", "is no run file: it has no arguments, dataset, model, recipe, version"),
        (
            f"a0: &a0 [{', '.join('x' * 100)}]\na1: &a1 [{', '.join(['*a0'] * 100)}]\na2: [{', '.join(['*a1'] * 100)}]",
            "line 3, column 5: aliases that stand for more than 100,000 values",
        ),
        ("model: {}", "is no run file: it has no arguments, dataset, recipe, version"),
        ("{version: 7, model: {}, recipe: {}, dataset: {}, arguments: {}}", "has version 7; this version .* reads 1"),
        ("{version: 1, model: {}, recipe: {}, dataset: {}, arguments: 3}", "it has no mapping of arguments"),
        (f"{{{WHOLE}, callbacks: 5}}", "has entries that no run writes: callbacks"),
        (f"{{{WHOLE}, max_bad_rows: many}}", "max_bad_samples takes a number, got 'many'"),
        (f"{{{WHOLE}, output_dir: elsewhere}}", "has entries that no run writes: output_dir"),
        (f"{{{WHOLE}, max_length: abc}}", "max_length takes a whole number, got 'abc'"),
        (f"{{{WHOLE}, packing: maybe}}", "packing takes true or false, got 'maybe'"),
        (f"{{{WHOLE}, special_tokens: [1]}}", "special_tokens takes a list of tokens, got"),
        (f"{{{WHOLE}, teacher: 5}}", "teacher takes a mapping, as a run writes it, got 5"),
        (f"{{{WHOLE}, environment: 5}}", "environment takes a mapping, as a run writes it, got 5"),
        (f"{{{WHOLE.replace('model: {}', 'model: 5')}}}", "model takes a mapping, as a run writes it, got 5"),
        (f"{{{WHOLE.replace('dataset: {}', 'dataset: 5')}}}", "dataset takes a mapping, as a run writes it, got 5"),
        (f"{{{WHOLE.replace('recipe: {}', 'recipe: 7')}}}", "recipe takes a mapping, as a run writes it, got 7"),
        (f"{{{WHOLE.replace('model: {}', 'model: {path: 5}')}}}", "path of model takes a path, got 5"),
        (f"{{{WHOLE.replace('dataset: {}', 'dataset: {path: [a]}')}}}", "path of dataset takes a path, got"),
        (f"{{{WHOLE}}}", "model has no path"),
        (
            "{version: 1, version: 1, model: {}, recipe: {}, dataset: {}, arguments: {}}",
            "line 1, column 14: the key 'version' is given twice; keep one of them",
        ),
        ("a: " + "x" * 2**20, "it has more than 1048576 bytes"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_read_run_file__not_written_by_a_run__one_sentence(tmp_path: Path, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=sentence) as raised:
        grace_plugin.train_from(tmp_path, output_dir=tmp_path / "out") if text is not None else read_run_file(
            tmp_path / "run.yaml"
        )
    assert len(str(raised.value)) < 500 and "\n" not in str(raised.value)
