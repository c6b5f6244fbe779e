"""The order of samples: a function of seed, epoch, rank and world size alone.

The order of an epoch is one permutation of the samples, the same for every number of ranks; batch k goes to rank k mod W, as
accelerate assigns batches. So two ranks with one micro-batch each see, step for step, the samples that one rank sees with two,
and a resumed run continues where it stopped.

With `lengths`, the permutation is cut into stretches of 50 batches, each sorted by length, and the batches are shuffled, so
that the samples of a batch are about equally long and little is padded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["EpochSampler", "epoch_order", "shuffled"]

_STRETCH = 50  # batches that are sorted together


# transformers' LengthGroupedSampler and `datasets` shuffles draw from a torch or numpy generator: their order depends on the
# library's version and, for the sampler, on the state left by earlier draws. Sorting by a hash of the sample number does not.


def _mix64(values: np.ndarray) -> np.ndarray:
    """Return the splitmix64 hash of uint64 values."""
    # wrap-around modulo 2**64 is the algorithm
    with np.errstate(over="ignore"):
        z = values + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def shuffled(count: int, *key: int) -> np.ndarray:
    """Return int64 [count]: a permutation of range(count) that depends on `key` alone."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = _mix64(state ^ np.array([part % 2**64], dtype=np.uint64))
    # a stable sort: equal hashes keep the order of the numbers on every platform
    return np.argsort(_mix64(_mix64(np.arange(count, dtype=np.uint64)) ^ state), kind="stable").astype(np.int64)


def epoch_order(
    count: int, seed: int, epoch: int, *, lengths: Sequence[int] | np.ndarray | None = None, batch_size: int = 1
) -> np.ndarray:
    """Return int64 [count], the samples of an epoch in order; with `lengths` (tokens), grouped by length."""
    order = shuffled(count, seed, epoch)
    if lengths is None or batch_size < 2:
        return order
    tokens = np.asarray(lengths)
    stretch = batch_size * _STRETCH
    grouped = np.concatenate(
        [part[np.argsort(-tokens[part], kind="stable")] for part in np.split(order, range(stretch, count, stretch))]
    )
    full = count // batch_size
    batches = grouped[: full * batch_size].reshape(full, batch_size)[shuffled(full, seed, epoch, 1)]
    return np.concatenate([batches.reshape(-1), grouped[full * batch_size :]])


class EpochSampler(Sampler[int]):
    """`epoch_order` as a torch sampler; accelerate sets the epoch and assigns the batches to the ranks."""

    def __init__(
        self, count: int, seed: int, *, lengths: Sequence[int] | np.ndarray | None = None, batch_size: int = 1
    ) -> None:
        self.count, self.seed, self.lengths, self.batch_size = count, seed, lengths, batch_size
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(self.count, self.seed, self.epoch, lengths=self.lengths, batch_size=self.batch_size)
        return iter(order.tolist())
