"""Weight of distillation: a constant, or the paper's Lagrange multiplier (arXiv 2601.22709, adaptive controller).

``minimise L_CE subject to L_GDKD <= tau`` by projected dual ascent, once per optimizer step, on the rank-averaged value:

    ema  <- d * ema + (1 - d) * L_GDKD                        d = ema_decay; ema starts at the first value
    beta <- clip(beta + eta * (ema - tau), beta_min, beta_max)

Without a tau there is no constraint, and beta keeps its start value. That is the recipe's default: in no single setting of the
accuracy study was a rule that moves beta significantly better (``benchmarks/results/controller_rules/table.md``).
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


@dataclass(frozen=True)
class ControllerSettings:
    """Constants of the update; the defaults with a tau are those of the authors' published training script.

    Args:
        beta_start: weight of L_GDKD in the first step, and in every step where `tau` is None.
        beta_min, beta_max: bounds of beta, used with a tau alone.
        ema_decay: d, in [0, 1).
        tau: bound of L_GDKD, nats; None for a constant weight.
        eta: change of beta per step and nat of violation.

    Raises:
        ValueError: bounds out of order, or a number outside its range.
    """

    beta_start: float = 0.5
    beta_min: float = 0.1
    beta_max: float = 1.0
    ema_decay: float = 0.99
    tau: float | None = None
    eta: float = 0.003

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 <= self.beta_min <= self.beta_start <= self.beta_max:
            raise ValueError(
                f"beta_start ({self.beta_start}) must lie in [beta_min, beta_max] = [{self.beta_min}, {self.beta_max}] "
                "with beta_min >= 0"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}; the default is 0.99")
        for name in ("beta_start", "tau", "eta"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number that is not negative, got {value!r}")


@dataclass(frozen=True)
class ControllerState:
    """State between two optimizer steps; ``to_dict`` and ``from_dict`` restore it exactly, through JSON too."""

    settings: ControllerSettings
    beta: float  # weight of L_GDKD in the next step
    step: int = 0  # calls of `update` with a finite value
    ignored: int = 0  # calls with a value that was not finite
    ema: float | None = None  # smoothed L_GDKD, nats; None before the first value
    steps_at_bound: int = 0  # steps after which beta was at one of its bounds

    def to_dict(self) -> dict[str, Any]:
        """Return numbers and nested dicts only: what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "ControllerState":
        """Return the state that ``to_dict`` was called on.

        Raises:
            ValueError: a key is missing or unknown, because another version wrote it.
        """
        odd = sorted({entry.name for entry in fields(cls)}.symmetric_difference(saved))
        if odd:
            raise ValueError(f"controller state: {odd} missing or unknown; resume with the version that wrote it")
        return cls(**{**saved, "settings": ControllerSettings(**saved["settings"])})

    @property
    def share_at_bound(self) -> float:
        """Share of the steps after which beta was at a bound; 0 before the first step."""
        return self.steps_at_bound / self.step if self.step else 0.0


def start(settings: ControllerSettings) -> ControllerState:
    """Return the state before the first optimizer step."""
    return ControllerState(settings, settings.beta_start)


def update(state: ControllerState, value: float) -> ControllerState:
    """Return the state after one optimizer step.

    Args:
        state: before the step.
        value: L_GDKD of the step's whole batch in nats, the same number on every rank. One that is not finite (no supervised
            token) is counted and changes nothing.
    """
    if not math.isfinite(value):
        return replace(state, ignored=state.ignored + 1)
    asked, decay = state.settings, state.settings.ema_decay
    ema = value if state.ema is None else decay * state.ema + (1 - decay) * value
    state = replace(state, step=state.step + 1, ema=ema)
    if asked.tau is None:
        return state
    beta = min(asked.beta_max, max(asked.beta_min, state.beta + asked.eta * (ema - asked.tau)))
    at_bound = beta in (asked.beta_min, asked.beta_max)
    return replace(state, beta=beta, steps_at_bound=state.steps_at_bound + at_bound)


def warm_up(step: int, total_steps: int, steps: int = 400, share: float = 0.05) -> float:
    """Return the factor in (0, 1] of omega at 0-based optimizer step ``step``: linear, 1 after min(steps, share * total_steps).

    The first step already has a positive factor; ``steps=0`` or ``share=0`` switches the warm-up off.
    """
    length = min(float(steps), share * total_steps)
    return min(1.0, (step + 1) / length) if length > 0 else 1.0
