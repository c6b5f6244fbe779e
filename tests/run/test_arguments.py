"""Training arguments: every field of TrainingArguments has a rule, text becomes the field's type, nothing is silently void."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from transformers import TrainerCallback, TrainingArguments

from grace_plugin.run import train
from grace_plugin.run.arguments import ARGUMENTS, DEFAULTS, NEEDS
from grace_plugin.run.grace_run import run_folder
from grace_plugin.run.settings import read_arguments
from tests.pairs import Pair, loaded, recipe_text, run, structure
from tests.tiny import make_samples

FIELDS = {field.name: field for field in dataclasses.fields(TrainingArguments)}
REFUSED = [name for name, rule in ARGUMENTS.items() if rule.status == "refused"]


def default(name: str) -> Any:
    field = FIELDS[name]
    return field.default_factory() if callable(field.default_factory) else field.default


def other(name: str) -> Any:
    """A value that no user leaves a refused field at."""
    value = default(name)
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return {"key": 1} if "config" in name else ["other"] if isinstance(value, list) else "other"


def test_arguments__every_installed_field__has_a_rule() -> None:
    assert set(ARGUMENTS) == set(FIELDS)
    assert all(rule.reason for rule in ARGUMENTS.values() if rule.status != "works")
    assert set(NEEDS) <= {name for name, rule in ARGUMENTS.items() if rule.status == "works"}
    assert {name: default(name) for name in DEFAULTS}.items() & DEFAULTS.items() == {("report_to", "none")}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_field__not_at_its_default__error_says_why(name: str) -> None:
    engine = name in ("fsdp", "deepspeed")
    with pytest.raises(ValueError, match="shards the student" if engine else rf"^{name}=.* cannot be used: .{{20}}"):
        read_arguments({name: other(name) if name != "remove_unused_columns" else True})
    if name not in ("output_dir", "remove_unused_columns"):
        assert read_arguments({name: default(name)})[name] == default(name)


def test_refused_field__secret__not_repeated() -> None:
    with pytest.raises(ValueError, match="hub_token") as raised:
        read_arguments({"hub_token": "hf_abcdef"})
    assert "hf_abcdef" not in str(raised.value)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("learning_rate", "2e-5", 2e-5),
        ("max_steps", "3", 3),
        ("bf16", "false", False),
        ("run_name", "else", "else"),
        ("run_name", "2024", "2024"),
        ("seed", "15", 15),
        ("save_strategy", "no", "no"),
        ("save_total_limit", "null", None),
        ("tf32", "None", None),
        ("lr_scheduler_kwargs", "{min_lr: 1e-6, deep: {a: [1e-3, x]}}", {"min_lr": 1e-6, "deep": {"a": [1e-3, "x"]}}),
        ("lr_scheduler_kwargs", '{"min_lr": 1e-06}', {"min_lr": 1e-6}),
        ("optim_target_modules", "[attn, mlp]", ["attn", "mlp"]),
        ("include_num_input_tokens_seen", "true", True),
        ("include_num_input_tokens_seen", "non_padding", "non_padding"),
    ],
)
def test_read_arguments__text__type_of_its_field(name: str, text: str, value: Any) -> None:
    read = read_arguments({name: text, "report_to": "none"} if name != "run_name" else {name: text, "report_to": "all"})
    assert read[name] == value and type(read[name]) is type(value)


WRONG = [
    ({"learning_rate": "abc"}, "learning_rate takes a number, got 'abc'"),
    ({"learning_rate": "0,0001"}, "learning_rate takes a number, got '0,0001'"),
    ({"learning_rate": None}, "learning_rate takes a number, got None"),
    ({"learning_rate": -1e-5}, "learning_rate must be at least 0, got -1e-05"),
    ({"learning_rate": "nan"}, "learning_rate must be at least 0, got nan"),
    ({"learning_rate": "1" * 10_000}, r"learning_rate must be at least 0, got inf"),
    ({"learning_rate": "x" * 10_000}, r"learning_rate takes a number, got 'x{80}'\.\.\. \(10,000 characters\)$"),
    ({"max_steps": "abc"}, "max_steps takes a whole number, got 'abc'"),
    ({"max_steps": 2.5}, "max_steps takes a whole number, got 2.5"),
    ({"max_steps": True}, "max_steps takes a whole number, got True"),
    ({"max_steps": 0}, "max_steps must be at least 1, or -1, got 0"),
    ({"num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
    ({"adam_beta1": 1.5}, "adam_beta1 must be at least 0 and at most 1, got 1.5"),
    ({"dataloader_num_workers": 1_000_000}, "dataloader_num_workers must be at least 0 and at most 256, got 1000000"),
    ({"seed": -1}, "seed must be at least 0 and at most 4.29497e"),
    ({"bf16": "maybe"}, "bf16 takes true or false, got 'maybe'"),
    ({"lr_scheduler_kwargs": "abc"}, "lr_scheduler_kwargs takes a mapping, got 'abc'"),
    ({"lr_scheduler_type": "cosin"}, "lr_scheduler_type takes one of .*, got 'cosin'; did you mean cosine"),
    ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "cannot be used: train.. takes no evaluation set"),
    ({"save_strategy": "best"}, "save_strategy=best cannot be used: train.. takes no evaluation set"),
    ({"optim": "lomo"}, "optim=lomo cannot be used: it steps in the backward pass"),
    ({"log_level": "inf"}, "log_level takes one of .*; did you mean info"),
    ({"report_to": "wand"}, "report_to='wand' is unknown; did you mean wandb"),
    ({"report_to": "clearml"}, "report_to=clearml: its library is not installed"),
    ({"learning_rat": 1}, "'learning_rat' is not an argument of train.. or of .*; did you mean learning_rate"),
    ({"max_lenght": 1}, "did you mean max_length"),
    ({"save_steps": 5}, "save_steps needs save_strategy=steps; without it, it does nothing"),
    ({"save_total_limit": 2}, "save_total_limit needs save_strategy=steps or epoch"),
    ({"logging_steps": 5, "logging_strategy": "epoch"}, "logging_steps needs logging_strategy=steps"),
    ({"run_name": "a"}, "run_name needs report_to"),
    ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers of at least 1"),
    ({"max_steps": 3, "num_train_epochs": 2}, "max_steps and num_train_epochs are both given"),
    ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "warmup_steps does nothing with lr_scheduler_type=constant"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"a": 1}}, "lr_scheduler_kwargs does nothing with"),
    ({"optim": "schedule_free_adamw", "warmup_steps": 0.1}, "warmup_steps with optim=schedule_free_adamw counts steps"),
]


@pytest.mark.parametrize(("given", "sentence"), WRONG, ids=[str(given)[:60] for given, _ in WRONG])
def test_read_arguments__wrong_value__one_short_sentence(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence) as raised:
        read_arguments(given, others=["max_length"])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 800


def asked(folder: Path, **options: Any) -> Any:
    """A run that would first fail for its arguments, then for its student."""
    return train(
        "no-such-student", recipe=recipe_text("no-such-teacher"),
        **({"dataset": make_samples(1), "output_dir": folder / "out", "use_cpu": True} | options),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"lr_scheduler_kwargs": {"min_lr": 1e-6}}, r"lr_scheduler_type=cosine does not take .*'min_lr'"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, r"lr_scheduler_type=cosine_with_min_lr does not take .*min_lr"),
        ({"optim": "sgd", "adam_beta1": 0.5}, "adam_beta1 does nothing with optim=sgd"),
        ({"optim_args": "a=b"}, "optim_args does nothing with optim=adamw_torch"),
        ({"optim_args": "abc"}, "optim=adamw_torch.*: cannot use optim_args='abc'"),
        ({"optim_target_modules": "all-linear"}, "optim_target_modules does nothing with optim=adamw_torch"),
        (
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"foo": 1}},
            "gradient_checkpointing_kwargs has no 'foo'; known: .*use_reentrant",
        ),
        ({"auto_find_batch_size": True}, "auto_find_batch_size=True cannot be used: the length of the run"),
        ({"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}}, "gradient_accumulation_steps"),
        (
            {"train_sampling_strategy": "sequential"},
            "cannot be used: samples of files and lists come in an order by seed",
        ),
        ({"output_dir": "."}, "output_dir='.' is no name of a new folder"),
        ({"output_dir": ""}, "output_dir='' is no name of a new folder"),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"max_pixels": -1}, "max_pixels must be at least 1, got -1"),
        ({"max_bad_samples": 5.0}, "max_bad_samples is a share"),
        ({"activation_offloading": True}, "activation_offloading needs gradient_checkpointing=True"),
    ],
    ids=str,
)
def test_train__bad_argument__refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], sentence: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        asked(tmp_path, **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "4",
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS='4' in the environment",
        ),
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed precision fp16"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG shards the student"),
    ],
)
def test_train__launcher_environment__refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=sentence):
        asked(tmp_path)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train_sampling_strategy": "group_by_length"}, "samples of a stream come in its own order"),
        ({"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, "does nothing with a stream"),
    ],
)
def test_data_options__no_effect_on_a_stream__refused(tmp_path: Path, options: dict[str, Any], sentence: str) -> None:
    stream = IterableDataset.from_generator(lambda: iter(make_samples(1)))
    with pytest.raises(ValueError, match=sentence):
        asked(tmp_path, dataset=stream, max_steps=1, **options)


@pytest.mark.parametrize("name", ["a", "x/a", "/x/a", "a/."])
def test_run_folder__output_dir__next_to_the_checkpoint(name: str) -> None:
    assert run_folder(name) == Path(name.removesuffix("/.") + ".run")


def test_training_page__defaults_that_differ_from_trainers__all_named() -> None:
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    (passage,) = re.findall(r"Defaults that differ from Trainer's:(.*?)\n\n", page, re.DOTALL)
    named = set(re.findall(r"`([a-z0-9_]+)[`=]", passage))
    assert {name for name in DEFAULTS if DEFAULTS[name] != default(name)} | {"bf16"} <= named


@pytest.fixture(scope="module")
def plain(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run without any option."""
    return (run(llava, tmp_path_factory.mktemp("plain") / "out").checkpoint / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_train__options_without_influence__same_bits(llava: Pair, tmp_path: Path, plain: bytes) -> None:
    options: dict[str, Any] = {
        "full_determinism": True, "torch_empty_cache_steps": 1, "include_num_input_tokens_seen": "non_padding",
        "skip_memory_metrics": False, "logging_first_step": True, "train_sampling_strategy": "group_by_length",
        "dataloader_num_workers": 1, "dataloader_persistent_workers": True, "do_train": True, "save_strategy": "epoch",
        "save_total_limit": 1, "learning_rate": "1e-3", "max_steps": "2",
    }  # fmt: skip
    result = run(llava, tmp_path / "out", **options)
    assert (result.checkpoint / "model.safetensors").read_bytes() == plain
    assert any("train_mem_cpu_alloc_delta" in log for log in result.history)
    assert any(log.get("num_input_tokens_seen") for log in result.history)
    assert len(list((tmp_path / "out.run").glob("checkpoint-*"))) == 1


@pytest.mark.slow
def test_train__neftune__no_hook_left(llava: Pair, tmp_path: Path, plain: bytes) -> None:
    class Fail(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            raise KeyError("stop")

    result = run(llava, tmp_path / "out", neftune_noise_alpha=5.0)
    assert result.verification["verified"]
    assert (result.checkpoint / "model.safetensors").read_bytes() != plain
    student = loaded(llava)
    before = structure(student)
    with pytest.raises(KeyError, match="stop"):
        run(llava, tmp_path / "again", model=student, neftune_noise_alpha=5.0, callbacks=[Fail()])
    assert structure(student) == before


@pytest.mark.slow
def test_train__use_cache_in_config__as_before(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava)
    student.config.use_cache = True
    result = run(llava, tmp_path / "out", model=student, max_steps=1)
    assert json.loads((result.checkpoint / "config.json").read_text())["use_cache"] is True
