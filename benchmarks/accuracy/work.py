"""Make the rows of the study: train, quantize and score a model, and record it."""

from __future__ import annotations

import os
import shutil
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.accuracy import pair
from benchmarks.accuracy.data import KeptTeacher, Text, score
from benchmarks.accuracy.methods import METHODS, POST, Method
from benchmarks.accuracy.photos import Photos, load
from benchmarks.accuracy.relation import deep_states
from benchmarks.accuracy.rows import Store, scored
from benchmarks.accuracy.scenes import Album, draw
from benchmarks.accuracy.study import Row, Size, best_of
from benchmarks.accuracy.train import NAMING, from_scratch, learn, order_of

__all__ = ["TRAIN_SEED", "Work"]

TRAIN_SEED, TEST_SEED, VALIDATION_SEED, TEACHER_SEED = 101, 202, 303, 404


class Work:
    """State that a process keeps between rows. folder: checkpoints of teacher and student; photos: as `photos.load` takes
    it.
    """

    naming_weight = NAMING

    def __init__(self, size: Size, store: Store, folder: Path, photos: str) -> None:
        self.size, self.store, self.folder, self.source = size, store, folder, photos
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._teacher: dict[str, KeptTeacher] = {}
        self._deep: dict[tuple[int, ...], torch.Tensor] = {}

    @cached_property
    def text(self) -> Text:
        return Text()

    @cached_property
    def photos(self) -> dict[str, Photos]:
        found = load(self.source)
        return {part: tuple(a[: self.size.photos[part]] for a in both) for part, both in found.items()}  # type: ignore[misc]

    @cached_property
    def albums(self) -> dict[str, Album]:
        return {part: Album(photos, self.device) for part, photos in self.photos.items()}

    @cached_property
    def samples(self) -> dict[str, Any]:
        size = self.size
        return {
            "student": self.drawn(TRAIN_SEED, size.samples, "student"),
            "validation": draw(VALIDATION_SEED, size.validation_samples, self.photos["validation"], augment=False),
            "test": draw(TEST_SEED, size.test_samples, self.photos["test"], augment=False),
        }

    def drawn(self, seed: int, count: int, part: str) -> Any:
        """Return `count` training samples of the part's photographs."""
        return draw(seed, count, self.photos[part], augment=True)

    def teacher(self, name: str) -> KeptTeacher:
        """A teacher's states: computed by the first process that needs them, read by the others; the latest is kept."""
        if name not in self._teacher:
            model, file = self.open(Row("pair", name, 0)), self.folder / f"{name}-states.pt"
            states = torch.load(file, map_location=self.device) if file.is_file() else None
            kept = KeptTeacher(model, self.samples["student"], self.text, self.albums["student"], states)
            if states is None:
                part = file.with_suffix(f".{os.getpid()}")
                torch.save((kept.final, kept.visual), part)
                part.replace(file)
            self._teacher = {name: kept}
        return self._teacher[name]

    def deep(self, method: Method) -> torch.Tensor | None:
        """The teacher's states of a method that relates other places than GRACE; the latest layers' are kept."""
        layers = tuple(theirs for _, theirs in method.layers)
        if layers and layers not in self._deep:
            model = self.open(Row("pair", method.teacher, 0))
            self._deep = {
                layers: deep_states(model, layers, self.samples["student"], self.text, self.albums["student"])
            }
        return self._deep.get(layers)

    def checkpoint(self, row: Row) -> Path:
        """Return the folder of a model."""
        return self.folder / row.name.replace("/", "-")

    def open(self, row: Row) -> Any:
        """Load a model to the device: in bfloat16 on a GPU, with the same values in float32 on a CPU."""
        return self._open(self.checkpoint(row))

    def _open(self, folder: Path) -> Any:
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
        return self.computing(model)

    def computing(self, model: Any) -> Any:
        """The model on the device in the type it computes in: that of its weights on a GPU, float32 ones in bfloat16."""
        dtype = next(model.parameters()).dtype
        if self.device.type != "cuda":
            return model.to(self.device, torch.float32)
        return model.to(self.device, torch.bfloat16 if dtype == torch.float32 else dtype)

    def score(self, model: Any, part: str) -> dict[str, Any]:
        """Entries of a record for the part's questions."""
        samples = self.samples[part]
        return {
            "part": part,
            **scored(score(self.computing(model), samples, self.text, self.albums[part]), samples.type),
        }

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

    def beginning(self, row: Row) -> Any:
        """Return the untrained model in float32 on the CPU, with the vision tower where that was trained."""
        shape = self.size.teachers.get(row.method, self.size.student)
        model = pair.build(shape, row.seed if row.method == "student" else TEACHER_SEED)
        if row.method != "tower":
            tower = self.open(Row("pair", "tower", 0)).model.vision_tower
            model.model.vision_tower.load_state_dict(tower.state_dict())
            model.model.vision_tower.requires_grad_(False)
        return model

    def _pair(self, row: Row) -> dict[str, Any]:
        size = self.size
        part = "student" if row.method == "student" else "teacher"
        steps = {"tower": size.tower_steps, "student": size.student_steps}.get(row.method, size.teacher_steps)
        batch, rate = size.student_batch, size.student_rate
        if row.method in size.teachers:
            batch, rate = size.teacher_batch, size.teacher_rate
        model = self.beginning(row).to(self.device)
        order = order_of(row.seed + 500, size.samples, steps, batch)

        def draw_step(step: int) -> Any:
            if part == "teacher":
                return self.drawn(TEACHER_SEED * 10**6 + step, batch, part)
            return self.samples[part].take(order[step])

        log: list[str] = []
        from_scratch(
            model,
            draw_step,
            self.albums[part],
            self.text,
            steps=steps,
            rate=rate,
            seed=row.seed,
            naming_weight=self.naming_weight,
            log=log.append,
        )
        pair.save(model.cpu(), self.checkpoint(row))
        count = sum(p.numel() for p in model.parameters())
        entries = {"parameters": count, "steps": steps, "rate": rate, "log": log[-1:], "photos": size.photos[part]}
        model = self.computing(model)
        own = self.samples["student"].take(np.arange(min(5000, size.samples)))
        seen = score(model, own, self.text, self.albums["student"])
        return entries | {"training_rows_accuracy": float(seen.mean())} | self.score(model, "test")

    def found(self, row: Row) -> tuple[float, float | None, dict[str, float]]:
        """Rate and weight of a row (None: the method's default) and the search they come from, accuracy by what was tried.

        A row of the search has its own; any other has the rate, then the weight, of the best validation accuracy.
        """
        if row.rate is not None:
            return row.rate, None, {}
        rates, weights = (
            {
                one: record["accuracy"]
                for one in rows
                if "failed" not in (record := self.store.read(one) or {"failed": ""})
            }
            for rows in (row.rates(self.size), row.weights(self.size))
        )
        best, weight = best_of(rates, weights)
        assert best.rate is not None
        said = {f"{one.rate:g}": value for one, value in rates.items()}
        if row.weight is not None:
            return best.rate, row.weight, said
        return best.rate, weight, said | {f"w{one.weight:g}": value for one, value in weights.items()}

    def _trained(self, row: Row) -> dict[str, Any]:
        size = self.size
        rate, weight, search = self.found(row)
        method = METHODS[row.method].weighed(weight)
        model, scales = self._start(row, method.start)
        steps = round(method.steps * size.steps)
        order = order_of(row.seed, min(method.samples or size.samples, size.samples), steps, size.batch)
        begun = time.time()
        teacher = self.teacher(method.teacher) if method.taught else None
        said, frozen = learn(
            model,
            teacher,
            method,
            row.setting,
            self.samples["student"],
            self.albums["student"],
            self.text,
            order=order,
            rate=rate,
            scales=scales,
            deep=self.deep(method),
        )
        used = {"weight": weight if method.weight == weight else None, "weight_used": method.weight}
        said |= {"rate": rate, **used, "search": search, "steps": steps, "photos": size.photos["student"]}
        said["train_seconds"] = time.time() - begun
        if row.kept:
            model = self._keep(model, row, frozen)
        return said | self.score(model, "validation" if row.searching else "test")

    def _keep(self, model: Any, row: Row, frozen: Any) -> Any:
        """Export a trained student and load the checkpoint, so that what is scored is what is on disk."""
        from benchmarks.accuracy.post import export

        folder = self.checkpoint(row)
        if frozen:
            export(model, frozen, row.setting, folder)
        else:
            pair.save(model, folder)
        return self._open(folder)

    def _start(self, row: Row, start: str) -> tuple[Any, dict[str, torch.Tensor]]:
        """The student in float32 where training starts, and its scales by layer where a post-training method made them."""
        model = self.open(Row("pair", "student", row.seed)).float()
        if start not in POST:
            return model, {}
        with self._compress(Row("pair", "student", row.seed), start, row.setting) as loaded:
            self.score(loaded, "validation")  # the first forward pass makes compressed layers dense
        state = loaded.state_dict()
        model.load_state_dict({name: state[name] for name in model.state_dict()})
        suffix = ".weight_scale"
        return model, {name.removesuffix(suffix): value for name, value in state.items() if name.endswith(suffix)}

    def _compressed(self, row: Row) -> dict[str, Any]:
        with self._compress(row.base, row.method.rpartition("+")[2], row.setting) as loaded:
            return self.score(loaded, "test")

    @contextmanager
    def _compress(self, base: Row, method: str, setting: str) -> Iterator[Any]:
        """Yield a model after a post-training method, loaded from its files, which are removed afterwards."""
        from benchmarks.accuracy.post import calibration, compress

        folder = self.folder / "post" / f"{base.name}-{method}-{setting}-{os.getpid()}".replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        samples, album = self.samples["student"].take(np.arange(self.size.calibration)), self.albums["student"]
        compress(self.open(base).to(torch.bfloat16), method, setting, calibration(samples, self.text, album), folder)
        yield self._open(folder)
        shutil.rmtree(folder)
