"""One INT4 checkpoint of the LLaVA student for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.pairs import Pair
from tests.report.checkpoints import rounded


@pytest.fixture(scope="session")
def int4(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Round-to-nearest of `llava.student`; never change it, copy it."""
    return rounded(llava.student, tmp_path_factory.mktemp("rounded") / "int4")
