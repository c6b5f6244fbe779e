"""Candidate rules for the weight of distillation (beta), compared on the study's data before one becomes the default.

A rule is a pure function of its state and one measurement per optimizer step; none is searched per data set. Each has one
constant, whose sensitivity is measured at half and twice its value:

    schedule   tau = share * probe mean * learning-rate share; beta follows the relative violation of L_GDKD <= tau
    rounding   tau = GDKD of the quantized student minus GDKD of its unquantized weights, measured again every EVERY steps
    gradients  beta holds |beta * dGDKD/dh| = ratio * |dCE/dh| at the supervised hidden states h
    losses     beta holds beta * L_GDKD = ratio * L_CE (the values in the place of the gradients)

Fixed weights, the published numbers and today's controller need no rule of their own: they are recipes (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from grace_plugin.losses import distillation_head
from grace_plugin.objective import GraceObjective
from grace_plugin.teacher import model_inputs
from grace_plugin.vlm import capture

__all__ = ["RULES", "Rule", "RuleObjective", "RuleState", "advance"]

BETA_MIN, BETA_MAX, BETA_START = 0.1, 4.0, 0.5
SWING_SHARE = 0.1  # of the run, in which a violation of 100 % moves beta from one bound to the other
EMA_DECAY = 0.95
EVERY = 20  # steps between two measurements of what rounding costs


@dataclass(frozen=True)
class Rule:
    """kind: a key of the module's list. constant: the share of the probe's mean, or the ratio; unused by "rounding"."""

    kind: str
    constant: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """One optimizer step. ce, gdkd: nats. progress: learning rate over its peak. gradients: norms of CE and GDKD.

    rounding: GDKD of the quantized student minus that of its unquantized weights, nats; None where it was not measured.
    """

    ce: float
    gdkd: float
    progress: float
    gradients: tuple[float, float] | None = None
    rounding: float | None = None


@dataclass(frozen=True)
class RuleState:
    """What a rule knows between two steps; JSON numbers only, so that a run resumes."""

    rule: Rule
    total_steps: int
    beta: float = BETA_START
    step: int = 0
    ema: float | None = None  # smoothed GDKD, nats
    probe_sum: float = 0.0
    tau: float | None = None
    ratio: float | None = None  # smoothed logarithm-free ratio of the two gradients or losses
    violated: int = 0  # steps in which the constraint did not hold

    @property
    def probe(self) -> int:
        """Steps before a schedule's tau is known."""
        return min(100, max(5, self.total_steps // 20))


def _clip(beta: float) -> float:
    return min(BETA_MAX, max(BETA_MIN, beta))


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else EMA_DECAY * old + (1 - EMA_DECAY) * new


def _ascend(state: RuleState, tau: float) -> RuleState:
    """Dual ascent on the relative violation, which is bounded: a tau that nears 0 must not make one step a full swing."""
    assert state.ema is not None
    violation = min(1.0, max(-1.0, state.ema / max(tau, 1e-9) - 1.0))
    rate = (BETA_MAX - BETA_MIN) / (SWING_SHARE * state.total_steps)
    return replace(state, tau=tau, beta=_clip(state.beta + rate * violation), violated=state.violated + (violation > 0))


def advance(state: RuleState, seen: Measurement) -> RuleState:
    """State after one optimizer step; `state.beta` is the weight of the next one."""
    state = replace(state, step=state.step + 1, ema=_smooth(state.ema, seen.gdkd))
    kind, constant = state.rule.kind, state.rule.constant
    if kind == "schedule":
        if state.step <= state.probe:
            return replace(state, probe_sum=state.probe_sum + seen.gdkd)
        return _ascend(state, constant * state.probe_sum / state.probe * seen.progress)
    if kind == "rounding":
        if seen.rounding is not None:
            state = replace(state, tau=_smooth(state.tau, max(seen.rounding, 0.0)))
        return state if state.tau is None else _ascend(state, state.tau)
    if kind == "gradients":
        assert seen.gradients is not None
        now = seen.gradients[0] / max(seen.gradients[1], 1e-12)
    else:
        now = seen.ce / max(seen.gdkd, 1e-12)
    ratio = _smooth(state.ratio, now)
    return replace(state, ratio=ratio, beta=_clip(constant * ratio))


@contextmanager
def unquantized(attached: Any) -> Iterator[None]:
    """Inside it, quantized layers multiply by their unquantized weights."""
    layers = [layer for one in attached for layer in one.linears.values()]
    saved = [layer.__dict__.pop("forward") for layer in layers]
    try:
        yield
    finally:
        for layer, forward in zip(layers, saved, strict=True):
            layer.forward = forward


class RuleObjective(GraceObjective):
    """GraceObjective whose beta is a rule's."""

    rule: Rule
    progress = 1.0  # learning rate of the step over its peak, set by the loop

    @property
    def beta(self) -> float:
        return self.state.beta

    def prepare(self, *args: Any, **kwargs: Any) -> None:
        super().prepare(*args, **kwargs)
        self.state = RuleState(self.rule, self.total_steps)
        self._gradients: tuple[float, float] | None = None
        self._rounding: float | None = None

    def compute_loss(self, model: Callable[..., Any], batch: Mapping[str, Any]) -> Tensor:
        assert self._window is not None
        item, window = self._window.pending[0], self._window
        text_model = self.context.family.text_model(self.student)
        with capture(text_model) as caught:
            loss = super().compute_loss(model, batch)
        assert caught.final is not None
        hidden = caught.final.flatten(0, 1).index_select(0, item.positions).detach()
        if self.rule.kind == "gradients":
            norms = [self._head(window, item, hidden, *scales)[1] for scales in ((1.0, 0.0), (0.0, 1.0))]
            self._gradients = (norms[0], norms[1])
        if self.rule.kind == "rounding" and self.attached and self.steps % EVERY == 0:
            quantized = self._head(window, item, hidden, 0.0, 1.0)[0]
            with torch.no_grad(), unquantized(self.attached), capture(text_model) as plain:
                model(**model_inputs(batch, self.student, item.host), use_cache=False, logits_to_keep=1)
            assert plain.final is not None
            exact = plain.final.flatten(0, 1).index_select(0, item.positions)
            self._rounding = quantized - self._head(window, item, exact, 0.0, 1.0)[0]
        return loss

    def _head(self, window: Any, item: Any, hidden: Tensor, ce: float, kd: float) -> tuple[float, float]:
        """Value (nats) of ce * CE + kd * GDKD, and the norm of its gradient at the hidden states [N, d]."""
        assert self.teacher is not None and item.teacher is not None
        head, (weight, bias) = self.context.head, self.teacher.head()
        hidden = hidden.clone().requires_grad_(True)
        with torch.enable_grad():
            out = distillation_head(
                hidden,
                head.weight.detach().to(hidden.dtype),
                None,
                item.teacher.final,
                weight,
                bias,
                item.targets,
                item.prepared["distill"][0],
                vocabulary=self.context.vocabulary,
                ce_weight=ce / window.counts["tokens"],
                kd_weight=kd / window.counts["gates"],
                temperature=self.distill.temperature,
                alpha=self.distill.alpha,
                beta_dkd=self.distill.beta,
            )
            out.loss.backward()
        assert hidden.grad is not None
        return float(out.loss), float(hidden.grad.float().norm())

    def end_step(self, *, skipped: bool = False) -> None:
        record = self.record
        super().end_step(skipped=skipped)
        if record is not None and not skipped:
            seen = Measurement(record.ce, record.gdkd, self.progress, self._gradients, self._rounding)
            self.state = advance(self.state, seen)
        self._rounding = None

    def controller_logs(self) -> dict[str, float]:
        state = self.state
        known = {
            "beta": state.beta,
            "tau": state.tau,
            "ema": state.ema,
            "violated": state.violated / max(1, state.step),
        }
        return {key: value for key, value in known.items() if value is not None}


#: name of a method (after "grace-") -> its rule; x0.5 and x2 are the sensitivity of the constant
RULES: dict[str, Rule] = {
    "schedule": Rule("schedule", 0.25),
    "schedule-half": Rule("schedule", 0.125),
    "schedule-twice": Rule("schedule", 0.5),
    "rounding": Rule("rounding"),
    "gradients": Rule("gradients", 1.0),
    "gradients-half": Rule("gradients", 0.5),
    "gradients-twice": Rule("gradients", 2.0),
    "losses": Rule("losses", 1.0),
    "losses-half": Rule("losses", 0.5),
    "losses-twice": Rule("losses", 2.0),
}
