"""Samples from whatever a caller gives as a dataset: files, folders, mixes, hub datasets, tables and lists.

`as_samples` takes any of them, `load_samples` a path or a hub name, `stream_samples` the same as a stream. Paths of images and
videos are relative to the image folder if one is given, else to the file's folder. Nothing is decoded here. A line that cannot
be read keeps its place as an error, to be counted when it is inspected.

Parquet, saved datasets and hub datasets are read by `datasets`. JSON and JSONL are not: its reader needs the same types in
every line, but `content` is text in one sample and a list of parts in the next, and it reports neither the line of damaged
JSON nor a key given twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grace_plugin.data.json_samples import JsonLines, check_regular, json_list, read_json
from grace_plugin.data.mix import Samples, SampleSet, read_mix
from grace_plugin.data.parts import resolve
from grace_plugin.data.shown import shown

__all__ = ["as_samples", "load_samples", "stream_samples", "undecoded"]

FILES = (".json", ".jsonl", ".parquet")


def load_samples(source: str, images: str | None = None) -> Samples:
    """Return samples of a dataset, to be inspected by `prepare`; `source` of the result says where they come from.

    Args:
        source: `samples.json`, `samples.jsonl`, `samples.parquet`, a folder of such files, a folder written by
            `datasets.save_to_disk`, a mix (`mix.yaml`, see `grace_plugin.data.mix`), or a dataset of the hub, or one in a
            folder laid out as on the hub, as `name`, `name:split` or `name:config:split` (split "train" by default).
        images: folder that image and video paths are relative to; by default the file's own, or the dataset's folder.

    Raises:
        ValueError: nothing readable there.
    """
    found = _load(_checked_name(source), images)
    found.source = {"path": str(source), **({"images": str(images)} if images is not None else {})}
    return found


def _checked_name(source: str) -> str:
    """Refuse what cannot be the name of a file or a dataset, such as samples as JSON text."""
    try:
        if source:
            Path(source).exists()
            return source
    except (OSError, ValueError):  # longer than a file system takes, or a null byte
        pass
    raise ValueError(f"the dataset {shown(source)} is no path and no name of a dataset. {_WAYS_OUT}")


def _load(source: str, images: str | None, within: tuple[Path, ...] = ()) -> Samples:
    """Return the samples; `within`: the mixes that name this source."""
    path = Path(source)
    if path.suffix in (".yaml", ".yml"):
        if images is not None:
            raise ValueError(
                f"{path} is a mix, whose sets name their own image folders; give `images:` there, for each set"
            )
        _check_levels(path, within)
        within = (*within, path.resolve())
        sets = [(entry, _load(entry.path, entry.images, within)) for entry in read_mix(path)]
        return Samples(
            SampleSet(
                entry.name,
                samples,
                weight=entry.weight,
                cap=entry.cap,
                seed=entry.seed,
                fingerprint=samples.fingerprint,
            )
            for entry, samples in sets
        )
    if path.suffix in FILES and not path.is_dir():
        return Samples([_file(path, images)])
    if path.is_dir() and not _saved(path):
        files = _files_in(path)
        if files:
            return Samples(_file(file, images) for file in files)
    dataset = _dataset(source)
    fingerprint = getattr(dataset, "_fingerprint", None)
    folder = _folder(images) or _local(_parts_of(source)[0])
    return Samples([SampleSet(path.name, undecoded(dataset), fingerprint=fingerprint, folder=folder)])


def stream_samples(source: str, images: str | None = None) -> Any:
    """Return the samples of a JSON, JSONL or parquet file, a folder of one of these kinds or a hub dataset: a
    `datasets.IterableDataset`.

    JSON and JSONL are read by the plugin's own readers, so that samples need not have the same types and a broken line is a
    error in its place; a JSONL file is read line by line, a JSON file is one list and is held in memory.

    Raises:
        ValueError: nothing readable there, or a mix.
    """
    import datasets

    path = Path(_checked_name(source))
    if path.suffix in (".yaml", ".yml"):
        raise ValueError(
            f"{source} is a mix, and the weights and caps of a mix need all of its samples; leave streaming out, or stream "
            "one of its sets"
        )
    files = _files_in(path) if path.is_dir() else [path] if path.suffix in FILES or path.is_file() else []
    for file in files:
        check_regular(file)
    kinds = {file.suffix == ".parquet" for file in files}
    if len(kinds) > 1:
        raise ValueError(f"{path} holds JSON and parquet files; stream one kind, or leave streaming out")
    name, config, split = _parts_of(source)
    try:
        if not files:
            found = datasets.load_dataset(name, config, split=split, streaming=True)
        elif kinds == {True}:
            found = datasets.load_dataset(
                "parquet", data_files=[str(file) for file in files], split="train", streaming=True
            )
        else:
            found = datasets.IterableDataset.from_generator(read_json, gen_kwargs={"files": files})
    except (FileNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"cannot stream {source!r}: {error}. {_STREAMED}") from error
    folder = _folder(images) or (path.parent if path.is_file() else path if files else _local(name))
    found = undecoded(found).map(_Resolve(folder)) if folder else undecoded(found)
    found.source = {"path": str(source), "streaming": True, **({"images": str(images)} if images is not None else {})}
    return found


_NAMED = "hub-id[:[config:]split]"
_WAYS_OUT = f"Give a .json or .jsonl file, a .parquet file, a folder of these, a saved dataset, a mix, or {_NAMED}"
_STREAMED = f"Give a .json, .jsonl or .parquet file, a folder of one of these kinds, or {_NAMED}"


_LEVELS = 8  # of mixes in mixes


def _check_levels(path: Path, within: tuple[Path, ...]) -> None:
    """Refuse a mix that names itself, directly or through others, and mixes of many levels."""
    if path.resolve() in within:
        named = " -> ".join(one.name for one in (*within[within.index(path.resolve()) :], path))
        raise ValueError(f"the mix {path} names itself ({named}); take it out of its own sets")
    if len(within) >= _LEVELS:
        raise ValueError(f"{path} is a mix in more than {_LEVELS} mixes; name its sets in one of them")


class _Resolve:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        return resolve(sample, self.folder)


def _folder(images: str | None) -> Path | None:
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"no image folder at {images}")
    return Path(images) if images is not None else None


def _parts_of(source: str) -> tuple[str, str | None, str]:
    """Return name, configuration and split of `name`, `name:split` or `name:config:split`."""
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ValueError(f"{source!r} has more than two colons; give {_NAMED}")
    return name, rest[0] or None if len(rest) == 2 else None, (rest[-1] if rest else "") or "train"


def _local(name: str) -> Path | None:
    """Return the folder of a dataset that lies on disk in files of its own; None for the hub and for saved datasets."""
    return Path(name) if Path(name).is_dir() and not _saved(Path(name)) else None


def _files_in(folder: Path) -> list[Path]:
    """Return the dataset files of a folder; what is no regular file is refused when it is read."""
    return sorted(file for file in folder.iterdir() if file.suffix in FILES and not file.is_dir())


def _saved(path: Path) -> bool:
    """Return whether `datasets.save_to_disk` wrote it."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def _file(path: Path, images: str | None) -> SampleSet:
    check_regular(path)
    folder = _folder(images) or path.parent
    stat = path.stat()
    mark = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {folder.resolve()}".encode()).hexdigest()
    samples: Any
    if path.suffix == ".parquet":
        import datasets

        try:
            samples = undecoded(datasets.Dataset.from_parquet(str(path)))
        except Exception as error:
            raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    else:
        samples = JsonLines(path) if path.suffix == ".jsonl" else json_list(path)
    return SampleSet(path.name, samples, fingerprint=mark, folder=folder)


def _dataset(source: str) -> Any:
    import datasets

    path = Path(source)
    try:
        if path.is_dir() and _saved(path):
            found = datasets.load_from_disk(str(path))
            return found["train"] if isinstance(found, datasets.DatasetDict) else found
        name, config, split = _parts_of(source)
        return datasets.load_dataset(name, config, split=split)
    except (FileNotFoundError, OSError, ValueError) as error:
        raise ValueError(f"cannot read a dataset from {source!r}: {error}. {_WAYS_OUT}") from error


def _stored(feature: Any) -> Any:
    """Return a feature with the images and videos in it, at any depth, left as they are stored."""
    import datasets

    if isinstance(feature, (datasets.Image, datasets.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, Mapping):
        return {name: _stored(part) for name, part in feature.items()}
    if isinstance(feature, (datasets.List, datasets.LargeList)):
        return replace(feature, feature=_stored(feature.feature))
    return feature


def undecoded(dataset: Any) -> Any:
    """Return a dataset of Hugging Face with its images and videos left as files or bytes, to be decoded where samples are used.

    A dataset with a transform or a format of its own stays as it is, for what reads it may expect images.
    """
    if (
        getattr(dataset, "format", {"type": None})["type"] is not None
        or getattr(dataset, "_formatting", None) is not None
    ):
        return dataset
    import datasets

    features = dict(dataset.features or {})
    changed = {column: stored for column, feature in features.items() if (stored := _stored(feature)) != feature}
    if not changed:
        return dataset
    if isinstance(
        dataset, datasets.Dataset
    ):  # `cast_column` would write a copy of lists of images; what is stored is the same
        info = dataset.info.copy()
        info.features = datasets.Features({**features, **changed})
        return datasets.Dataset(
            dataset.data,
            info,
            dataset.split,
            indices_table=dataset._indices,
            fingerprint=f"{dataset._fingerprint}-stored",
        )
    for column, stored in changed.items():
        dataset = dataset.cast_column(column, stored)
    return dataset


_TAKEN = "give a list of samples, a path, load_samples(...), a datasets.Dataset, any other sequence, or a stream"


def _split(dataset: Mapping[Any, Any]) -> Any:
    """Return the split of a DatasetDict that a training reads."""
    names = list(dataset)
    if "train" in names:
        return dataset["train"]
    if len(names) == 1:
        return dataset[names[0]]
    raise ValueError(
        f"the dataset has the splits {shown(names)} and none is named train; pass one of them, dataset[NAME]"
    )


def _first(values: Any) -> Any:
    """Return the first of a list or an array, None where there is none."""
    return values[0] if hasattr(values, "__getitem__") and hasattr(values, "__len__") and len(values) else None


def _are_splits(given: Mapping[Any, Any]) -> bool:
    """Return whether the values of a dict are datasets, and no columns."""
    return (
        "train" in given and isinstance(given["train"], (list, tuple)) and isinstance(_first(given["train"]), Mapping)
    )


def _table(columns: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """Return the samples of a dict of lists."""
    messages = columns.get("messages")
    if "role" in columns or isinstance(messages, Mapping) or isinstance(_first(messages), Mapping):
        raise ValueError("the dataset is one sample; pass a list of samples")
    lengths = {str(name): len(column) if hasattr(column, "__len__") else None for name, column in columns.items()}
    texts = [name for name, column in columns.items() if isinstance(column, (str, bytes, Mapping))]
    if not lengths or texts or None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"the dataset is a dict whose values are not lists of one length ({shown(lengths)}); {_TAKEN}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """Return a cell of a DataFrame: lists for arrays, None for what is missing."""
    if isinstance(value, float) and value != value:  # pandas has NaN for a missing cell
        return None
    if hasattr(value, "tolist") and hasattr(value, "dtype"):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    return [_plain(part) for part in value] if isinstance(value, list) else value


def as_samples(dataset: Any) -> Any:
    """Return a dataset in a form that `prepare` and the streams read; what they read already comes back as it is.

    Args:
        dataset: samples in any form that a caller may pass.

    Raises:
        ValueError: an iterator, a dataset without a train split, or something that holds no samples.
    """
    import datasets

    if isinstance(dataset, (str, os.PathLike)):
        return load_samples(os.fspath(dataset))
    if isinstance(dataset, (datasets.DatasetDict, datasets.IterableDatasetDict)):
        dataset = _split(dataset)
    if isinstance(dataset, (datasets.Dataset, datasets.IterableDataset)):
        return undecoded(dataset)
    for form in ("to_pylist", "to_dicts"):  # an Arrow table, a polars DataFrame
        if hasattr(dataset, form) and not isinstance(dataset, type):
            return getattr(dataset, form)()
    if hasattr(dataset, "to_dict") and hasattr(dataset, "iloc") and hasattr(dataset, "columns"):
        return [{str(key): _plain(value) for key, value in one.items()} for one in dataset.to_dict("records")]
    if isinstance(dataset, Mapping):
        datasets_in_it = any(isinstance(value, datasets.Dataset) for value in dataset.values())
        return as_samples(_split(dataset)) if datasets_in_it or _are_splits(dataset) else _table(dataset)
    # the check before the run, every epoch and a resumed run each read the samples from their beginning
    if isinstance(dataset, Iterator):
        raise ValueError(
            f"the dataset is a {type(dataset).__name__}, which can be read once, and a run reads samples several times; "
            "pass list(...) of it, or datasets.IterableDataset.from_generator(FUNCTION) with the function that makes it"
        )
    if (
        dataset is None
        or isinstance(dataset, (bytes, int, float, set, frozenset, type))
        or (hasattr(dataset, "__len__") and not hasattr(dataset, "__getitem__"))  # a DataLoader, a dict's values
        or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__"))
    ):
        raise ValueError(f"the dataset is a {type(dataset).__name__}; {_TAKEN}")
    return dataset
