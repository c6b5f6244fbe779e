"""Plan a teacher cache before the teacher is loaded: which samples, how many bytes, and whether the disk holds them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grace_plugin.data import Prepared
from grace_plugin.teacher.cached import keys_of
from grace_plugin.teacher.store import StateStore, corrupt_shards, differing, foreign_files, leftovers, read_store
from grace_plugin.vlm import Family

__all__ = ["CachePlan", "check_disk", "check_folder", "drop_damaged", "plan_cache"]

_SPARE = 1024  # bytes a sample adds to a file beside its states, at most


@dataclass(frozen=True)
class CachePlan:
    """What a build will do, and has done.

    samples: distinct samples of the dataset. stored: of them already in the folder. total_bytes, bytes: states of all
    samples and of those still to be run; `at_most` where a family's line ends count among its visual tokens until it is run.
    tokens: to run.
    dropped: files that were not what was written. seconds: for what is to be run, None until batches were timed.
    """

    samples: int
    stored: int
    total_bytes: int
    bytes: int
    at_most: bool
    tokens: int
    dropped: tuple[str, ...] = ()
    seconds: float | None = None


def check_folder(folder: Path, identity: Mapping[str, Any]) -> bool:
    """Refuse a folder that is neither new nor empty nor of the same identity; returns whether visual tokens are kept.

    Raises:
        ValueError: names what differs, with both values.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a new folder")
    written = read_store(folder)
    if written is None:
        foreign = foreign_files(folder)
        if foreign:
            raise ValueError(
                f"{folder} holds something else than a teacher cache ({foreign[0].name[:100]}); give a new folder"
            )
        return bool(identity["visual"])
    visual = bool(identity["visual"] or written[0]["visual"])
    told = differing(written[0], {**identity, "visual": visual})
    if told:
        raise ValueError(
            f"{folder} holds states written otherwise (there / asked for): {told}; give a new folder, or ask for the same"
        )
    return visual


def drop_damaged(folder: Path) -> tuple[str, ...]:
    """Remove half-written files and every file that is not what was written; returns the names of the latter."""
    damaged = corrupt_shards(folder)
    for path in (*damaged, *leftovers(folder)):
        path.unlink(missing_ok=True)
    return tuple(path.name for path in damaged)


def plan_cache(
    samples: Prepared, folder: Path, width: int, visual: bool, family: Family
) -> tuple[CachePlan, list[int]]:
    """What is to be done, and the samples that are to be run, the longest first. `width`: bytes of a token's state."""
    store = StateStore(folder) if read_store(folder) is not None else ()
    keys = {
        key: number
        for number, key in keys_of(samples.samples, sorted(set(samples.numbers.tolist())), samples.special_tokens)
    }
    entries = samples.entries
    sizes = {n: width * (entries[n].supervised + (entries[n].visual if visual else 0)) for n in keys.values()}
    missing = sorted((n for key, n in keys.items() if key not in store), key=lambda n: -entries[n].tokens)
    plan = CachePlan(
        samples=len(keys), stored=len(keys) - len(missing), total_bytes=sum(sizes.values()),
        bytes=sum(sizes[n] for n in missing),
        at_most=visual and type(family).true_tokens is not Family.true_tokens,
        tokens=sum(entries[n].tokens for n in missing),
    )  # fmt: skip
    return plan, missing


def check_disk(folder: Path, plan: CachePlan) -> None:
    """Refuse a build that the disk has no room for.

    Raises:
        ValueError: names what is wanted and what is free.
    """
    wanted = plan.bytes + _SPARE * (plan.samples - plan.stored)
    standing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(standing).free
    if wanted > free:
        raise ValueError(
            f"the states take {wanted:,} bytes and the disk of {folder} has {free:,} free; give another folder, or "
            "fewer samples"
        )
