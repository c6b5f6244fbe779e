"""`python -m benchmarks.accuracy ROW... [--size gpu|cpu] [--photos npm] [--workers N]`: make rows, then the table.

ROW is a row (`w2g128/grace/0`), or main, post, others, ablation, subset. Rows that are there are skipped; `--table` makes only
the table.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.photos import load, pack
from benchmarks.accuracy.pool import make_all
from benchmarks.accuracy.rows import RESULTS, Store
from benchmarks.accuracy.study import SIZES, Row, Size, group_of_rows
from benchmarks.accuracy.table import write_table

BUILD = Path(__file__).parents[2] / "build" / "accuracy"


def read_arguments() -> argparse.Namespace:
    """What was asked for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.accuracy", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--size", choices=SIZES, default="gpu")
    parser.add_argument(
        "--photos", default="npm", help="npm, a folder, a packed file, or a Hugging Face id of CIFAR-10"
    )
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--minutes", type=float, default=1e9, help="begin no row after so many minutes")
    parser.add_argument(
        "--results", type=Path, help="folder of rows and table (default: benchmarks/results/accuracy[-SIZE])"
    )
    parser.add_argument(
        "--work", type=Path, help="folder of photographs and checkpoints (default: build/accuracy[-SIZE])"
    )
    parser.add_argument("--student-photos", type=int, help="photographs that the student and every method learn from")
    parser.add_argument(
        "--again", action="store_true", help="make rows anew beside the recorded ones, with the recorded rates"
    )
    parser.add_argument("--table", action="store_true", help="make the table alone, from the rows that are there")
    return parser.parse_args()


def packed(source: str, folder: Path, sizes: dict[str, int]) -> str:
    """The file of photographs: the source is read once, for all processes and later runs."""
    file = folder / "photos.npz"
    if Path(source).is_file():
        return source
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        pack(load(source), sizes, file)
    return str(file)


def clear(rows: list[Row], size: Size, store: Store, recorded: Store) -> None:
    """Before rows are made again: drop those made again earlier, take over the recorded search of their rates."""
    for row in rows:
        store.file(row).unlink(missing_ok=True)
        for need in row.needs(size):
            if need.searching and recorded.done(need):
                store.file(need).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(recorded.file(need), store.file(need))


def main() -> None:
    """Make the rows, write the table."""
    given = read_arguments()
    begun, suffix = time.time(), "" if given.size == "gpu" else f"-{given.size}"
    results = given.results or RESULTS.with_name(RESULTS.name + suffix)
    folder = given.work or BUILD.with_name(BUILD.name + suffix)
    recorded = Store(results / "rows", f" --size {given.size}" * bool(suffix))
    store = Store(folder / "again" / "rows", recorded.options) if given.again else recorded
    size = SIZES[given.size]
    if given.student_photos:
        size = replace(size, photos={**size.photos, "student": given.student_photos})
    rows = [row for name in given.rows for row in group_of_rows(name, size)]
    if not given.table:
        if given.again:
            clear(rows, size, store, recorded)
        arguments = (size, store, folder, packed(given.photos, folder, size.photos))
        left = make_all(rows, arguments, given.workers, begun + 60 * given.minutes)
        if left:
            print(f"{len(left)} rows left, the first {left[0].name}; the same command goes on")
    if not given.again:
        print(write_table(store, results, readme=given.size == "gpu" and given.results is None))
        return
    for row in rows:
        now, before = (
            f"{100 * (one.read(row) or {}).get('accuracy', float('nan')):.2f} %" for one in (store, recorded)
        )
        print(f"{row.name}: {now}, recorded {before}")


if __name__ == "__main__":
    main()
