"""Where samples come from: JSON, JSONL and parquet files, folders of them, saved datasets, the hub, and mixes.

Samples are in the messages format or in the LLaVA format. Image paths are relative to the image folder if one is given, else
to the file's folder. Nothing is decoded here, and a sample that cannot be read keeps its place as a fault, to be counted
where samples are looked at: a broken line does not shift the others. JSONL files are read line by line, so their size does
not matter.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from grace_plugin.data.json_samples import JsonLines, check_regular, json_list, read_json
from grace_plugin.data.media import is_path
from grace_plugin.data.mix import Samples, SampleSet, read_mix
from grace_plugin.data.parts import inline_media
from grace_plugin.data.shown import shown

__all__ = ["load_samples", "stream_samples", "undecoded"]

FILES = (".json", ".jsonl", ".parquet")


def load_samples(source: str, images: str | None = None) -> Samples:
    """Samples of a dataset, to be looked at by `prepare`; `source` of the result says where they come from.

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
    """The samples; `within`: the mixes that name this source."""
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
    """The samples of a JSON, JSONL or parquet file, a folder of one of these kinds or a hub dataset: a
    `datasets.IterableDataset`.

    JSON and JSONL are read by the plugin's own readers, so that samples need not have the same types and a broken line is a
    fault in its place; a JSONL file is read line by line, a JSON file is one list and is held in memory.

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
    """Name, configuration and split of `name`, `name:split` or `name:config:split`."""
    name, *rest = source.split(":")
    if len(rest) > 2:
        raise ValueError(f"{source!r} has more than two colons; give {_NAMED}")
    return name, rest[0] or None if len(rest) == 2 else None, (rest[-1] if rest else "") or "train"


def _local(name: str) -> Path | None:
    """The folder of a dataset that lies on disk in files of its own; None for the hub and for saved datasets."""
    return Path(name) if Path(name).is_dir() and not _saved(Path(name)) else None


def _files_in(folder: Path) -> list[Path]:
    """The dataset files of a folder; what is no regular file is refused when it is read."""
    return sorted(file for file in folder.iterdir() if file.suffix in FILES and not file.is_dir())


def _saved(path: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote it."""
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
    """A feature with the images and videos in it, at any depth, left as they are stored."""
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


def resolve(sample: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The sample with its image and video paths, at any depth of list and in content parts, put behind `folder`.

    Web addresses, data URIs and file URLs are no paths and stay as they are.
    """

    def join(value: Any) -> Any:
        if isinstance(value, str):
            return str(folder / value) if is_path(value) else value
        if isinstance(value, (list, tuple)):
            return [join(item) for item in value]
        if isinstance(value, dict) and value.get("bytes") is None:
            return {**value, **{key: join(value[key]) for key in ("path", "url") if isinstance(value.get(key), str)}}
        return value

    keys = [key for key in ("image", "images", "video", "videos") if sample.get(key)]
    found = {**sample, **{key: join(sample[key]) for key in keys}}
    held = {id(part): part for part, _ in inline_media(sample)}  # parts that hold an image themselves
    if not held:
        return found

    def turn(given: Any) -> Any:
        content = given.get("content") if isinstance(given, dict) else None
        if not isinstance(content, (list, tuple)):
            return given
        fields = ("image", "video", "path", "url", "image_url", "video_url")
        parts = [
            {**part, **{key: join(part[key]) for key in fields if part.get(key)}} if id(part) in held else part
            for part in content
        ]
        return {**given, "content": parts}

    turns = [
        key
        for key in ("messages", "conversations", "prompt", "completion")
        if isinstance(sample.get(key), (list, tuple))
    ]
    return {**found, **{key: [turn(given) for given in sample[key]] for key in turns}}
