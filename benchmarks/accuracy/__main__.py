"""`python -m benchmarks.accuracy ROW... [--set scenes|captions] [--size gpu|cpu] [--workers N]`: make rows, then the table.

ROW is a row (`w2g128/grace/0`), or main, core, post, others, ablation, subset. Rows that are there are skipped; `--table` makes
only the table. New rows are files in a folder; `--pack` moves them into rows.jsonl.xz, where recorded rows are. With
`--set captions` the rows are those of the second data set, in folders of their own; the scene study's pair, which they start
from, is made first where its checkpoints are not there.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.caption_work import CAPTION_SIZES, TOLD, CaptionWork
from benchmarks.accuracy.captions import load_images, pack_images
from benchmarks.accuracy.photos import load, pack
from benchmarks.accuracy.pool import make_all
from benchmarks.accuracy.rows import RESULTS, Store
from benchmarks.accuracy.study import SIZES, Row, Size, group_of_rows
from benchmarks.accuracy.table import write_table
from benchmarks.accuracy.work import Work

BUILD = Path(__file__).parents[2] / "build" / "accuracy"


def read_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--set", choices=("scenes", "captions"), default="scenes", help="the data")
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument(
        "--photos", default="npm", help="npm, a folder, a packed file, or a Hugging Face id of CIFAR-10"
    )
    parser.add_argument("--images", default="debian", help="of --set captions: debian, a folder, or a packed file")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after so many minutes")
    parser.add_argument(
        "--results", type=Path, help="folder of rows and table (default: benchmarks/results/accuracy[-SIZE][/captions])"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of photographs and checkpoints (default: build/accuracy[-SIZE])"
    )
    parser.add_argument("--student-photos", type=int, help="photographs that the student and every method learn from")
    parser.add_argument(
        "--again",
        action="store_true",
        help="make rows again without replacing the recorded ones, with the recorded rates",
    )
    parser.add_argument("--table", action="store_true", help="make the table alone, from the rows that are there")
    parser.add_argument(
        "--pack", action="store_true", help="move the rows made since into the packed file, rows.jsonl.xz"
    )
    return parser.parse_args()


def packed(source: str, file: Path, make: Callable[[str, Path], None]) -> str:
    """Return the file of images; the source is read once, for all processes and later runs."""
    if Path(source).is_file():
        return source
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        make(source, file)
    return str(file)


def clear(rows: list[Row], size: Size, store: Store, recorded: Store) -> None:
    """Prepare rows to be made again: drop earlier repetitions, copy the recorded search of their learning rates."""
    for row in rows:
        store.file(row).unlink(missing_ok=True)
        for need in row.needs(size):
            if need.searching and (record := recorded.read(need)) is not None and "failed" not in record:
                store.put(need, record)


def photos_of(given: argparse.Namespace, folder: Path, size: Size) -> str:
    """Return the packed file of the scene study's photographs."""
    return packed(given.photos, folder / "photos.npz", lambda source, file: pack(load(source), size.photos, file))


def make_scene_pair(rows: list[Row], given: argparse.Namespace, folder: Path, until: float) -> None:
    """Train the scene study's models that captions start from, where they are not in `folder`; recorded results stay."""
    size, store = SIZES[given.size], Store(folder / "again" / "rows")
    pair = [Row("pair", "teacher", 0), *(Row("pair", "student", seed) for seed in sorted({0, *(r.seed for r in rows)}))]
    missing = [row for row in pair if not (folder / row.name.replace("/", "-")).is_dir()]
    for row in missing:
        store.file(row).unlink(missing_ok=True)
    if missing:
        make_all(missing, (size, store, folder, photos_of(given, folder, size)), given.workers, until)


def main() -> None:
    """Make the rows, write the table."""
    given = read_arguments()
    until, suffix = time.time() + 60 * given.minutes, "" if given.size == "gpu" else f"-{given.size}"
    results = given.results or RESULTS.with_name(RESULTS.name + suffix)
    folder = given.work or BUILD.with_name(BUILD.name + suffix)
    kind: type[Work] = Work
    options, size = f" --size {given.size}" * bool(suffix), SIZES[given.size]
    captions = given.set == "captions"
    if captions:
        results, folder, size, kind = results / "captions", folder / "captions", CAPTION_SIZES[given.size], CaptionWork
        options = f" --set captions{options}"
    elif given.student_photos:
        size = replace(size, photos={**size.photos, "student": given.student_photos})
    recorded = Store(results / "rows", options)
    store = Store(folder / "again" / "rows", options) if given.again else recorded
    rows = [row for name in given.rows for row in group_of_rows(name, size)]
    if given.pack:
        print(f"{recorded.pack()} rows in {recorded.packed}")
        return
    if not given.table:
        if given.again:
            clear(rows, size, store, recorded)
        if captions:
            make_scene_pair(rows, given, folder.parent, until)
            source = packed(given.images, folder / "captions.npz", lambda s, f: pack_images(load_images(s), f))
        else:
            source = photos_of(given, folder, size)
        left = make_all(rows, (size, store, folder, source), given.workers, until, kind)
        if left:
            print(f"{len(left)} rows left, the first {left[0].name}; the same command goes on")
    if not given.again:
        pages = given.size == "gpu" and given.results is None
        print(write_table(store, results, pages=pages, told=(TOLD,) * captions))
        return
    for row in rows:
        now, before = (
            f"{100 * (one.read(row) or {}).get('accuracy', float('nan')):.2f} %" for one in (store, recorded)
        )
        print(f"{row.name}: {now}, recorded {before}")


if __name__ == "__main__":
    main()
