"""A teacher whose hidden states are read from a cache; of its weights the output head alone is loaded.

States are stored in the dtype in which the teacher computed them. A resident teacher gives the same bits for a batch of the
same samples with the same padding; for other batches its rounding differs, and that of a cache does not.

Samples are found by a key of their content (`grace_plugin.data.sample_key`), so batches need `ConversationCollator(keys=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data import SAMPLE_KEY, Prepared, is_scannable, processor_settings, sample_key
from grace_plugin.data.conversation import sample_name
from grace_plugin.recipe import TeacherRecipe
from grace_plugin.teacher.base import MISSING, Teacher, TeacherStates
from grace_plugin.teacher.checkpoint import UnloadedCheckpoint, open_checkpoint
from grace_plugin.teacher.store import REBUILD, StateStore, differences
from grace_plugin.vlm import VisualTokens
from grace_plugin.vlm.loading import check_finite

__all__ = [
    "CachedTeacher",
    "check_cached_processor",
    "check_cached_samples",
    "open_store",
    "sample_keys",
    "teacher_identity",
]

_CHUNK = 1024
_THREADED_BYTES = 1 << 20  # below it, handing the copies to threads takes longer than copying


def teacher_identity(checkpoint: UnloadedCheckpoint, dtype: str) -> dict[str, Any]:
    """Return what a cache depends on: the teacher's fingerprint, dtype, width, and the layer of the relational term."""
    return {
        **checkpoint.fingerprint(),
        "dtype": str(checkpoint.dtype(dtype)).removeprefix("torch."),
        "layer": checkpoint.layer,
        "width": checkpoint.width,
    }


def open_store(asked: TeacherRecipe, *, visual: bool) -> StateStore:
    """Open the cache of a recipe and check that it fits the recipe; no weight of the teacher is loaded.

    Args:
        asked: the recipe's `teacher` block.
        visual: whether the run reads the states of visual tokens.

    Raises:
        ValueError: no cache, a cache of another teacher (both are named), one without visual tokens, or a damaged file.
    """
    assert asked.cache is not None
    if asked.model is None:
        raise ValueError(f"{MISSING}; a cached teacher is named as well, its head and tokenizer are read from there")
    store = StateStore(asked.cache)
    identity = teacher_identity(open_checkpoint(asked.model, asked.revision), asked.dtype)
    different = differences(store.identity["teacher"], identity)
    if different:
        raise ValueError(
            f"the teacher cache {asked.cache} was written for the teacher {store.made_with['teacher']!r} and this run asks for "
            f"{asked.model!r}, which is another (cache / run): {different}; name the cache's teacher, or write a cache for "
            f"this one with {REBUILD.format(folder='ANOTHER_FOLDER')}"
        )
    if visual and not store.identity["visual"]:
        raise ValueError(
            f"the teacher cache {asked.cache} holds no states of visual tokens and the recipe's relational term reads them; "
            "write another with this recipe, or set relational: {enabled: false}"
        )
    # The checksum of every file costs one read of the cache, 100 GB at 1 GB/s take 100 s; `check_cache: false` leaves it out.
    if asked.check_cache and os.environ.get("LOCAL_RANK", "0") == "0":  # one process per host reads all files
        store.check()
    return store


def sample_keys(
    samples: Sequence[Any], numbers: Iterable[int], special_tokens: Sequence[str] = ()
) -> Iterator[tuple[int, str]]:
    """Yield (number, key) of the samples with these numbers; media are read and hashed by several threads."""
    numbers, key = list(numbers), partial(sample_key, special_tokens=special_tokens)
    with ThreadPoolExecutor() as pool:
        # In chunks: `map` takes all of its arguments at once, and each holds decoded media.
        for start in range(0, len(numbers), _CHUNK):
            chunk = [int(number) for number in numbers[start : start + _CHUNK]]
            yield from zip(chunk, pool.map(key, [samples[number] for number in chunk], chunk), strict=True)


def check_cached_processor(store: StateStore, processor: Any) -> None:
    """Refuse a processor that makes other tokens or pixels than the cache's.

    Raises:
        ValueError: names every setting that differs, with both values.
    """
    different = differences(store.identity["processor"], processor_settings(processor))
    if different:
        raise ValueError(
            f"the teacher cache {store.folder} was written with another processor (cache / run): {different}; give this run "
            f"the cache's processor, or write a cache for this one with {REBUILD.format(folder='ANOTHER_FOLDER')}"
        )


def check_cached_samples(store: StateStore, dataset: Any) -> None:
    """Refuse a dataset with samples that are not in the cache; reads every sample's media once.

    Args:
        store: the opened cache.
        dataset: what the run trains on, a `Prepared` or any sequence of samples.

    Raises:
        ValueError: a stream, or samples that are not in the cache, by name.
    """
    samples, numbers = (
        (dataset.samples, set(dataset.numbers.tolist())) if isinstance(dataset, Prepared) else (dataset, None)
    )
    if not is_scannable(samples):
        raise ValueError(
            "a cached teacher needs samples that can be checked before the run, and these are made as they are read; save them "
            "as parquet and give those, or use teacher.kind: resident"
        )
    checked = sorted(numbers) if numbers is not None else range(len(samples))
    special_tokens = dataset.special_tokens if isinstance(dataset, Prepared) else ()
    absent = [number for number, key in sample_keys(samples, checked, special_tokens) if key not in store]
    if absent:
        named = ", ".join(sample_name(samples[number], number) for number in absent[:5])
        raise ValueError(
            f"{len(absent)} of {len(checked)} samples are not in the teacher cache {store.folder}: {named}"
            f"{', ...' if len(absent) > 5 else ''}; write them with {REBUILD.format(folder=store.folder)}"
        )


class CachedTeacher(Teacher):
    """Reads states by the keys of a batch's samples."""

    def __init__(self, store: StateStore, asked: TeacherRecipe) -> None:
        assert asked.model is not None
        checkpoint = open_checkpoint(asked.model, asked.revision)
        self.store, self.config, self.name_or_path = store, checkpoint.config, checkpoint.name_or_path
        self._head = checkpoint.head(asked.dtype)
        check_finite({"lm_head.weight": self._head[0]}, "teacher")

    @property
    def head_bytes(self) -> int:
        """Return the bytes of the output head, all of the teacher's weights that are in memory."""
        return sum(part.numel() * part.element_size() for part in self._head if part is not None)

    def to(self, device: torch.device) -> None:
        """Move the head."""
        weight, bias = self._head
        self._head = weight.to(device), None if bias is None else bias.to(device)

    def head(self) -> tuple[Tensor, Tensor | None]:
        """Return weight [V_t, d_t] and bias of the output head."""
        return self._head

    def states(
        self, batch: Mapping[str, Any], positions: Tensor, visual: VisualTokens, host: Mapping[str, Any] | None = None
    ) -> TeacherStates:
        """Read the states of the batch's samples.

        Raises:
            ValueError: no keys in the batch, a sample that is not in the cache, or one whose positions differ from those it
                was written with.
        """
        if batch.get(SAMPLE_KEY) is None:
            raise ValueError(
                f"a cached teacher finds samples by their key and the batch has no {SAMPLE_KEY}; collate it with "
                "grace_plugin.data.ConversationCollator(processor, keys=True)"
            )
        absent = [key for key in batch[SAMPLE_KEY] if key not in self.store]
        if absent:
            raise ValueError(
                f"the sample with key {absent[0]} is not in the teacher cache {self.store.folder}; write it with "
                f"{REBUILD.format(folder=self.store.folder)}"
            )
        read = [self.store.read(key) for key in batch[SAMPLE_KEY]]
        final, seen = [final for final, _ in read], [seen for _, seen in read if seen is not None]
        for what, here, parts in (
            ("supervised positions", len(positions), final),
            ("visual tokens", len(visual.index), seen),
        ):
            # Keys cover the conversation and the media, not the options of collation, which decide what is supervised.
            there = sum(map(len, parts))
            if there != here and parts:
                raise ValueError(
                    f"the batch has {here} {what} and the teacher cache {self.store.folder} holds {there} for its samples: "
                    "labels or pixels are made otherwise than when it was written; remove it and write it again"
                )
        states = _concatenate([final, seen] if seen else [final], positions.device)
        if not seen:
            return TeacherStates(states[0], states[0][:0])
        # A batch lists images before videos, a cached sample has them as they come.
        place = visual.index.argsort().argsort()
        return TeacherStates(states[0], states[1].index_select(0, place))


@cache
def _copiers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(4, os.cpu_count() or 1), thread_name_prefix="grace-states")


# A forked process inherits the pool without its threads, and would wait for them forever.
os.register_at_fork(after_in_child=_copiers.cache_clear)


def _copy(place: Tensor, part: Tensor) -> None:
    """Copy bytes on the calling thread alone, without the interpreter's lock; torch's copy would wake all of its threads."""
    # as bytes, because numpy has no bfloat16
    place.view(torch.uint8).numpy()[:] = part.view(torch.uint8).numpy()


def _concatenate(several: Sequence[Sequence[Tensor]], device: torch.device) -> list[Tensor]:
    """Concatenate states of several samples and copy them to the device; to a GPU from pinned memory, queued.

    On the host each is copied once, out of its memory-mapped file.
    """
    whole: list[Tensor] = []
    jobs: list[tuple[Tensor, Tensor]] = []
    for parts in several:
        shape = (sum(map(len, parts)), *parts[0].shape[1:])
        whole.append(torch.empty(shape, dtype=parts[0].dtype, pin_memory=device.type == "cuda"))
        jobs += zip(whole[-1].split([len(part) for part in parts]), parts, strict=True)
    if sum(states.nbytes for states in whole) >= _THREADED_BYTES:
        list(_copiers().map(_copy, *zip(*jobs, strict=True)))
    else:
        for place, part in jobs:
            _copy(place, part)
    return [states.to(device, non_blocking=True) for states in whole]
