"""Checkpoints and one finished run, made once for all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from tests.pairs import Pair, pair, run
from tests.tiny import make_samples

if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
    collect_ignore_glob = ["*_triton.py"]  # `make unit` runs them by themselves, in Triton's interpreter


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    """family -> its student and teacher on disk, written when first asked for; never change them."""
    made: dict[str, Pair] = {}

    def get(family: str) -> Pair:
        if family not in made:
            made[family] = pair(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session")
def llava(pair_of: Callable[[str], Pair]) -> Pair:
    """The LLaVA pair."""
    return pair_of("llava")


class Finished(NamedTuple):
    """A finished run: its pair, its samples and what `train` gave back."""

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
