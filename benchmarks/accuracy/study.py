"""What is compared: sizes of the study, settings, methods, and the rows they make.

A row is `SETTING/METHOD/SEED`, for instance `w2g128/grace/0`; `tower`, `teacher` and `student/0` are the pair.
`w2g128/grace@0.0006/0` is a row of the learning-rate search: scored on validation questions, seed 0.
`w4g128/grace+gptq/0` is the BF16 student trained by GRACE (`bf16/grace/0`), then GPTQ.
Every trained method has the same students to start from, the same questions in the same order, the same number of steps and
the same rates to search.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.accuracy.pair import Shape
from grace_plugin.recipe import ControllerRecipe, DistillRecipe, RelationalRecipe

__all__ = ["AFTER", "METHODS", "POST", "SETTINGS", "SIZES", "Method", "Row", "Size", "group_of_rows"]

#: bits and group size of each setting; None is one scale per output channel
SETTINGS: dict[str, tuple[int, int | None] | None] = {
    "bf16": None, "w8g128": (8, 128), "w4g128": (4, 128), "w4row": (4, None), "w3g128": (3, 128), "w2g128": (2, 128),
    "w2g32": (2, 32), "w2g64": (2, 64), "w2row": (2, None), "w3row": (3, None),
}  # fmt: skip
POST = ("rtn", "gptq", "awq", "autoround")
#: BF16 students trained first and rounded after, the way to a quantized student without quantization-aware training
AFTER = tuple(f"{base}+{post}" for base in ("kl", "grace") for post in ("rtn", "gptq"))
OFF: dict[str, Any] = {"enabled": False}


@dataclass(frozen=True)
class Method:
    """A trained method: the blocks of its recipe, and what is not in a recipe.

    plain: KL in place of the decoupled divergence. searched: the method whose search gives the learning rate. weights: whether
    weights are trained (else scales and norms alone). steps: share of the study's steps. rows: of the training set, from its
    start; None is all.
    """

    distill: dict[str, Any] = field(default_factory=dict)
    relational: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    learned_scales: bool = True
    weights: bool = True
    steps: float = 1.0
    rows: int | None = None
    searched: str = ""

    @property
    def taught(self) -> bool:
        """Whether it reads the teacher."""
        return self.distill != OFF or self.relational != OFF

    def blocks(self) -> tuple[DistillRecipe, RelationalRecipe, ControllerRecipe]:
        """The recipe's blocks."""
        return DistillRecipe(**self.distill), RelationalRecipe(**self.relational), ControllerRecipe(**self.controller)


def _fixed(beta: float) -> dict[str, Any]:
    return {"enabled": False, "beta_min": 0.0, "beta_max": 100.0, "beta_start": beta}


def _kl(weight: float, searched: str = "kl") -> Method:
    return Method({"gate_sharpness": 0.0}, OFF, _fixed(weight), plain=True, searched=searched)


METHODS: dict[str, Method] = {
    "ce": Method(OFF, OFF, OFF, searched="ce"),  # fine-tuning in bf16, QAT alone in the others
    "kl": _kl(1.0),
    "grace": Method(searched="grace"),
    "kl-w0.3": _kl(0.3), "kl-w3": _kl(3.0), "kl-w10": _kl(10.0),
    "grace-nogate": Method({"gate_sharpness": 0.0}, searched="grace"),
    "grace-k2": Method({"gate_sharpness": 2.0}, searched="grace"),
    "grace-k5": Method({"gate_sharpness": 5.0}, searched="grace"),
    "grace-kl": Method(plain=True, searched="grace"),
    "grace-norelation": Method({}, OFF, searched="grace"),
    "grace-relation10": Method({}, {"weight": 10.0}, searched="grace"),
    "relation": Method(OFF, {}, OFF, searched="grace"),
    "grace-frozen": Method(learned_scales=False, searched="grace"),
    **{f"grace-beta{beta}": Method({}, {}, _fixed(beta), searched="grace") for beta in (0.1, 0.3, 0.55, 1.0, 2.0, 4.0)},
    "grace-max4": Method({}, {}, {"beta_max": 4.0}, searched="grace"),
    "grace-scales": Method(weights=False, searched="grace"),
    **{f"grace-steps{share:g}": Method(steps=share, searched="grace") for share in (0.1, 0.4)},
    "kl-steps0.4": replace(_kl(1.0), steps=0.4), "ce-steps0.4": Method(OFF, OFF, OFF, steps=0.4, searched="ce"),
    **{f"grace-rows{rows}": Method(rows=rows, searched="grace") for rows in (1024, 4096)},
    "kl-rows4096": replace(_kl(1.0), rows=4096), "ce-rows4096": Method(OFF, OFF, OFF, rows=4096, searched="ce"),
    "grace-calibration": Method(steps=0.1, rows=512, searched="grace"),  # what `oneshot` is given
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """setting/method/seed; rate is given in a row of the search alone."""

    setting: str
    method: str
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        """How the row is asked for, and its file's path below rows/."""
        if self.setting == "pair":
            return f"student/{self.seed}" if self.method == "student" else self.method
        rate = "" if self.rate is None else f"@{self.rate:g}"
        return f"{self.setting}/{self.method}{rate}/{self.seed}"

    @classmethod
    def parse(cls, name: str) -> Row:
        """Read a name.

        Raises:
            ValueError: no such row.
        """
        parts = name.split("/")
        if name in ("tower", "teacher"):
            return cls("pair", name, 0)
        if len(parts) == 2 and parts[0] == "student" and parts[1].isdigit():
            return cls("pair", "student", int(parts[1]))
        if len(parts) == 3 and parts[2].isdigit() and parts[0] in SETTINGS:
            method, _, rate = parts[1].partition("@")
            if method in METHODS or (method in (*POST, *AFTER) and parts[0] != "bf16"):
                return cls(parts[0], method, int(parts[2]), float(rate) if rate else None)
        raise ValueError(
            f"no row {name!r}: teacher, student/SEED, or SETTING/METHOD/SEED with a setting of {sorted(SETTINGS)} and a method "
            f"of {[*METHODS, *POST, *AFTER]}"
        )

    def needs(self, size: Size) -> list[Row]:
        """Rows that must be there before this one."""
        if self.method == "tower":
            return []
        if self.setting == "pair":
            return [Row("pair", "tower", 0)]
        found = [Row("pair", "student", self.seed)]
        if self.method in AFTER:
            found.append(self.base)
        if self.method in METHODS:
            found += [Row("pair", "teacher", 0)] if METHODS[self.method].taught else []
            if self.rate is None:
                searched = METHODS[self.method].searched
                found += [Row(self.search_setting, searched, 0, rate) for rate in size.rates]
        return found

    @property
    def base(self) -> Row:
        """The trained BF16 row that one of AFTER rounds, else the student."""
        if self.method in AFTER:
            return Row("bf16", self.method.partition("+")[0], self.seed)
        return Row("pair", "student", self.seed)

    @property
    def kept(self) -> bool:
        """Whether its checkpoint stays on disk: the pair, what is rounded after, and GRACE's rows that ship."""
        trained = (self.setting, self.method) in (("bf16", "kl"), ("bf16", "grace"), ("w4g128", "grace"))
        return self.setting == "pair" or (trained and self.rate is None)

    @property
    def search_setting(self) -> str:
        """Setting in which the rate is searched: bf16 for itself and 4 bits or more, w2g128 for the others."""
        return "bf16" if self.setting[:2] in ("bf", "w4", "w8") else "w2g128"


@dataclass(frozen=True)
class Size:
    """A size of the study. photos: used of each part; rows: of the one training set; rates: searched."""

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
    rows: int
    test_rows: int
    validation_rows: int
    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int
    calibration: int = 512


SIZES: dict[str, Size] = {
    "gpu": Size(
        Shape(640, 8, 1792), Shape(256, 4, 640), {"teacher": 20000, "student": 2048, "validation": 1024, "test": 3200},
        tower_steps=600, teacher_steps=1600, teacher_batch=256, teacher_rate=6e-4,
        student_steps=1000, student_batch=256, student_rate=1.5e-3, rows=16384, test_rows=15000, validation_rows=5000,
        steps=1000, batch=256, rates=(6e-4, 1.8e-3, 5.4e-3), seeds=5,
    ),
    "cpu": Size(
        Shape(128, 3, 256), Shape(128, 2, 128), {"teacher": 2000, "student": 512, "validation": 256, "test": 512},
        tower_steps=40, teacher_steps=80, teacher_batch=16, teacher_rate=1.2e-3,
        student_steps=50, student_batch=16, student_rate=2e-3, rows=512, test_rows=500, validation_rows=200,
        steps=30, batch=16, rates=(1e-3,), seeds=1, calibration=64,
    ),
    "tiny": Size(
        Shape(128, 2, 128), Shape(128, 2, 128), {"teacher": 200, "student": 100, "validation": 60, "test": 200},
        tower_steps=2, teacher_steps=3, teacher_batch=8, teacher_rate=1e-3,
        student_steps=3, student_batch=8, student_rate=1e-3, rows=32, test_rows=40, validation_rows=20,
        steps=6, batch=8, rates=(1e-3, 2e-3), seeds=2, calibration=8,
    ),
}  # fmt: skip

_PAIR = [Row("pair", "tower", 0), Row("pair", "teacher", 0)]
_MAIN = ("w2g128", "bf16", "w4g128")
_ABLATED = (
    "grace-kl", "grace-norelation", "grace-nogate", "grace-frozen", "relation", "grace-beta1.0", "grace-beta0.3",
    "grace-scales", "grace-relation10", "grace-k2", "grace-k5", "grace-beta2.0", "grace-beta0.1", "kl-w3", "kl-w10",
    "grace-calibration",
    "grace-steps0.4", "kl-steps0.4", "ce-steps0.4", "grace-rows4096", "kl-rows4096", "ce-rows4096", "grace-max4",
    "grace-beta4.0", "grace-rows1024", "grace-steps0.1",
)  # fmt: skip
_SIZED = (
    *((s, "grace") for s in ("w2g32", "w2row", "w8g128")), *(("w3row", m) for m in ("grace", "kl", "ce")),
    ("w2row", "grace-frozen"), ("w2g64", "grace"),
)  # fmt: skip


def group_of_rows(name: str, size: Size) -> list[Row]:
    """The rows that a word stands for ("main", "post", "ablation", "subset"), or the one row of that name."""
    seeds = range(size.seeds)
    if name == "main":
        pair = [*_PAIR, *(Row("pair", "student", seed) for seed in seeds)]
        trained = [Row(s, m, seed) for s in _MAIN for seed in seeds for m in ("grace", "kl", "ce")]
        return [*pair, *trained]
    if name == "post":
        two = range(min(2, size.seeds))
        rounded = [Row(s, "rtn", seed) for s in ("w3g128", "w3row", "w4row", "w2row", "w8g128") for seed in two]
        return [*(Row(s, m, seed) for m in (*POST, *AFTER) for s in ("w4g128", "w2g128") for seed in seeds), *rounded]
    if name == "ablation":
        two = range(min(2, size.seeds))
        return [
            *(Row("w2g128", m, seed) for m in _ABLATED for seed in two),
            *(Row(s, m, seed) for s, m in _SIZED for seed in two),
        ]
    if name == "subset":
        rows = [Row(s, m, 0) for s in ("bf16", "w2g128") for m in ("ce", "kl", "grace")]
        student = Row("pair", "student", 0)
        return [*_PAIR, student, *rows, Row("w4g128", "rtn", 0), Row("w2g128", "rtn", 0), Row("w2g128", "gptq", 0)]
    return [Row.parse(name)]
