"""A run that was started as one process uses one GPU, and every process holds the whole student."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import TrainingArguments

from grace_plugin.run import train
from grace_plugin.run.devices import refuse_sharding, use_one_gpu
from tests.pairs import recipe_text


def test_use_one_gpu__several_visible__one_used_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with caplog.at_level(logging.WARNING):
        assert use_one_gpu(arguments).train_batch_size == 4
        assert not caplog.records
        arguments._n_gpu = 4  # what Trainer finds where four GPUs are visible and nothing launched the ranks
        assert arguments.train_batch_size == 16
        assert use_one_gpu(arguments) is arguments
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert "accelerate launch" in caplog.text and "4 GPUs" in caplog.text


@pytest.mark.parametrize(
    ("asked", "launched", "named"),
    [({"fsdp": "full_shard"}, None, "FSDP"), ({"fsdp": True}, None, "FSDP"),
     ({"deepspeed": {"zero_optimization": {}}}, None, "DEEPSPEED"), ({}, "FSDP", "FSDP"),
     ({}, "DEEPSPEED", "DEEPSPEED"), ({}, "MEGATRON_LM", "MEGATRON_LM")],
)  # fmt: skip
def test_train__engine_that_shards__refused_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: dict[str, object], launched: str | None, named: str
) -> None:
    if launched:
        monkeypatch.setenv(f"ACCELERATE_USE_{launched}", "true")
    with pytest.raises(ValueError, match=f"^{named} shards the student.*lora"):
        train(
            "no-such-student", recipe=recipe_text("no-such-teacher"), dataset=[], output_dir=tmp_path / "out", **asked
        )
    assert not list(tmp_path.iterdir())


def test_use_one_gpu__arguments_that_shard__refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    refuse_sharding(fsdp="", deepspeed=None)
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, fsdp="full_shard")
    with pytest.raises(ValueError, match=r"^FSDP shards"):
        use_one_gpu(arguments)
