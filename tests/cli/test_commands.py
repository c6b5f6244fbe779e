"""The commands as a user runs them: help, one sentence and a status for bad input, train and verify end to end."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from grace_plugin.cli import commands
from grace_plugin.cli.register_grace import (
    COMMANDS,
    DATA_COMMANDS,
    REGISTER_COMMANDS,
    TEACHER_COMMANDS,
    DataCommand,
    GraceCommand,
    TeacherCommand,
)
from tests.conftest import Finished
from tests.pairs import Pair, recipe_text
from tests.tiny import make_samples

BIN = Path(sys.executable).parent
FILE = Path(__file__).parents[2] / "grace_plugin" / "cli" / "register_grace.py"
ENTRIES = ([str(BIN / "grace")], [str(BIN / "optimum-cli"), "grace"])


def call(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | environment,
    )


def in_process(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The alias's entry point with these arguments; returns its exit status."""
    from grace_plugin.cli.register_grace import main

    monkeypatch.setattr(sys, "argv", ["grace", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return int(left.value.code or 0)


@pytest.mark.parametrize("entry", ENTRIES, ids=["grace", "optimum-cli"])
@pytest.mark.parametrize("command", [None, "train", "oneshot", "verify", "report", "demo"])
def test_help__every_command__light_and_names_what_it_takes(entry: list[str], command: str | None) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = call(*entry, *([command] if command else []), "--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    expected = (
        ["train", "oneshot", "verify", "report", "demo"]
        if command is None
        else {"verify": ["checkpoint"]}.get(command, ["--output_dir"])
    )
    assert all(word in done.stdout for word in expected)
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


@pytest.mark.parametrize("module", ["optimum.commands.register.register_grace", "optimum.commands.optimum_cli"])
def test_register__imported_by_optimum__nothing_heavy(module: str) -> None:
    heavy = ("torch", "transformers", "llmcompressor", "grace_plugin")
    code = f"import sys, {module}; print([m for m in {heavy} if m in sys.modules])"
    assert call(sys.executable, "-c", code).stdout.strip() == "[]"


def test_commands__group_and_alias__the_same() -> None:
    assert REGISTER_COMMANDS == [GraceCommand]
    names = [name for name, _, _ in COMMANDS]
    assert [c.name for c in GraceCommand.SUBCOMMANDS] == [*names, "data", "teacher"]
    assert [c.name for c in DataCommand.SUBCOMMANDS] == [name for name, _, _ in DATA_COMMANDS] == ["check"]
    assert [c.name for c in TeacherCommand.SUBCOMMANDS] == [name for name, _, _ in TEACHER_COMMANDS] == ["cache"]
    within = [f"data {name}" for name, _, _ in DATA_COMMANDS] + [f"teacher {name}" for name, _, _ in TEACHER_COMMANDS]
    assert all(callable(commands.command_of(name)) for name in (*names, *within))


def test_group__no_command__prints_them_and_status_2() -> None:
    done = call(*ENTRIES[1])
    assert done.returncode == 2
    assert "train" in done.stdout and "verify" in done.stdout


@pytest.mark.slow
def test_verify__untouched__status_0(finished: Finished, tmp_path: Path) -> None:
    done = call(str(BIN / "grace"), "verify", str(shutil.copytree(finished.folder, tmp_path / "good")))
    assert done.returncode == 0, done.stderr
    assert '"layers_with_other_codes": 0' in done.stdout
    assert "not covered" not in done.stderr


def test_verify__model_card_added__named_in_a_line(finished: Finished, tmp_path: Path) -> None:
    published = shutil.copytree(finished.folder, tmp_path / "published")
    (published / "README.md").write_text("---\nlicense: mit\n---\n")
    done = call(str(BIN / "grace"), "verify", str(published))
    assert done.returncode == 0 and '"files_not_covered": [\n  "README.md"\n ]' in done.stdout
    assert "not covered by the verification: README.md\n" in done.stderr


@pytest.mark.slow
def test_verify__changed_checkpoint__one_sentence_and_status_1(finished: Finished, tmp_path: Path) -> None:
    changed = shutil.copytree(finished.folder, tmp_path / "changed")
    (changed / "tokenizer_config.json").write_text("{}")
    done = call(str(BIN / "optimum-cli"), "grace", "verify", str(changed))
    assert done.returncode == 1
    assert "grace verify failed:" in done.stderr and "processor_files_changed" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify__other_folder__status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "verify", str(tmp_path)) == 2
    assert f"grace verify: {tmp_path} holds no grace/record.json" in capsys.readouterr().err


def written(pair: Pair, folder: Path) -> tuple[Path, Path]:
    """A recipe file and a JSONL dataset with its images next to it."""
    recipe, data = folder / "recipe.yaml", folder / "samples.jsonl"
    recipe.write_text(recipe_text(pair.teacher, oneshot={"epochs": 1.0, "learning_rate": 1e-3}))
    lines = []
    for number, sample in enumerate(make_samples(4, seed=61)):
        sample["images"][0].save(folder / f"{number}.png")
        lines.append(json.dumps({**sample, "images": [f"{number}.png"]}))
    data.write_text("\n".join(lines))
    return recipe, data


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train", "oneshot"])
def test_train_and_oneshot__dataset_file__verified_checkpoint(
    llava: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    recipe, data = written(llava, tmp_path)
    options = ["--set", "max_steps=2", "--set", "per_device_train_batch_size=2", "--set", "learning_rate=1e-3"]
    options += ["--set", "disable_tqdm=true", "--set", "use_cpu=true"] if name == "train" else []
    options = options if name == "train" else ["--batch_size", "2", "--num_calibration_samples", "4"]
    status = in_process(
        monkeypatch,
        name,
        str(recipe),
        "--model",
        str(llava.student),
        "--dataset",
        str(data),
        "--output_dir",
        str(tmp_path / "out"),
        *options,
    )
    printed = capsys.readouterr().out
    assert status == 0
    assert f"verified checkpoint: {tmp_path / 'out'}" in printed
    assert json.loads((tmp_path / "out/grace/record.json").read_text())["run"]["steps"] == 2
    assert in_process(monkeypatch, "verify", str(tmp_path / "out"), "--source", str(llava.student)) == 0


@pytest.mark.slow
def test_train__streaming__needs_max_steps(
    llava: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = written(llava, tmp_path)
    given = [str(recipe), "--model", str(llava.student), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    given += ["--streaming", "--set", "use_cpu=true", "--set", "disable_tqdm=true"]
    assert in_process(monkeypatch, "train", *given) == 2
    assert "the dataset has no length; pass max_steps=" in capsys.readouterr().err
    assert in_process(monkeypatch, "train", *given, "--set", "max_steps=1") == 0
    assert f"verified checkpoint: {tmp_path / 'out'}" in capsys.readouterr().out
    report = json.loads((tmp_path / "out.run/data_report.json").read_text())
    assert report["stream"] and report["usable"] == report["samples"] > 0


@pytest.mark.parametrize("limits", [("--max_pixels", "99"), ("--max_pixels", "99", "--max_bad_samples", "1.0")])
@pytest.mark.parametrize("name", ["train", "oneshot", "teacher cache", "data check"])
def test_limits__max_pixels_and_max_bad_samples__taken_from_the_command(
    llava: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    limits: tuple[str, ...],
) -> None:
    """No image has so few pixels: every sample is too large, and with every sample allowed to be, none is left."""
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "index"))
    recipe, data = written(llava, tmp_path)
    given = [str(data)] if name == "data check" else [str(recipe), "--dataset", str(data)]
    given += ["--model", str(llava.student), "--output_dir", str(tmp_path / "out"), *limits]
    status = in_process(monkeypatch, *name.split(), *given)
    said = capsys.readouterr()
    if name == "data check":
        assert status == 2 and "0 of 4 samples can be used" in said.out and "image_too_large" in said.out
        return
    assert status == 2
    above = f"above max_bad_samples = {'100.0' if len(limits) > 2 else '5.0'}%"
    assert f"4 of 4 samples cannot be used, 100.0%, {above} (4 image_too_large)" in said.err
    assert "the limit is 99; scale it down, or raise max_pixels (--max_pixels)" in said.err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--dataset": "none.jsonl"}, "no dataset file at none.jsonl"),
        ({"--model": "/no/where"}, "there is no folder '/no/where' for model"),
        ({"recipe": "none.yaml"}, "no recipe at none.yaml"),
        ({"--teacher": "/no/teacher"}, "there is no folder '/no/teacher' for teacher"),
        ({"--set": "learning_rate"}, "--set takes NAME=VALUE, got 'learning_rate'"),
        ({"--set": "learning_rte=1"}, "did you mean learning_rate?"),
        ({"--set": "learning_rate=abc"}, "learning_rate takes a number, got 'abc'"),
        ({"--set": "learning_rate=0,0001"}, "learning_rate takes a number, got '0,0001'"),
        ({"--set": "max_steps=abc"}, "max_steps takes a whole number, got 'abc'"),
        ({"--set": "gradient_accumulation_steps=0"}, "gradient_accumulation_steps must be at least 1, got 0"),
        (
            {"--set": 'lr_scheduler_kwargs={"min_lr": 1e-6}'},
            "lr_scheduler_type=cosine does not take lr_scheduler_kwargs=",
        ),
        ({"--set": "output_dir="}, "output_dir is no field of TrainingArguments; use --output_dir"),
        ({"--set": "activation_offloading=maybe"}, "activation_offloading takes true or false, got 'maybe'"),
        ({"--set": "push_to_hub=true"}, "push_to_hub=True cannot be used: it would upload the run folder"),
        ({"--set": "save_strategy=best"}, "save_strategy=best cannot be used"),
        ({"--output_dir": "."}, "output_dir='.' is no name of a new folder"),
        ({"--output_dir": ""}, "output_dir='' is no name of a new folder"),
        ({"--max_length": "12"}, "max_length is 12"),
        ({"--output_dir": "full"}, "full exists and is not empty"),
        (
            {"recipe": "typo.yaml"},
            "grace train: recipe typo.yaml: unknown key 'temperture' in distill; did you mean 'temperature'? known: ",
        ),
    ],
)
def test_train__bad_input__one_sentence_and_status_2(
    llava: Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, str],
    sentence: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe, data = written(llava, tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").write_text("x")
    (tmp_path / "typo.yaml").write_text(recipe_text(llava.teacher, distill={"temperture": 2.0}))
    given = {
        "recipe": str(recipe),
        "--model": str(llava.student),
        "--dataset": str(data),
        "--output_dir": "out",
    } | change
    options = [part for name, value in given.items() if name != "recipe" for part in (name, value)]
    before = {path.name for path in tmp_path.iterdir()}
    assert in_process(monkeypatch, "train", given["recipe"], *options) == 2
    said = capsys.readouterr().err
    error = [line for line in said.splitlines() if line.startswith("grace train:")]
    assert len(error) == 1 and sentence in error[0]
    assert "typo" not in given["recipe"] or said.endswith(error[0] + "\n"), "nothing behind the sentence"
    assert {path.name for path in tmp_path.iterdir()} == before


def test_settings__of_fields_and_of_switches__text_and_booleans() -> None:
    given = ["learning_rate=2e-5", "run_name=a=b", "activation_offloading=false"]
    assert commands._settings(commands._pairs(given)) == {
        "learning_rate": "2e-5",
        "run_name": "a=b",
        "activation_offloading": False,
    }


@pytest.mark.slow
def test_train__config_and_set__set_wins(
    llava: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, data = written(llava, tmp_path)
    (tmp_path / "args.yaml").write_text("learning_rate: 2e-4\nmax_steps: 7\nuse_cpu: true\ndisable_tqdm: true\n")
    given = [str(recipe), "--model", str(llava.student), "--dataset", str(data), "--output_dir", str(tmp_path / "out")]
    given += ["--config", str(tmp_path / "args.yaml"), "--set", "max_steps=1"]
    assert in_process(monkeypatch, "train", *given) == 0
    content = yaml.safe_load((tmp_path / "out.run/run.yaml").read_text())
    assert (content["arguments"]["learning_rate"], content["arguments"]["max_steps"]) == (2e-4, 1)
    (tmp_path / "args.yaml").write_text("learning_rate: [1]\n")
    given[given.index(str(tmp_path / "out"))] = str(tmp_path / "other")
    assert in_process(monkeypatch, "train", *given) == 2
    assert "learning_rate takes a number, got [1]" in capsys.readouterr().err


def test_train__missing_arguments__named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "train", "--output_dir", str(tmp_path / "out"), "--model", "m") == 2
    assert capsys.readouterr().err == "grace train: give a recipe and --dataset, or --from run.yaml\n"
    given = ("--output_dir", str(tmp_path / "out"), "--from", "run.yaml")
    for option in (("--images", str(tmp_path)), ("--streaming",)):
        assert in_process(monkeypatch, "train", *given, *option) == 2
        assert capsys.readouterr().err.startswith("grace train: --images and --streaming belong to --dataset; ")


@pytest.mark.parametrize("spelling", ["--serve_python", "--serve-python"])
def test_demo__serve_python__both_spellings(spelling: str) -> None:
    parser = ArgumentParser()
    (arguments,) = [add for name, _, add in COMMANDS if name == "demo"]
    arguments(parser)
    assert parser.parse_args([spelling, "python"]).serve_python == "python"


def test_grace__unknown_command__refused() -> None:
    done = call(str(BIN / "grace"), "quantise")
    assert done.returncode == 2
    assert "invalid choice: 'quantise'" in done.stderr


def test_export__nothing_to_finish__one_sentence_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert in_process(monkeypatch, "export", str(tmp_path / "none.run")) == 2
    assert "grace export: " in (said := capsys.readouterr().err) and "none.run holds no resume state" in said


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["verify", "none"], "grace verify: none is not a folder; give the folder of a checkpoint that GRACE wrote"),
        (["export", "none.run"], "grace export: none.run holds no resume state, because there is no such folder"),
        (
            ["report", "--compare", "/no/a", "b"],
            "grace report: cannot read checkpoint A at '/no/a': there is no such folder",
        ),
        (["data", "check", "none.jsonl", "--model", "m"], "grace data check: no dataset file at none.jsonl"),
    ],
)
def test_grace__path_that_does_not_exist__refused_without_loading_torch(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    # by its file, as optimum imports it: importing it from the package would load torch with the package
    code = f"""
import runpy, sys
main = runpy.run_path({str(FILE)!r})["main"]
sys.argv = ["grace", *{arguments!r}]
try:
    main()
finally:
    print("torch" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "False\n", f"{sentence}\n")
