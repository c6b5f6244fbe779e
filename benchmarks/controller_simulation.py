"""How often each way of setting tau leaves the controller at a bound, over simulated students that react to beta.

A real run gives one curve of L_GDKD; whether a rule for tau is hopeless, slack or neither can only be judged over many.
A simulated student's loss falls along its learning-rate schedule, faster with more beta, and is observed through
log-normal batch noise. Its curves:

    exponential   log L falls evenly with the learning rate spent
    power         L ~ (1 + c u)^-1/2
    floor         a fast fall to a floor that beta moves
    late          nothing, then a sudden fall a third into the run

each falling 3, 8 and 20 times, with three strengths of reaction ((beta / 0.5)^gamma on the rate, gamma 0.15, 0.4, 0.8),
two noise levels, three schedules and four lengths of run. Rules compared: tau a constant share of the probe's mean; tau
a trajectory fixed by the probe; the automatic reference without and with elasticity (the library's default).

    python benchmarks/controller_simulation.py            all of it, about 2 minutes on one core
    python benchmarks/controller_simulation.py --quick    runs of 100 and 400 steps

Writes benchmarks/results/controller_simulation.json and prints the table.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from grace_plugin.controller import ControllerSettings, ControllerState, share_at_bound, start, update

KINDS = ("exponential", "power", "floor", "late")
FALLS = (3.0, 8.0, 20.0)
REACTIONS = (0.15, 0.4, 0.8)
NOISES = (0.1, 0.35)
SCHEDULES = ("constant", "cosine", "linear")
LENGTHS = (100, 400, 2000, 20_000)
START = 2.0  # nats
RESULT = Path(__file__).parent / "results" / "controller_simulation.json"


def fractions(schedule: str, steps: int) -> list[float]:
    """Learning rate of each step divided by its peak; 3 % linear warm-up for the falling schedules."""
    t = np.arange(steps)
    if schedule == "constant":
        return [1.0] * steps
    warm = np.minimum(1.0, (t + 1) / max(1.0, 0.03 * steps))
    shape = 0.5 * (1 + np.cos(np.pi * t / steps)) if schedule == "cosine" else 1 - t / steps
    return (warm * shape).tolist()


class Student:
    """L_GDKD of a student whose rate of learning follows beta."""

    def __init__(self, kind: str, fall: float, reaction: float, whole: float) -> None:
        self.kind, self.fall, self.reaction, self.whole = kind, fall, reaction, whole
        self.level, self.spent = START, 0.0

    def learn(self, beta: float, fraction: float) -> None:
        """One step at a learning-rate fraction."""
        reaction = (beta / 0.5) ** self.reaction
        spent = fraction * reaction / self.whole
        if self.kind == "exponential":
            self.level *= math.exp(-math.log(self.fall) * spent)
        elif self.kind == "power":
            self.level = START * ((START / self.level) ** 2 + (self.fall**2 - 1) * spent) ** -0.5
        elif self.kind == "floor":
            floor = START / self.fall * (0.5 / beta) ** (0.5 * self.reaction)
            self.level -= (self.level - floor) * -math.expm1(-8 * spent)
        else:
            self.spent += spent
            self.level = START * math.exp(-math.log(self.fall) / (1 + math.exp(-12 * (self.spent - 0.35))))


def constant(share: float) -> Callable[[ControllerState], ControllerState]:
    """tau = share * mean of the probe."""

    def rule(state: ControllerState) -> ControllerState:
        if state.probe_mean is None or state.settings.tau != "auto":
            return state
        return replace(state, settings=replace(state.settings, tau=share * state.probe_mean))

    return rule


def trajectory(end: float) -> Callable[[ControllerState], ControllerState]:
    """tau falls from the probe's mean to ``end`` of it, evenly in the logarithm, through the same EMA."""

    def rule(state: ControllerState) -> ControllerState:
        if state.probe_mean is None:
            return state
        reference = state.reference if state.reference is not None else state.probe_mean
        target = state.probe_mean * end ** min(1.0, state.counted / state.total_steps)
        decay = state.settings.ema_decay
        smoothed = decay * reference + (1 - decay) * target
        return replace(state, reference=smoothed, settings=replace(state.settings, tau=smoothed))

    return rule


def as_is(state: ControllerState) -> ControllerState:
    """The library's own rule."""
    return state


RULES: dict[str, tuple[ControllerSettings, Callable[[ControllerState], ControllerState]]] = {
    **{f"constant share {s}": (ControllerSettings(), constant(s)) for s in (0.7, 0.5, 0.3)},
    **{f"fixed trajectory to {e}": (ControllerSettings(), trajectory(e)) for e in (0.3, 0.1)},
    "reference, rigid": (ControllerSettings(elasticity=0.0), as_is),
    "reference, elastic (default)": (ControllerSettings(), as_is),
}


def simulate(
    rule: str, kind: str, fall: float, reaction: float, noise: float, schedule: str, steps: int, seed: int
) -> dict[str, float]:
    """One run: share of controlled steps at a bound, range of beta, tracking error."""
    settings, adjust = RULES[rule]
    rates = fractions(schedule, steps)
    student = Student(kind, fall, reaction, sum(rates))
    z = np.random.default_rng(seed).standard_normal(steps).tolist()
    state, betas, errors = start(settings, steps), [], []
    for i in range(steps):
        value = student.level * math.exp(noise * z[i] - noise * noise / 2)
        state = adjust(update(state, value, rates[i]))
        student.learn(state.beta, rates[i])
        if state.tau and state.ema is not None:
            betas.append(state.beta)
            errors.append(abs(state.ema - state.tau) / state.tau)
    return {"at_bound": share_at_bound(state), "beta_range": max(betas) - min(betas), "error": statistics.mean(errors)}


def evaluate(rule: str, lengths: tuple[int, ...]) -> dict[str, object]:
    """Every student under one rule."""
    runs, by_length = [], {}
    for steps in lengths:
        grid = itertools.product(KINDS, FALLS, REACTIONS, NOISES[:1] if steps > 10_000 else NOISES, SCHEDULES)
        found = [simulate(rule, *case, steps=steps, seed=i) for i, case in enumerate(grid)]
        by_length[str(steps)] = statistics.mean(run["at_bound"] for run in found)
        runs += found
    shares = sorted(run["at_bound"] for run in runs)
    return {
        "runs": len(runs),
        "at_bound_mean": statistics.mean(shares),
        "at_bound_p90": shares[int(0.9 * len(shares))],
        "runs_over_20_percent": sum(share > 0.2 for share in shares) / len(shares),
        "beta_range_mean": statistics.mean(run["beta_range"] for run in runs),
        "error_mean": statistics.mean(run["error"] for run in runs),
        "at_bound_by_length": by_length,
    }


def main() -> None:
    """Run every rule, print the table, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="only runs of 100 and 400 steps, nothing written")
    quick = parser.parse_args().quick
    lengths = LENGTHS[:2] if quick else LENGTHS
    results = {}
    print(f"{'rule':32}{'at a bound':>11}{'p90':>7}{'runs>20%':>10}{'beta range':>12}{'|ema-tau|/tau':>15}")
    for rule in RULES:
        found = results[rule] = evaluate(rule, lengths)
        print(
            f"{rule:32}{found['at_bound_mean']:11.1%}{found['at_bound_p90']:7.1%}{found['runs_over_20_percent']:10.1%}"
            f"{found['beta_range_mean']:12.2f}{found['error_mean']:15.1%}", flush=True,
        )  # fmt: skip
    if not quick:
        environment = {"python": platform.python_version(), "numpy": np.__version__, "machine": platform.machine()}
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(
            json.dumps({"environment": environment, "lengths": lengths, "rules": results}, indent=1) + "\n"
        )
        print(f"written: {RESULT}")


if __name__ == "__main__":
    main()
