"""Making a row: what a process needs for it, and the queue that gives rows to processes.

Small models leave a GPU idle between kernels, so many processes share it; each keeps photographs, questions and the teacher's
states on the device. Rows wait for what they need (the pair, the search of their rate) and are made in the order asked.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import pair
from benchmarks.accuracy.data import KeptTeacher, Text, batch_of, score
from benchmarks.accuracy.photos import Photos, load
from benchmarks.accuracy.rows import Store, scored
from benchmarks.accuracy.scenes import Album, Rows, draw
from benchmarks.accuracy.study import METHODS, Row, Size
from benchmarks.accuracy.train import from_scratch, learn, order_of
from grace_plugin.data import SAMPLE_KEY

__all__ = ["Work", "make_all"]

TRAIN_SEED, TEST_SEED, VALIDATION_SEED, TEACHER_SEED = 101, 202, 303, 404


class Work:
    """Everything a process keeps between rows. folder: checkpoints of the pair; photos: as `photos.load` takes it."""

    def __init__(self, size: Size, store: Store, folder: Path, photos: str) -> None:
        self.size, self.store, self.folder, self.source = size, store, folder, photos
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.text = Text()
        self.started = time.time()

    @cached_property
    def photos(self) -> dict[str, Photos]:
        found = load(self.source)
        return {part: tuple(a[: self.size.photos[part]] for a in both) for part, both in found.items()}  # type: ignore[misc]

    @cached_property
    def albums(self) -> dict[str, Album]:
        return {part: Album(photos, self.device) for part, photos in self.photos.items()}

    @cached_property
    def rows(self) -> dict[str, Rows]:
        size = self.size
        return {
            "student": draw(TRAIN_SEED, size.rows, self.photos["student"], augment=True),
            "validation": draw(VALIDATION_SEED, size.validation_rows, self.photos["validation"], augment=False),
            "test": draw(TEST_SEED, size.test_rows, self.photos["test"], augment=False),
        }

    @cached_property
    def teacher(self) -> KeptTeacher:
        """The teacher's states: computed by the first process that needs them, read by the others."""
        model, file = self.open(Row("pair", "teacher", 0)), self.folder / "teacher-states.pt"
        states = torch.load(file, map_location=self.device) if file.is_file() else None
        kept = KeptTeacher(model, self.rows["student"], self.text, self.albums["student"], states)
        if states is None:
            part = file.with_suffix(f".{os.getpid()}")
            torch.save((kept.final, kept.visual), part)
            part.replace(file)
        return kept

    def checkpoint(self, row: Row) -> Path:
        """Folder of a member of the pair."""
        return self.folder / row.name.replace("/", "-")

    def open(self, row: Row) -> Any:
        """A member of the pair on the device: bfloat16 on a GPU, the same numbers in float32 on a CPU."""
        return self._open(self.checkpoint(row))

    def _open(self, folder: Path) -> Any:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        return self.computing(model)

    def computing(self, model: Any) -> Any:
        """The model on the device in the type it computes in."""
        return model.to(self.device, torch.bfloat16 if self.device.type == "cuda" else torch.float32)

    def score(self, model: Any, part: str) -> dict[str, Any]:
        """Entries of a record for the part's questions."""
        rows = self.rows[part]
        return {"part": part, **scored(score(self.computing(model), rows, self.text, self.albums[part]), rows)}

    def make(self, row: Row) -> None:
        """Make a row and write it; an error becomes the record."""
        begun = time.time()
        try:
            if row.setting == "pair":
                said = self._pair(row)
            elif row.method in METHODS:
                said = self._trained(row)
            else:
                said = self._compressed(row)
        except Exception:
            self.store.write(row, failed=traceback.format_exc()[-3000:], seconds=time.time() - begun)
            return
        self.store.write(row, **said, seconds=time.time() - begun)

    def _pair(self, row: Row) -> dict[str, Any]:
        size = self.size
        part = "student" if row.method == "student" else "teacher"
        shape = size.teacher if row.method == "teacher" else size.student
        steps = {"tower": size.tower_steps, "teacher": size.teacher_steps, "student": size.student_steps}[row.method]
        batch, rate = size.teacher_batch, size.teacher_rate
        if row.method != "teacher":
            batch, rate = size.student_batch, size.student_rate
        model = pair.build(shape, row.seed if part == "student" else TEACHER_SEED)
        if row.method != "tower":
            tower = self.open(Row("pair", "tower", 0)).model.vision_tower
            model.model.vision_tower.load_state_dict(tower.state_dict())
            model.model.vision_tower.requires_grad_(False)
        model.to(self.device)
        order = order_of(row.seed + 500, size.rows, steps, batch)

        def draw_step(step: int) -> Rows:
            if part == "teacher":
                return draw(TEACHER_SEED * 10**6 + step, batch, self.photos[part], augment=True)
            return self.rows[part].take(order[step])

        log: list[str] = []
        from_scratch(
            model, draw_step, self.albums[part], self.text, steps=steps, rate=rate, seed=row.seed, log=log.append
        )
        pair.save(model.cpu(), self.checkpoint(row))
        count = sum(p.numel() for p in model.parameters())
        entries = {"parameters": count, "steps": steps, "rate": rate, "log": log[-1:], "photos": size.photos[part]}
        model = self.computing(model)
        own = self.rows["student"].take(np.arange(min(5000, size.rows)))
        seen = score(model, own, self.text, self.albums["student"])
        return entries | {"training_rows_accuracy": float(seen.mean())} | self.score(model, "test")

    def rate(self, row: Row) -> tuple[float, dict[str, float]]:
        """The rate of a row: its own in a search, else the one with the best validation accuracy in its method's search."""
        if row.rate is not None:
            return row.rate, {}
        found: dict[float, float] = {}
        for rate in self.size.rates:
            record = self.store.read(Row(row.search_setting, METHODS[row.method].searched, 0, rate))
            if record is not None and "failed" not in record:
                found[rate] = record["accuracy"]
        return max(found, key=lambda rate: found[rate]), {f"{rate:g}": value for rate, value in found.items()}

    def _trained(self, row: Row) -> dict[str, Any]:
        size, method = self.size, METHODS[row.method]
        rate, search = self.rate(row)
        model = self.open(Row("pair", "student", row.seed)).float()
        steps = round(method.steps * size.steps)
        order = order_of(row.seed, min(method.rows or size.rows, size.rows), steps, size.batch)
        begun = time.time()
        teacher, rows, album = self.teacher if method.taught else None, self.rows["student"], self.albums["student"]
        said, frozen = learn(model, teacher, method, row.setting, rows, album, self.text, order=order, rate=rate)
        said |= {"rate": rate, "search": search, "steps": steps, "photos": size.photos["student"]}
        said["train_seconds"] = time.time() - begun
        if row.kept:
            model = self._keep(model, row, frozen)
        return said | self.score(model, "test" if row.rate is None else "validation")

    def _keep(self, model: Any, row: Row, frozen: Any) -> Any:
        """Write a trained student as the checkpoint that ships and read it back: what is scored is what lies on disk."""
        from benchmarks.accuracy.post import export

        folder = self.checkpoint(row)
        if frozen:
            export(model, frozen, row.setting, folder)
        else:
            pair.save(model, folder)
        return self._open(folder)

    def _compressed(self, row: Row) -> dict[str, Any]:
        from benchmarks.accuracy.post import compress

        folder = self.folder / "post" / row.name.replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        model = self.open(row.base).to(torch.bfloat16)
        batches = []
        for start in range(0, self.size.calibration, 8):
            batch, _ = batch_of(
                self.rows["student"].take(np.arange(start, start + 8)), self.text, self.albums["student"]
            )
            batch["pixel_values"] = batch["pixel_values"].to(torch.bfloat16)
            batches.append({name: value for name, value in batch.items() if name not in ("labels", SAMPLE_KEY)})
        compress(model, row.method.rpartition("+")[2], row.setting, batches, folder)
        said = self.score(self._open(folder), "test")
        shutil.rmtree(folder)
        return said


_WORK: list[Work] = []


def _begin(*arguments: Any) -> None:
    torch.set_num_threads(1)
    _WORK.append(Work(*arguments))


def _make(row: Row) -> Row:
    _WORK[0].make(row)
    return row


def make_all(rows: list[Row], arguments: tuple[Size, Store, Path, str], workers: int, until: float) -> list[Row]:
    """Make rows and what they need, in `workers` processes; none is begun after the time `until`. Returns what is left."""
    size, store = arguments[:2]
    left: list[Row] = []

    def there(row: Row) -> bool:
        return store.done(row) and (not row.kept or (arguments[2] / row.name.replace("/", "-")).is_dir())

    def add(row: Row) -> None:
        for need in row.needs(size):
            if not there(need):
                add(need)
        if row not in left:
            left.append(row)

    for row in rows:
        if not store.done(row):
            add(row)
    context = multiprocessing.get_context("spawn")
    running: dict[Future[Row], Row] = {}
    with ProcessPoolExecutor(workers, context, _begin, arguments) as pool:
        while left or running:
            ready = [row for row in left if all(there(need) for need in row.needs(size))]
            for row in ready[: workers - len(running)] if time.time() < until else []:
                left.remove(row)
                running[pool.submit(_make, row)] = row
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row = running.pop(future)
                future.result()
                record = store.read(row) or {}
                shown = record["failed"].splitlines()[-1] if "failed" in record else f"{100 * record['accuracy']:.2f} %"
                print(f"{row.name}: {shown}, {record['seconds']:.0f} s", flush=True)
    return left
