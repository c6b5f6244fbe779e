"""llm-compressor's advice to take another pipeline than GRACE's is not printed; its advice on other runs is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import llmcompressor.pipelines.registry as registry
import pytest
from llmcompressor import oneshot

import grace_plugin
from grace_plugin.upstream import CalibrationPipeline
from tests.pairs import Pair, loaded, recipe_text
from tests.tiny import make_samples


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What llm-compressor's logger says."""
    lines: list[str] = []
    sink = registry.logger.add(lambda message: lines.append(str(message)), level="WARNING", format="{message}")
    yield lines
    registry.logger.remove(sink)


@pytest.mark.slow
def test_oneshot__grace_pipeline__no_advice_to_train_without_data(llava: Pair, tmp_path: Path, said: list[str]) -> None:
    recipe = recipe_text(llava.teacher, oneshot={"epochs": 1.0, "learning_rate": 1e-3})
    options = {"num_calibration_samples": 2, "batch_size": 2, "output_dir": tmp_path / "out"}
    done = grace_plugin.oneshot(str(llava.student), recipe=recipe, dataset=make_samples(2), **options)
    assert done.verification["verified"]
    assert not [line for line in said if "recommended" in line]
    CalibrationPipeline.from_modifiers([], user="basic")
    assert "it is recommended to use `datafree`" in said[-1]


def test_oneshot__refused_before_the_pipeline__advice_on_other_runs_is_back(llava: Pair, said: list[str]) -> None:
    with pytest.raises(ValueError, match="none was given"):
        oneshot(model=loaded(llava), recipe=recipe_text(llava.teacher), pipeline="grace")
    CalibrationPipeline.from_modifiers([], user="basic")
    assert [line for line in said if "recommended" in line] == [said[-1]]
