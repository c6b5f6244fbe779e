"""A stream's samples reach the loaders once each, whatever the number of ranks and of their workers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import IterableDataset
from torch.utils.data import DataLoader

from grace_plugin.data import BadSamplesError, ConversationCollator, StreamedSamples
from tests.tiny import build

ROWS = 40


def sample(number: int) -> dict[str, Any]:
    """A text sample whose answer is its number; every twentieth is broken."""
    answer = [] if number % 20 == 7 else [{"role": "assistant", "content": f"say {number}"}]
    return {"messages": [{"role": "user", "content": "which?"}, *answer]}


class Read:
    """Samples as some reader of a user's own would give them."""

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return map(sample, range(ROWS))


def _shard(shards: list[int]) -> Iterator[dict[str, Any]]:
    for first in shards:
        yield from map(sample, range(first, first + 10))


STREAMS = {
    "own": Read,
    "one file": lambda: IterableDataset.from_generator(lambda: map(sample, range(ROWS))),
    "four files": lambda: IterableDataset.from_generator(_shard, gen_kwargs={"shards": [0, 10, 20, 30]}).shuffle(
        seed=1
    ),
}


def read(kind: str, rank: int, ranks: int, workers: int) -> list[str]:
    """Answers of the usable samples that a rank reads, in its order."""
    stream = StreamedSamples(
        STREAMS[kind](), ConversationCollator(build("llava")[1]), max_bad_samples=0.1, rank=rank, world_size=ranks
    )
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    return [found["messages"][1]["content"][0]["text"] for found in loader]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("kind", STREAMS)
def test_stream__several_ranks__samples_shared_in_own_order(kind: str, ranks: int, workers: int) -> None:
    dealt = [read(kind, rank, ranks, workers) for rank in range(ranks)]
    assert sorted(said for rank in dealt for said in rank) == sorted(
        f"say {number}" for number in range(ROWS) if number % 20 != 7
    )
    assert all(dealt)
    assert dealt[-1] == read(kind, ranks - 1, ranks, workers)
    if kind != "four files" and workers == 0:  # every rank-th sample, whatever was dropped
        alone = [f"say {number}" for number in range(ROWS)]
        assert dealt == [[said for said in alone[rank::ranks] if said in dealt[rank]] for rank in range(ranks)]


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("kind", STREAMS)
def test_stream__any_workers__every_sample_once(kind: str, workers: int, tmp_path: Path) -> None:
    collator = ConversationCollator(build("llava")[1])
    stream = StreamedSamples(STREAMS[kind](), collator, folder=tmp_path, max_bad_samples=0.1)
    loader = DataLoader(
        stream, batch_size=None, num_workers=workers, multiprocessing_context="fork" if workers else None
    )
    said = [found["messages"][1]["content"][0]["text"] for found in loader]
    assert sorted(said) == sorted(f"say {number}" for number in range(ROWS) if number % 20 != 7)
    assert stream.report() == {
        "stream": True,
        "samples": ROWS,
        "usable": ROWS - 2,
        "rejected": {"roles_out_of_order": 2},
        "max_bad_samples": 0.1,
    }
    assert len((tmp_path / "data_rejected.jsonl").read_text().splitlines()) == 2


def test_stream__too_many_bad_samples_later__stops() -> None:
    class Worse(Read):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from map(sample, range(6))
            yield from ({"messages": []} for _ in range(50))

    stream = StreamedSamples(Worse(), ConversationCollator(build("llava")[1]), max_bad_samples=0.2, first=5)
    with pytest.raises(
        BadSamplesError, match=r"2 of 8 samples of the stream could not be used, above max_bad_samples = 20\.0%"
    ):
        list(stream)
