"""The order of samples depends on seed and epoch alone: same for any number of ranks, and after a resume."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader

from grace_plugin.data import EpochSampler, epoch_order
from grace_plugin.data.order import shuffled


def sampler(count: int, epoch: int = 0, seed: int = 5, batch_size: int = 4, grouped: bool = True) -> EpochSampler:
    lengths = np.random.default_rng(0).integers(10, 400, count) if grouped else None
    made = EpochSampler(count, seed, lengths=lengths, batch_size=batch_size)
    made.set_epoch(epoch)
    return made


@given(count=st.integers(0, 700), seed=st.integers(0, 2**40), epoch=st.integers(0, 50), batch=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_epoch_order__any_epoch__every_sample_once(count: int, seed: int, epoch: int, batch: int) -> None:
    lengths = [(7 * n) % 101 for n in range(count)]
    for order in (epoch_order(count, seed, epoch), epoch_order(count, seed, epoch, lengths=lengths, batch_size=batch)):
        assert sorted(order.tolist()) == list(range(count))


def test_epoch_order__known_seed__recorded_order() -> None:
    """A changed hash would change every run that is resumed with a later version."""
    assert shuffled(10, 0, 0).tolist() == [2, 6, 5, 3, 0, 4, 7, 1, 8, 9]
    digest = hashlib.sha256(epoch_order(1000, 7, 3).tobytes()).hexdigest()
    assert digest == "d817f929f234218f358330fd4d816ffb237fd9acfb54c41d25af0812bed5e6c6"


def test_epoch_order__other_seed_or_epoch__other_order() -> None:
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    first = np.array([epoch_order(20, 0, epoch)[0] for epoch in range(2000)])
    counts = np.bincount(first, minlength=20)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 43.8  # chi-square, 19 degrees of freedom, p = 0.001


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [96, 101])
def test_epoch_order__batches_of_all_ranks__those_of_one_rank_in_order(world_size: int, count: int) -> None:
    """The batches of a step of all ranks are the next batches of a single rank, in order."""
    made = sampler(count)
    ranks = []
    for rank in range(world_size):
        shard = BatchSamplerShard(BatchSampler(made, 4, drop_last=False), world_size, rank, even_batches=True)
        ranks.append(list(shard))
    dealt = [batch for step in zip(*ranks, strict=True) for batch in step]
    alone = list(BatchSampler(made, 4, drop_last=False))
    assert dealt[: count // 4] == alone[: count // 4]


def test_epoch_sampler__resumed_loader__same_order() -> None:
    whole = [batch.tolist() for batch in DataLoader(range(40), batch_size=4, sampler=sampler(40, epoch=2))]
    resumed = skip_first_batches(DataLoader(range(40), batch_size=4, sampler=sampler(40, epoch=2)), 6)
    assert [batch.tolist() for batch in resumed] == whole[6:]
    assert whole != [batch.tolist() for batch in DataLoader(range(40), batch_size=4, sampler=sampler(40, epoch=3))]


def test_epoch_order__lengths__little_padding() -> None:
    lengths = np.random.default_rng(1).integers(10, 2000, 4000)

    def padding(order: np.ndarray) -> float:
        tokens = lengths[order].reshape(-1, 8)
        return 1.0 - tokens.sum() / (tokens.max(axis=1) * 8).sum()

    plain = padding(epoch_order(4000, 0, 0))
    grouped = padding(epoch_order(4000, 0, 0, lengths=lengths, batch_size=8))
    assert plain > 0.35
    assert grouped < 0.03
    order = epoch_order(4000, 0, 0, lengths=lengths, batch_size=8)
    means = lengths[order].reshape(-1, 8).mean(axis=1)
    assert abs(np.corrcoef(means, np.arange(len(means)))[0, 1]) < 0.15  # long batches are spread over the epoch


def test_epoch_sampler__length__number_of_samples() -> None:
    assert len(EpochSampler(7, 0)) == 7
