"""Several sets as one, with a weight and a cap for each.

    # mix.yaml
    seed: 0
    sets:
      - {path: llava/samples.json, images: llava/images, cap: 50000}
      - {path: text.jsonl, weight: 0.5}
      - {path: clips.parquet, weight: 2}

`cap` keeps at most that many samples of a set, drawn by the seed. `weight` is how often an epoch passes over the set's
usable samples: 2 sees each twice, 0.5 a half of them, drawn by the seed. Paths are relative to the file. Caps act before
samples are inspected, weights after, so that a report accounts for every sample once. A set may be a mix itself, down to 8
levels.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from grace_plugin.data.bounded_yaml import YamlTextError, read_yaml
from grace_plugin.data.json_samples import JsonLines
from grace_plugin.data.order import shuffled
from grace_plugin.data.parts import resolve
from grace_plugin.data.shown import shortened, shown

__all__ = ["DrawnSamples", "MixEntry", "SampleSet", "Samples", "draw_samples", "read_mix"]


# of a mix file; one set a line makes far less
_BYTES, _VALUES = 1_000_000, 100_000


class MixEntry(BaseModel):
    """A set of a mix."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    path: str
    name: str = ""
    images: str | None = None
    weight: Annotated[float, Field(gt=0.0, le=1000.0, allow_inf_nan=False)] = 1.0
    cap: Annotated[int, Field(ge=1)] | None = None
    seed: int = 0


def _parsed(path: Path) -> Any:
    """Return the content of a mix file."""
    if not path.is_file():
        raise ValueError(f"no mix at {path}")
    if path.stat().st_size > _BYTES:
        raise ValueError(f"{path} is no mix: it has {path.stat().st_size:,} bytes and a mix has at most {_BYTES:,}")
    try:
        return read_yaml(path.read_text(encoding="utf-8"), values=_VALUES, what="a mix")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not YAML: {shortened(error)}") from error
    except YamlTextError as error:
        raise ValueError(f"{path} is no mix: {error}") from None


def read_mix(path: Path) -> list[MixEntry]:
    """Return the sets of a mix file, their paths made relative to it.

    Raises:
        ValueError: unreadable, an unknown key, or no sets.
    """
    read = _parsed(path)
    if (
        not isinstance(read, dict)
        or not isinstance(read.get("sets"), list)
        or not read["sets"]
        or set(read) - {"sets", "seed"}
    ):
        raise ValueError(
            f"{path} is no mix; give `sets:` (a list of path, weight, cap, images, name) and perhaps `seed:`"
        )
    entries = []
    for number, given in enumerate(read["sets"]):
        if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
            raise ValueError(f"{path}, set {number}: {shown(given)} is no set; give an object with a path")
        try:
            entry = MixEntry(**{"seed": read.get("seed", 0), **given})
        except ValidationError as error:
            told = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            raise ValueError(f"{path}, set {number}: {shortened(told)}") from None
        here = {key: _relative_to(path, getattr(entry, key)) for key in ("path", "images")}
        entries.append(entry.model_copy(update={**here, "name": entry.name or Path(entry.path).name}))
    return entries


def _relative_to(path: Path, value: str | None) -> str | None:
    if value is None:
        return None
    relative = path.parent / value
    return str(relative) if relative.exists() else value


# `datasets.interleave_datasets` draws with probabilities, so an epoch holds no stated number of a set's samples, and needs the
# same features in all sets; here weight 2 is two passes, and sets of any format mix
class SampleSet:
    """Samples of one set: a sequence, its name and how much of it is used.

    folder: what image paths are relative to. fingerprint: changes with the content, None when it is not known.
    """

    def __init__(
        self,
        name: str,
        samples: Sequence[Any],
        *,
        weight: float = 1.0,
        cap: int | None = None,
        seed: int = 0,
        fingerprint: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name, self.samples, self.weight, self.folder = name, samples, weight, folder
        self.chosen = np.arange(len(samples))
        if cap is not None and cap < len(samples):
            self.chosen = np.sort(shuffled(len(samples), seed)[:cap])
        self.fingerprint = None if fingerprint is None else f"{fingerprint} {cap} {seed if cap else 0}"

    def __len__(self) -> int:
        return len(self.chosen)

    def sample(self, index: int) -> Any:
        """Return the index-th sample that is used."""
        sample = self.samples[int(self.chosen[index])]
        return resolve(sample, self.folder) if self.folder is not None and isinstance(sample, dict) else sample

    def stored(self, index: int) -> Any:
        """Return the index-th sample that is used as it is stored: the bytes of its line, where it is one."""
        place = int(self.chosen[index])
        return self.samples.stored(place) if isinstance(self.samples, (JsonLines, Samples)) else self.samples[place]


class Samples(Sequence[Any]):
    """The samples of one or more sets, one set after the other, each sample once.

    source: what `load_samples` was given (path, images), so that a run can be repeated; None for samples made otherwise.
    """

    source: dict[str, Any] | None = None

    def __init__(self, sets: Iterable[SampleSet]) -> None:
        self.sets = tuple(sets)
        self._ends = list(accumulate(len(one) for one in self.sets))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        owner, place = self._place(range(len(self))[index])
        return owner.sample(place)

    def _place(self, index: int) -> tuple[SampleSet, int]:
        """Return the set of a sample, and its place there."""
        place = self.number(index)
        owner = bisect_right(self._ends, place)
        return self.sets[owner], place - (self._ends[owner - 1] if owner else 0)

    def stored(self, index: int) -> Any:
        """Return a sample as it is stored: the bytes of its line, where it is one."""
        owner, place = self._place(index)
        return owner.stored(place)

    def set_of(self, index: int) -> int:
        """Return the number of the set a sample belongs to."""
        return bisect_right(self._ends, self.number(index))

    def number(self, index: int) -> int:
        """Return the number by which reports and messages speak of a sample."""
        return index

    @property
    def fingerprint(self) -> str | None:
        """Changes with the content of any set; None when one is not known."""
        marks = [one.fingerprint for one in self.sets]
        return None if None in marks else hashlib.sha256("\n".join(map(str, marks)).encode()).hexdigest()


class DrawnSamples(Samples):
    """Some samples of a dataset, in its order and under its numbers and sets; numbers: int64 [n], ascending."""

    def __init__(self, samples: Sequence[Any], numbers: np.ndarray) -> None:
        super().__init__(samples.sets if isinstance(samples, Samples) else [SampleSet("samples", samples)])
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, index: int) -> int:
        return int(self.numbers[index])

    @property
    def fingerprint(self) -> str | None:
        return None


def draw_samples(samples: Sequence[Any], count: int, seed: int) -> DrawnSamples:
    """Return `count` samples drawn by `seed` from all sets, or all there are."""
    return DrawnSamples(samples, np.sort(shuffled(len(samples), seed)[:count]))
