"""Every upstream name we use is where we use it; a row that fails says which name moved and what breaks for us.

The contract is read from its file, not through the package, which cannot be imported when a name is gone: so each name has its
own verdict even then. `test_upstream.py` holds the facts behind the names.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

CONTRACT = runpy.run_path(str(Path(__file__).parents[1] / "grace_plugin" / "contract.py"))["CONTRACT"]


@pytest.mark.parametrize("row", CONTRACT, ids=lambda row: row.path)
def test_the_name_is_where_we_use_it(row: Any) -> None:
    assert row.resolve() is not None
