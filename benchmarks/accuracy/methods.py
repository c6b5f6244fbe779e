"""Define the methods that are compared: what each changes in GRACE's recipe, and its search.

Every trained method of a data set has the same search: learning rates at the weight its recipe has by default, then, for those
that have a term with a weight, other weights at the best rate; seed 0, validation questions. Scenes have six rates and three
weights, captions four rates and two weights (`Size.rates`, `Size.weights`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.accuracy.rules import RULES, Rule
from grace_plugin.recipe import ControllerRecipe, DistillRecipe, RelationalRecipe

__all__ = ["AFTER", "METHODS", "OFF", "POST", "Method"]

POST = ("rtn", "gptq", "awq", "autoround")
#: BF16 students trained first and rounded after, the way to a quantized student without quantization-aware training
AFTER = tuple(f"{base}+{post}" for base in ("kl", "grace") for post in ("rtn", "gptq"))
OFF: dict[str, Any] = {"enabled": False}


@dataclass(frozen=True)
class Method:
    """A trained method: the blocks of its recipe, and what is not in a recipe.

    plain: KL in place of the decoupled divergence. quantizer: whose fake quantization, "grace", "torchao" or "modelopt".
    scale_rate: of the scales relative to the weights'; 0 leaves them at their start. start: "search" (least squared error),
    "minmax", or weights and scales of a post-training method ("gptq", "awq").
    float_scales: scales are rounded to what is stored at the end alone. masked: a clipped weight has no gradient. mixed: the
    measure by which layers get more or fewer bits, see `formats`.
    teacher: whose states are read. layers: (student's, teacher's) that are related, instead of the penultimate ones; kinds: of
    tokens that are, see `relation`.
    scales_alone: weights are not trained. steps: share of the study's steps. samples: of the training set, from its start;
    None is all. searched: the method whose search gives rate and weight. weights: of the relation (of KL where there is
    none), searched next to the default. tuned: take the weight that was found, else the default. rule: a candidate for
    beta in the controller's place.
    """

    distill: dict[str, Any] = field(default_factory=dict)
    relational: dict[str, Any] = field(default_factory=dict)
    controller: dict[str, Any] = field(default_factory=dict)
    plain: bool = False
    quantizer: str = "grace"
    scale_rate: float = 10.0
    start: str = "search"
    float_scales: bool = False
    masked: bool = True
    mixed: str = ""
    teacher: str = "teacher"
    layers: tuple[tuple[int, int], ...] = ()
    kinds: tuple[str, ...] = ("visual",)
    scales_alone: bool = False
    steps: float = 1.0
    samples: int | None = None
    searched: str = ""
    weights: tuple[float, ...] = ()
    tuned: bool = True
    rule: Rule | None = None

    @property
    def weight(self) -> float | None:
        """Return the weight it trains with: of its relation, or of its KL where it has none; None without either."""
        if self.relational != OFF:
            return float(RelationalRecipe(**self.relational).weight)
        return float(self.controller["beta_start"]) if self.searched in _OF_KL else None

    @property
    def taught(self) -> bool:
        """Whether it reads the teacher."""
        return self.distill != OFF or self.relational != OFF

    def weighed(self, weight: float | None) -> Method:
        """The method with another weight of its relation, or of its KL where it has no relation; None leaves it."""
        if weight is None or not self.tuned:
            return self
        if self.relational != OFF:
            return replace(self, relational={**self.relational, "weight": weight})
        return replace(self, controller=_fixed(weight)) if self.searched in _OF_KL else self

    def blocks(self) -> tuple[DistillRecipe, RelationalRecipe, ControllerRecipe]:
        """The recipe's blocks."""
        return DistillRecipe(**self.distill), RelationalRecipe(**self.relational), ControllerRecipe(**self.controller)


def _fixed(beta: float) -> dict[str, Any]:
    return {"beta_start": beta}


_FIXED = (0.1, 0.25, 0.3, 0.5, 0.55, 1.0, 2.0, 4.0)
#: the two settings of the authors' published code: its script for a 2B student, and its controller's own defaults
_PUBLISHED: tuple[dict[str, Any], ...] = (
    {"enabled": True, "tau": 3.0, "eta": 0.003, "beta_start": 0.5, "beta_min": 0.1, "beta_max": 1.0},
    {"enabled": True, "tau": 0.35, "eta": 0.0015, "beta_start": 1.0, "beta_min": 0.1, "beta_max": 5.0},
)
_OF_KL, _KL_WEIGHTS, _RELATION_WEIGHTS = ("kl", "modelopt"), (0.3, 3.0, 10.0), (1.0, 10.0, 30.0)
_CE = Method(OFF, OFF, OFF, searched="ce")
_KL = Method({"gate_sharpness": 0.0}, OFF, _fixed(1.0), plain=True, searched="kl", weights=_KL_WEIGHTS)
_GRACE = Method(searched="grace", weights=_RELATION_WEIGHTS)

METHODS: dict[str, Method] = {
    "ce": _CE,  # fine-tuning in bf16, QAT alone in the others
    "kl": _KL,
    "grace": _GRACE,
    "torchao": replace(_CE, quantizer="torchao", searched="torchao"),
    "modelopt": replace(_KL, quantizer="modelopt", searched="modelopt"),
    "grace-calibration": replace(
        _GRACE, steps=0.1, samples=512, searched="grace-calibration"
    ),  # what `oneshot` is given
    "grace-default": replace(_GRACE, tuned=False),
    "grace-nogate": replace(_GRACE, distill={"gate_sharpness": 0.0}),
    "grace-k2": replace(_GRACE, distill={"gate_sharpness": 2.0}),
    "grace-k5": replace(_GRACE, distill={"gate_sharpness": 5.0}),
    "grace-k10": replace(_GRACE, distill={"gate_sharpness": 10.0}),
    "grace-kl": replace(_GRACE, plain=True),
    "grace-norelation": replace(_GRACE, relational=OFF),
    "relation": replace(_GRACE, distill=OFF),
    **{f"{name}-frozen": replace(method, scale_rate=0.0) for name, method in (("grace", _GRACE), ("kl", _KL))},
    **{f"grace-scalerate{times:g}": replace(_GRACE, scale_rate=times) for times in (1.0, 3.0)},
    "kl-scalerate1": replace(_KL, scale_rate=1.0),
    "grace-minmax": replace(_GRACE, start="minmax"),
    **{f"grace-{start}": replace(_GRACE, start=start) for start in ("gptq", "awq")},
    "grace-unmasked": replace(_GRACE, masked=False),
    "grace-floatscales": replace(_GRACE, float_scales=True),
    **{f"grace-mixed-{how}": replace(_GRACE, mixed=how) for how in ("damage", "error", "reverse")},
    **{
        f"{name}-{teacher}": replace(method, teacher=teacher)
        for name, method in (("grace", _GRACE), ("kl", _KL))
        for teacher in ("teacher-small", "teacher-large")
    },
    "grace-layer-last": replace(_GRACE, layers=((3, 7),)),
    "grace-layers2": replace(_GRACE, layers=((1, 3), (2, 6))),
    "grace-layers3": replace(_GRACE, layers=((0, 1), (1, 3), (2, 6))),
    "grace-text": replace(_GRACE, layers=((2, 6),), kinds=("visual", "text")),
    "grace-text-alone": replace(_GRACE, layers=((2, 6),), kinds=("text",)),
    **{f"grace-beta{beta}": replace(_GRACE, controller=_fixed(beta)) for beta in _FIXED},
    **{f"grace-default-beta{beta}": replace(_GRACE, controller=_fixed(beta), tuned=False) for beta in _FIXED},
    **{f"grace-{name}": replace(_GRACE, rule=rule) for name, rule in RULES.items()},
    **{f"grace-default-{name}": replace(_GRACE, rule=rule, tuned=False) for name, rule in RULES.items()},
    **{f"grace-paper{numbers['tau']:g}": replace(_GRACE, controller=numbers) for numbers in _PUBLISHED},
    **{
        f"grace-default-paper{numbers['tau']:g}": replace(_GRACE, controller=numbers, tuned=False)
        for numbers in _PUBLISHED
    },
    "grace-scales": replace(_GRACE, scales_alone=True),
    **{f"grace-steps{share:g}": replace(_GRACE, steps=share) for share in (0.1, 0.4)},
    "kl-steps0.4": replace(_KL, steps=0.4),
    "ce-steps0.4": replace(_CE, steps=0.4),
    **{f"grace-rows{rows}": replace(_GRACE, samples=rows) for rows in (1024, 4096)},
    "kl-rows4096": replace(_KL, samples=4096),
    "ce-rows4096": replace(_CE, samples=4096),
}
