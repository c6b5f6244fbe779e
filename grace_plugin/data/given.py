"""What a caller passes as a dataset, as samples that can be read more than once.

A path is read as `load_samples` reads it. A `DatasetDict`, or a dict of datasets, gives its train split, or the only one it
has. A DataFrame (pandas, polars), an Arrow table and a dict of lists are tables of samples. Images of a `datasets.Dataset` stay
files or bytes until a sample is used: a damaged one is then counted, and EPS does not reach Pillow. A generator, and any other
iterator, is refused: it can be read once, but the check before the run, every epoch and a resumed run read it again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

from grace_plugin.data.shown import shown
from grace_plugin.data.sources import load_samples, undecoded

__all__ = ["as_samples"]

_TAKEN = "give a list of samples, a path, load_samples(...), a datasets.Dataset, any other sequence, or a stream"


def _split(dataset: Mapping[Any, Any]) -> Any:
    """The split of a DatasetDict that a training reads."""
    names = list(dataset)
    if "train" in names:
        return dataset["train"]
    if len(names) == 1:
        return dataset[names[0]]
    raise ValueError(
        f"the dataset has the splits {shown(names)} and none is named train; pass one of them, dataset[NAME]"
    )


def _first(values: Any) -> Any:
    """The first of a list or an array, None where there is none."""
    return values[0] if hasattr(values, "__getitem__") and hasattr(values, "__len__") and len(values) else None


def _are_splits(given: Mapping[Any, Any]) -> bool:
    """Whether the values of a dict are datasets, and no columns."""
    return (
        "train" in given and isinstance(given["train"], (list, tuple)) and isinstance(_first(given["train"]), Mapping)
    )


def _table(columns: Mapping[Any, Any]) -> list[dict[str, Any]]:
    """The samples of a dict of lists."""
    messages = columns.get("messages")
    if "role" in columns or isinstance(messages, Mapping) or isinstance(_first(messages), Mapping):
        raise ValueError("the dataset is one sample; pass a list of samples")
    lengths = {str(name): len(column) if hasattr(column, "__len__") else None for name, column in columns.items()}
    texts = [name for name, column in columns.items() if isinstance(column, (str, bytes, Mapping))]
    if not lengths or texts or None in lengths.values() or len(set(lengths.values())) > 1:
        raise ValueError(f"the dataset is a dict whose values are not lists of one length ({shown(lengths)}); {_TAKEN}")
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _plain(value: Any) -> Any:
    """A cell of a DataFrame: lists for arrays, None for what is missing."""
    if isinstance(value, float) and value != value:  # NaN stands for a missing cell
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
