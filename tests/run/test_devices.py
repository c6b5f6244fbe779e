"""A run that was started as one process uses one GPU."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from transformers import TrainingArguments

from grace_plugin.run.devices import one_gpu


def test_several_visible_gpus_are_one_gpus_batch_and_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    with caplog.at_level(logging.WARNING):
        assert one_gpu(arguments).train_batch_size == 4
        assert not caplog.records
        arguments._n_gpu = 4  # what Trainer finds where four GPUs are visible and nothing launched the ranks
        assert arguments.train_batch_size == 16
        assert one_gpu(arguments) is arguments
    assert (arguments.n_gpu, arguments.train_batch_size) == (1, 4)
    assert "accelerate launch" in caplog.text and "4 GPUs" in caplog.text
