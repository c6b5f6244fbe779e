"""Test the store of a study's rows: files of a run, the packed file, and both together."""

from __future__ import annotations

from pathlib import Path

from benchmarks.accuracy.rows import RESULTS, Store, read_packed
from benchmarks.accuracy.study import Row

NAMES = ("w2g128/grace/0", "w2g128/grace-nogate/0", "bf16/kl/1", "w2g128/grace/10")


def filled(folder: Path) -> Store:
    store = Store(folder / "rows")
    for number, name in enumerate(NAMES):
        store.put(Row.parse(name), {"row": name, "accuracy": number / 3})
    return store


def test_pack__rows_of_a_run__same_records_in_same_order_without_folder(tmp_path: Path) -> None:
    store = filled(tmp_path)
    before = store.all()
    assert [one["row"] for one in before] == [NAMES[2], NAMES[0], NAMES[3], NAMES[1]]
    assert store.pack() == len(NAMES) and not store.folder.exists()
    assert store.all() == before and store.read(Row.parse(NAMES[3])) == before[2]
    assert store.done(Row.parse(NAMES[0])) and not store.done(Row.parse("bf16/kl/0"))


def test_pack__same_records_twice__same_bytes(tmp_path: Path) -> None:
    stores = [filled(tmp_path / name) for name in ("a", "b")]
    for store in stores:
        store.pack()
    stores[1].pack()  # packing what is packed changes nothing
    first, second = (store.packed.read_bytes() for store in stores)
    assert first == second


def test_store__row_made_after_packing__replaces_the_packed_record(tmp_path: Path) -> None:
    store, row = filled(tmp_path), Row.parse(NAMES[0])
    store.pack()
    store.put(row, {"row": row.name, "failed": "error"})
    assert not store.done(row) and len(store.all()) == len(NAMES)
    assert [one for one in store.all() if "failed" in one] == [store.read(row)]
    store.pack()
    assert read_packed(store.packed)[row.name] == {"row": row.name, "failed": "error"}


def test_recorded_rows__packed_files__hold_every_row_of_the_tables() -> None:
    for folder in (RESULTS, RESULTS / "captions"):
        records = read_packed(folder / "rows.jsonl.xz")
        assert f"\n{len(records)} rows, " in (folder / "table.md").read_text()
