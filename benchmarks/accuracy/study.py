"""Define the study: its sizes, its settings, and its rows, each a trained or quantized model.

A row is `SETTING/METHOD/SEED`, for instance `w2g128/grace/0`; `tower`, `teacher` and `student/0` are the pair.
`w2g128/grace@0.0006/0` and `w2g128/grace@w10/0` are rows of the search (a learning rate at the default weight, a weight at the
best rate): scored on validation questions, seed 0. `w4g128/grace+gptq/0` is the BF16 student trained by GRACE
(`bf16/grace/0`), then GPTQ. Every trained method has the same students to start from, the same questions in the same order, the
same number of steps and, on one data set, the same search.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.accuracy.methods import AFTER, METHODS, POST
from benchmarks.accuracy.pair import Shape

__all__ = ["SETTINGS", "SIZES", "Row", "Size", "best_of", "group_of_rows"]

#: bits and group size of each setting; None is one scale per output channel
SETTINGS: dict[str, tuple[int, int | None] | None] = {
    "bf16": None,
    "w8g128": (8, 128),
    "w4g128": (4, 128),
    "w4row": (4, None),
    "w3g128": (3, 128),
    "w2g128": (2, 128),
    "w2g32": (2, 32),
    "w2g64": (2, 64),
    "w2row": (2, None),
    "w3row": (3, None),
}


#: teachers of other sizes than the study's, for one ablation
OTHER_TEACHERS = ("teacher-small", "teacher-large")


@dataclass(frozen=True)
class Row:
    """setting/method/seed; a rate or a weight is given in a row of the search alone."""

    setting: str
    method: str
    seed: int
    rate: float | None = None
    weight: float | None = None

    @property
    def name(self) -> str:
        """Name of the row on the command line, and path of its file below rows/."""
        if self.setting == "pair":
            return f"student/{self.seed}" if self.method == "student" else self.method
        tried = f"@{self.rate:g}" if self.rate is not None else f"@w{self.weight:g}" if self.weight is not None else ""
        return f"{self.setting}/{self.method}{tried}/{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Row:
        """Read a name.

        Raises:
            ValueError: no such row.
        """
        parts = name.split("/")
        if name in ("tower", "teacher", *OTHER_TEACHERS):
            return cls("pair", name, 0)
        if len(parts) == 2 and parts[0] == "student" and parts[1].isdigit():
            return cls("pair", "student", int(parts[1]))
        if len(parts) == 3 and parts[2].isdigit() and parts[0] in SETTINGS:
            method, _, tried = parts[1].partition("@")
            rate, weight = (None, float(tried[1:])) if tried[:1] == "w" else (float(tried) if tried else None, None)
            if method in METHODS or (method in (*POST, *AFTER) and parts[0] != "bf16"):
                return cls(parts[0], method, int(parts[2]), rate, weight)
        raise ValueError(
            f"no row {name!r}: teacher, student/SEED, or SETTING/METHOD/SEED with a setting of {sorted(SETTINGS)} and a method "
            f"of {[*METHODS, *POST, *AFTER]}"
        )

    def needs(self, size: Size) -> list[Row]:
        """Rows that must be there before this one."""
        if self.method == "tower":
            return []
        if self.setting == "pair":
            return [Row("pair", "tower", 0)] if size.tower_steps else []
        found = [Row("pair", "student", self.seed)]
        if self.method in AFTER:
            found.append(self.base)
        if self.method in METHODS:
            found += [Row("pair", METHODS[self.method].teacher, 0)] if METHODS[self.method].taught else []
            found += [] if self.rate is not None else self.rates(size)
            found += [] if self.searching else self.weights(size)
        return found

    @property
    def searching(self) -> bool:
        """Whether it is a row of the search."""
        return self.rate is not None or self.weight is not None

    def rates(self, size: Size) -> list[Row]:
        """The search of the learning rate that it relies on."""
        return [Row(self.search_setting, METHODS[self.method].searched, 0, rate) for rate in size.rates]

    def weights(self, size: Size) -> list[Row]:
        """The search of the weight that it relies on, at the best rate."""
        searched = METHODS[self.method].searched
        tried = METHODS[searched].weights[-size.weights :] if size.weights else ()
        return [Row(self.search_setting, searched, 0, weight=weight) for weight in tried]

    @property
    def base(self) -> Row:
        """The trained BF16 row that one of AFTER rounds, else the student."""
        if self.method in AFTER:
            return Row("bf16", self.method.partition("+")[0], self.seed)
        return Row("pair", "student", self.seed)

    @property
    def kept(self) -> bool:
        """Whether its checkpoint stays on disk: teacher, student, models that are rounded later, and those that are
        exported.
        """
        trained = (self.setting, self.method) in (("bf16", "kl"), ("bf16", "grace"), ("w4g128", "grace"))
        return self.setting == "pair" or (trained and not self.searching)

    @property
    def search_setting(self) -> str:
        """Setting in which rate and weight are searched: bf16, w4g128 for 4 bits or more, w2g128 for the others."""
        return "bf16" if self.setting == "bf16" else "w4g128" if self.setting[:2] in ("w4", "w8") else "w2g128"


@dataclass(frozen=True)
class Size:
    """A size of the study. photos: used of each part; samples: of the one training set; rates: searched; weights: how many of a
    method's weights are searched, the last ones; tower_steps: 0 where the pair starts from trained members.
    """

    teacher: Shape
    student: Shape
    photos: dict[str, int]
    tower_steps: int
    teacher_steps: int
    teacher_batch: int
    teacher_rate: float
    student_steps: int
    student_batch: int
    student_rate: float
    samples: int
    test_samples: int
    validation_samples: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    weights: int = 0
    calibration: int = 512
    other_teachers: tuple[Shape, ...] = ()

    @property
    def teachers(self) -> dict[str, Shape]:
        """Shapes of the teacher and of OTHER_TEACHERS, by name."""
        return {"teacher": self.teacher, **dict(zip(OTHER_TEACHERS, self.other_teachers, strict=False))}


SIZES: dict[str, Size] = {
    "gpu": Size(
        Shape(640, 8, 1792),
        Shape(256, 4, 640),
        {"teacher": 20000, "student": 2048, "validation": 1024, "test": 3200},
        tower_steps=600,
        teacher_steps=1600,
        teacher_batch=256,
        teacher_rate=6e-4,
        student_steps=1000,
        student_batch=256,
        student_rate=1.5e-3,
        samples=16384,
        test_samples=15000,
        validation_samples=5000,
        steps=1000,
        batch=256,
        rates=(2e-4, 6e-4, 1.8e-3, 3.1e-3, 5.4e-3, 9.4e-3),
        seeds=5,
        weights=3,
        other_teachers=(Shape(384, 6, 1024), Shape(896, 10, 2560)),
    ),
    "cpu": Size(
        Shape(128, 3, 256),
        Shape(128, 2, 128),
        {"teacher": 2000, "student": 512, "validation": 256, "test": 512},
        tower_steps=40,
        teacher_steps=80,
        teacher_batch=16,
        teacher_rate=1.2e-3,
        student_steps=50,
        student_batch=16,
        student_rate=2e-3,
        samples=512,
        test_samples=500,
        validation_samples=200,
        steps=30,
        batch=16,
        rates=(1e-3,),
        seeds=1,
        calibration=64,
    ),
    "tiny": Size(
        Shape(128, 2, 128),
        Shape(128, 2, 128),
        {"teacher": 200, "student": 100, "validation": 60, "test": 200},
        tower_steps=2,
        teacher_steps=3,
        teacher_batch=8,
        teacher_rate=1e-3,
        student_steps=3,
        student_batch=8,
        student_rate=1e-3,
        samples=32,
        test_samples=40,
        validation_samples=20,
        steps=6,
        batch=8,
        rates=(1e-3, 2e-3),
        seeds=2,
        weights=1,
        calibration=8,
    ),
}


def best_of(rates: Mapping[Row, float], weights: Mapping[Row, float]) -> tuple[Row, float | None]:
    """Return the search's row of the best rate, and the best weight; None where no weight is better than the default.

    Args:
        rates: validation accuracy of each rate at the default weight.
        weights: validation accuracy of each other weight at the best rate.

    Of rates or weights that are equally good the first is taken.
    """
    best = max(rates, key=lambda one: rates[one])
    better = max(weights, key=lambda one: weights[one], default=None)
    return best, better.weight if better is not None and weights[better] > rates[best] else None


_PAIR = [Row("pair", "tower", 0), Row("pair", "teacher", 0)]
_MAIN = ("w2g128", "bf16", "w4g128")
_ABLATED = (
    "grace-kl",
    "grace-norelation",
    "grace-nogate",
    "grace-frozen",
    "relation",
    "grace-beta1.0",
    "grace-beta0.3",
    "grace-default",
    "grace-minmax",
    "grace-k2",
    "grace-k5",
    "grace-scales",
    "grace-beta2.0",
    "grace-beta0.1",
    "grace-k10",
    "grace-steps0.4",
    "kl-steps0.4",
    "ce-steps0.4",
    "grace-rows4096",
    "kl-rows4096",
    "ce-rows4096",
    "grace-beta4.0",
    "grace-rows1024",
    "grace-steps0.1",
    "grace-unmasked",
    "grace-floatscales",
    "grace-layer-last",
    "grace-layers2",
    "grace-layers3",
    "grace-text",
    "grace-text-alone",
    "grace-gptq",
    "grace-awq",
    "grace-scalerate1",
    "grace-scalerate3",
    "kl-frozen",
    "kl-scalerate1",
    "grace-teacher-small",
    "kl-teacher-small",
    "grace-teacher-large",
    "kl-teacher-large",
)
#: ablations that two seeds did not show to be worse than GRACE
_CLOSE = ("grace-nogate", "grace-frozen", "grace-beta1.0", "grace-awq", "grace-layers2")
_SIZED = (
    *((s, "grace") for s in ("w2g32", "w2row")),
    *(("w3row", m) for m in ("grace", "kl", "ce")),
    ("w2row", "grace-frozen"),
    ("w2g64", "grace"),
    *(("w3g128", m) for m in ("grace", "kl", "ce")),
    *(("w3g128", f"grace-mixed-{how}") for how in ("damage", "error", "reverse")),
    *(("w8g128", m) for m in ("grace", "kl", "ce")),
    ("w4g128", "grace-awq"),
    ("w4g128", "grace-nogate"),
)


def group_of_rows(name: str, size: Size) -> list[Row]:
    """Return the rows of a group ("main", "core", "post", "others", "ablation", "subset"), or the one row of that name."""
    seeds = range(size.seeds)
    if name == "core":
        rounded = [Row(s, m, seed) for m in ("rtn", "gptq") for s in ("w4g128", "w2g128") for seed in seeds]
        return [*group_of_rows("main", size), *rounded]
    if name == "main":
        pair = [*(_PAIR if size.tower_steps else _PAIR[1:]), *(Row("pair", "student", seed) for seed in seeds)]
        trained = [Row(s, m, seed) for s in _MAIN for seed in seeds for m in ("grace", "kl", "ce")]
        return [*pair, *trained]
    if name == "others":
        others = ("grace-calibration", "torchao", "modelopt")
        return [Row(s, m, seed) for m in others for s in ("w4g128", "w2g128") for seed in seeds]
    if name == "post":
        two = range(min(2, size.seeds))
        rounded = [Row(s, "rtn", seed) for s in ("w3g128", "w3row", "w4row", "w2row", "w8g128") for seed in two]
        return [*(Row(s, m, seed) for m in (*POST, *AFTER) for s in ("w4g128", "w2g128") for seed in seeds), *rounded]
    if name == "ablation":
        two = range(min(2, size.seeds))
        return [
            *(Row("w2g128", m, seed) for m in _ABLATED for seed in two),
            *(Row(s, m, seed) for s, m in _SIZED for seed in two),
            *(Row("w2g128", m, seed) for m in _CLOSE for seed in seeds),
        ]
    if name == "subset":
        rows = [Row(s, m, 0) for s in ("bf16", "w2g128") for m in ("ce", "kl", "grace")]
        student = Row("pair", "student", 0)
        return [*_PAIR, student, *rows, Row("w4g128", "rtn", 0), Row("w2g128", "rtn", 0), Row("w2g128", "gptq", 0)]
    return [Row.parse(name)]
