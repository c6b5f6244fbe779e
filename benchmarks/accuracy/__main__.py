"""`python -m benchmarks.accuracy ROW... [--size gpu|cpu] [--photos npm] [--workers N]`: make rows, then the table.

ROW is a row (`w2g128/grace/0`), or main, post, ablation, subset. Rows that are there are skipped; `--table` makes only the
table.
"""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import replace
from pathlib import Path

from benchmarks.accuracy.photos import load, pack
from benchmarks.accuracy.rows import RESULTS, Store
from benchmarks.accuracy.study import SIZES, group_of_rows
from benchmarks.accuracy.table import write_table
from benchmarks.accuracy.work import make_all

BUILD = Path(__file__).parents[2] / "build" / "accuracy"


def main() -> None:
    """Read the arguments, make the rows, write the table."""
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
    given = parser.parse_args()
    begun, suffix = time.time(), "" if given.size == "gpu" else f"-{given.size}"
    recorded = given.results or RESULTS.with_name(RESULTS.name + suffix)
    folder = given.work or BUILD.with_name(BUILD.name + suffix)
    results = folder / "again" if given.again else recorded
    options = f" --size {given.size}" * bool(suffix)
    size, store, earlier = SIZES[given.size], Store(results / "rows", options), Store(recorded / "rows")
    if given.student_photos:
        size = replace(size, photos={**size.photos, "student": given.student_photos})
    if not given.table:
        folder.mkdir(parents=True, exist_ok=True)
        photos = given.photos
        if not Path(photos).is_file():  # read the source once, for all processes and later runs
            packed = folder / "photos.npz"
            if not packed.is_file():
                pack(load(photos), size.photos, packed)
            photos = str(packed)
        rows = [row for name in given.rows for row in group_of_rows(name, size)]
        for row in rows if given.again else []:
            store.file(row).unlink(missing_ok=True)
            for need in row.needs(size):
                if need.rate is not None and earlier.done(need):
                    store.file(need).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy(earlier.file(need), store.file(need))
        left = make_all(rows, (size, store, folder, photos), given.workers, begun + 60 * given.minutes)
        if left:
            print(f"{len(left)} rows left, the first {left[0].name}; the same command goes on")
        for row in rows if given.again else []:
            made, before = store.read(row) or {}, earlier.read(row) or {}
            print(
                f"{row.name}: {100 * made.get('accuracy', 0):.2f} %, recorded {100 * before.get('accuracy', 0):.2f} %"
            )
    if not given.again:
        print(write_table(store, results, readme=given.size == "gpu" and given.results is None))


if __name__ == "__main__":
    main()
