"""What every integration test shares: the serving interpreter."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def serve_python() -> Path:
    """Interpreter of the serving environment: GRACE_SERVE_PYTHON, or the one that `make env` builds."""
    chosen = Path(os.environ.get("GRACE_SERVE_PYTHON", Path(__file__).parents[1] / ".venv/serve/bin/python"))
    if not chosen.exists():
        pytest.fail(f"no serving interpreter at {chosen}: run `make env`, or set GRACE_SERVE_PYTHON")
    return chosen
