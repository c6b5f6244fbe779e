"""Fixtures of a session: tiny checkpoints, built once for all workers, and one finished run."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from filelock import FileLock

from tests.pairs import Pair, pair, run
from tests.tiny import make_samples

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["*_triton.py"]  # `make unit` runs them by themselves, in Triton's interpreter


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """family -> its student and teacher on disk, built by the first worker that needs them; never change them."""
    base = tmp_path_factory.getbasetemp()
    # xdist gives each worker a folder of its own below the one that all share
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "pairs"
    shared.mkdir(exist_ok=True)

    def get(family: str) -> Pair:
        folder = shared / family
        with FileLock(f"{folder}.lock"):
            if not (folder / "complete").exists():
                pair(family, folder)
                (folder / "complete").touch()
        return Pair(family, folder / "student", folder / "teacher")

    return get


@pytest.fixture(scope="session")
def llava(pair_of: Callable[[str], Pair]) -> Pair:
    """Return the LLaVA student and teacher."""
    return pair_of("llava")


class Finished(NamedTuple):
    """A finished run: its student and teacher, its samples and the result of `train`."""

    pair: Pair
    dataset: list[dict[str, Any]]
    result: Any

    @property
    def folder(self) -> Path:
        return self.result.checkpoint


@pytest.fixture(scope="session")
def finished(llava: Pair, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Eight steps of two micro-batches on LLaVA; never change its folder, copy it."""
    dataset = make_samples(12, seed=7) + make_samples(2, seed=8, images=2) + make_samples(2, seed=9, images=0)
    result = run(
        llava,
        tmp_path_factory.mktemp("finished") / "out",
        dataset,
        max_steps=8,
        gradient_accumulation_steps=2,
        logging_steps=1,
    )
    return Finished(llava, dataset, result)


@pytest.fixture
def threads() -> Iterator[int]:
    """Three threads for torch, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield 3
    torch.set_num_threads(before)
