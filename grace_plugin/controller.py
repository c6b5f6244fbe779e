"""The weight of distillation as a Lagrange multiplier, once per optimizer step (arXiv 2601.22709, adaptive controller).

What it does. ``minimise L_CE subject to L_GDKD <= tau`` by projected dual ascent on the rank-averaged value:

    ema  <- d * ema + (1 - d) * L_GDKD                        d = 0.99, started at the first value
    beta <- clip(beta + eta * (ema - tau), beta_min, beta_max)

A tau or eta given as a number is used as given. ``auto`` is needed because L_GDKD falls several-fold over a run: a tau
that does not fall with it leaves beta at a bound for most steps, and then nothing is controlled (simulated students in
``benchmarks/controller_simulation.py``: a constant share of the start, or a trajectory fixed beforehand). With ``auto``:

1. Probe: during the first P = clip(5 % of the run, 5, 100) counted steps beta rests at beta_start; their mean is the
   first anchor m, at the travelled learning rate u (sum of lr / peak lr) = its geometric mean over the probe. A step at
   u = 0 (the first of a linear warm-up) moved nothing and has no log u: it enters the EMA and is not counted.
2. Reference: L_GDKD should go on falling as it has fallen, by the power of u seen last:
   target = m * (u / u_m)^(-a). A new anchor (m, u_m, a) is taken from each segment of steps; segments grow by half of
   what has been travelled up to 5 % of the run. a is the log-log slope between two segments, kept in [0, 2]; the target
   never rises. The target passes through the same EMA as the value, so that the lag of the EMA stands on both sides.
3. Elastic constraint: tau = reference * (1 + w * h * (2 * position - 1)), position = (beta - beta_min) / (beta_max -
   beta_min): a dear constraint (high beta) is relaxed by up to w = 20 %, a cheap one tightened. Relaxation in
   proportion to the multiplier keeps the ascent stable and beta away from its bounds.
4. eta = (beta_max - beta_min) / (0.1 * total_steps * 0.1 * reference * h): a full swing of beta takes a tenth of the
   run at a violation of 10 %. h = 1 - d^max(steps since the probe, 0.1 * total_steps) is the part of a deviation that
   the EMA can have followed; it matters in runs shorter than the EMA's memory.

What it refuses. Bounds out of order, negative rates, a saved state of another shape. A value that is not finite changes
nothing and is counted. It costs a few float operations per step, no tensor and no synchronisation of its own.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

LARGEST_SLOPE = 2.0  # steepest power of the travelled learning rate that is extrapolated
SEGMENT_GROWTH = 1.5  # a segment ends when the steps have grown by half since its start ...
SEGMENT_SHARE = 0.05  # ... or after this share of the run
SMALLEST_LEVEL = 1e-9  # nats below which a loss is not divided by


@dataclass(frozen=True)
class ControllerSettings:
    """What may be asked of the controller; every default is the method's."""

    beta_min: float = 0.1
    beta_max: float = 1.0
    beta_start: float = 0.5  # until the probe has ended
    ema_decay: float = 0.99  # d
    tau: float | Literal["auto"] = "auto"  # nats
    eta: float | Literal["auto"] = "auto"  # beta per nat and step
    probe_share: float = 0.05  # of the run, but at least probe_least and at most probe_most steps
    probe_least: int = 5
    probe_most: int = 100
    elasticity: float = 0.2  # w
    swing_share: float = 0.1  # of the run, in which an automatic eta lets beta cross its range ...
    swing_violation: float = 0.1  # ... at this relative violation

    def __post_init__(self) -> None:
        if not 0 <= self.beta_min <= self.beta_start <= self.beta_max:
            raise ValueError(
                f"beta_start ({self.beta_start}) must lie in [beta_min, beta_max] = [{self.beta_min}, {self.beta_max}] "
                "with beta_min >= 0"
            )
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}; the default is 0.99")
        for name in ("tau", "eta"):
            value = getattr(self, name)
            if value != "auto" and not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be 'auto' or a finite number that is not negative, got {value!r}")

    def probe_steps(self, total_steps: int) -> int:
        """P: counted steps before beta moves; 0 when neither tau nor eta is automatic."""
        if "auto" not in (self.tau, self.eta):
            return 0
        return min(self.probe_most, max(self.probe_least, int(self.probe_share * total_steps)))


@dataclass(frozen=True)
class Segment:
    """Running sums over the steps since the last anchor: of L_GDKD and of log u."""

    started: int = 0  # counted steps when it began
    values: float = 0.0
    log_travelled: float = 0.0
    count: int = 0

    def add(self, value: float, travelled: float) -> "Segment":
        """One more step, travelled > 0."""
        return Segment(self.started, self.values + value, self.log_travelled + math.log(travelled), self.count + 1)

    @property
    def mean(self) -> float:
        """Mean loss, kept positive."""
        return max(self.values / self.count, SMALLEST_LEVEL)

    @property
    def place(self) -> float:
        """Mean of log u."""
        return self.log_travelled / self.count


@dataclass(frozen=True)
class ControllerState:
    """All that the controller knows; ``to_dict`` and ``from_dict`` restore it exactly, also through JSON."""

    settings: ControllerSettings
    total_steps: int
    beta: float  # weight of L_GDKD in the next step
    step: int = 0  # calls of update, ignored values included
    ignored: int = 0  # values that were not finite
    counted: int = 0  # values that were used, for an automatic tau or eta once u > 0; the first P of them are the probe
    ema: float | None = None  # smoothed L_GDKD, nats; None before the first value
    tau: float | None = None  # nats, as used in the last step; None during the probe
    eta: float | None = None  # as used in the last step; None during the probe
    probe_mean: float | None = None  # nats; None before the end of the probe
    reference: float | None = None  # smoothed target, nats; None before the end of the probe
    target: float = 0.0  # nats
    anchor: float = 0.0  # m, nats
    anchor_place: float = 0.0  # log u_m
    slope: float = 0.0  # a
    travelled: float = 0.0  # u
    steps_at_bound: int = 0  # controlled steps after which beta stood at a bound
    segment: Segment = field(default_factory=Segment)

    @property
    def controlled(self) -> int:
        """Steps in which beta could move."""
        return max(0, self.counted - self.settings.probe_steps(self.total_steps))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings and nested dicts only: what JSON can carry."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any]) -> "ControllerState":
        """The state that ``to_dict`` was called on; ValueError names a key that is missing or unknown."""
        odd = sorted({entry.name for entry in fields(cls)}.symmetric_difference(saved))
        if odd:
            raise ValueError(f"controller state: {odd} missing or unknown; resume with the version that wrote it")
        parts = {**saved, "settings": ControllerSettings(**saved["settings"]), "segment": Segment(**saved["segment"])}
        return cls(**parts)


def start(settings: ControllerSettings, total_steps: int) -> ControllerState:
    """State before the first of ``total_steps`` optimizer steps; ValueError when there is none to take."""
    if total_steps < 1:
        raise ValueError(f"total_steps must be at least 1, got {total_steps}")
    return ControllerState(settings, total_steps, settings.beta_start)


def update(state: ControllerState, value: float, lr_fraction: float = 1.0) -> ControllerState:
    """State after one optimizer step.

    Args:
        state: before the step.
        value: L_GDKD of the step's whole batch in nats, the same number on every rank; NaN without a supervised token.
        lr_fraction: learning rate of the step divided by the schedule's peak, >= 0.

    Returns:
        A new state; ``state.beta`` is the weight for the next step, always in [beta_min, beta_max].
    """
    if not math.isfinite(value):
        return replace(state, step=state.step + 1, ignored=state.ignored + 1)
    decay = state.settings.ema_decay
    travelled = state.travelled + lr_fraction
    state = replace(
        state,
        step=state.step + 1,
        travelled=travelled,
        ema=value if state.ema is None else decay * state.ema + (1 - decay) * value,
    )
    probe = state.settings.probe_steps(state.total_steps)
    if probe == 0:
        return _ascend(replace(state, counted=state.counted + 1))
    if travelled == 0:
        return state
    state = replace(state, counted=state.counted + 1, segment=state.segment.add(value, travelled))
    if state.counted < probe:
        return state
    if state.counted == probe:
        return _end_probe(state)
    return _ascend(_follow(state) if state.settings.tau == "auto" else state)


def _end_probe(state: ControllerState) -> ControllerState:
    mean, place = state.segment.mean, state.segment.place
    return replace(
        state, probe_mean=mean, anchor=mean, anchor_place=place, target=mean, reference=state.ema,
        segment=Segment(started=state.counted),
    )  # fmt: skip


def _follow(state: ControllerState) -> ControllerState:
    """Move the anchor when its segment is over, then the target and its smoothed form."""
    assert state.reference is not None
    reference, segment = state.reference, state.segment
    end = min(SEGMENT_GROWTH * segment.started, segment.started + SEGMENT_SHARE * state.total_steps)
    if state.counted >= end:
        distance = max(segment.place - state.anchor_place, 1e-3)
        slope = min(LARGEST_SLOPE, max(0.0, math.log(state.anchor / segment.mean) / distance))
        state = replace(
            state, anchor=segment.mean, anchor_place=segment.place, slope=slope, segment=Segment(started=state.counted)
        )
    ahead = math.log(state.travelled) - state.anchor_place
    target = min(state.target, state.anchor * math.exp(-state.slope * ahead))
    decay = state.settings.ema_decay
    return replace(state, target=target, reference=decay * reference + (1 - decay) * target)


def _ascend(state: ControllerState) -> ControllerState:
    """One step of dual ascent; automatic tau and eta are written into the state as used."""
    assert state.ema is not None
    settings = state.settings
    width = settings.beta_max - settings.beta_min
    horizon = settings.swing_share * state.total_steps
    followed = 1 - settings.ema_decay ** max(float(state.controlled), horizon)
    if settings.tau == "auto":
        assert state.reference is not None
        level = state.reference
        position = (state.beta - settings.beta_min) / width if width > 0 else 0.5
        tau = level * (1 + settings.elasticity * followed * (2 * position - 1))
    else:
        tau = settings.tau
        level = max(tau, state.probe_mean or 0.0)
    if settings.eta == "auto":
        eta = width / (horizon * settings.swing_violation * max(level, SMALLEST_LEVEL) * followed)
    else:
        eta = settings.eta
    beta = min(settings.beta_max, max(settings.beta_min, state.beta + eta * (state.ema - tau)))
    at_bound = beta in (settings.beta_min, settings.beta_max)
    return replace(state, beta=beta, tau=tau, eta=eta, steps_at_bound=state.steps_at_bound + at_bound)


def share_at_bound(state: ControllerState) -> float:
    """Share of the controlled steps after which beta stood at a bound; 0 before the first of them."""
    return state.steps_at_bound / state.controlled if state.controlled else 0.0


def is_pinned(state: ControllerState) -> bool:
    """Whether to warn that the controller is off: a quarter of its steps (a tenth of the run or more) at a bound."""
    return state.controlled >= 0.1 * state.total_steps and share_at_bound(state) > 0.25


def warm_up(step: int, total_steps: int, steps: int = 400, share: float = 0.05) -> float:
    """Linear factor in (0, 1] of omega at 0-based optimizer step ``step``: 1 after min(steps, share * total_steps).

    The first step already has a positive factor; ``steps=0`` or ``share=0`` switches the warm-up off.
    """
    length = min(float(steps), share * total_steps)
    return min(1.0, (step + 1) / length) if length > 0 else 1.0
