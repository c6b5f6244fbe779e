"""The multiplier beta of a run: what the recipe asks, the controller's state, and what is reported of it."""

from __future__ import annotations

from grace_plugin import controller as dual
from grace_plugin.recipe import ControllerRecipe

__all__ = ["controller_logs", "is_pinned", "start_controller"]


def start_controller(asked: ControllerRecipe, total_steps: int) -> dual.ControllerState:
    """State of the controller before the first step; a disabled controller is one whose two bounds meet."""
    values = asked.model_dump(exclude={"enabled"})
    if not asked.enabled:
        values |= {"beta_min": asked.beta_start, "beta_max": asked.beta_start, "tau": 1.0, "eta": 1.0}
    return dual.start(dual.ControllerSettings(**values), total_steps)


def controller_logs(asked: ControllerRecipe, state: dual.ControllerState) -> dict[str, float]:
    """ema, tau, eta (nats; absent before they exist) and the share of controlled steps at a bound."""
    if not asked.enabled:
        return {}
    known = {"ema": state.ema, "tau": state.tau, "eta": state.eta, "share_at_bound": dual.share_at_bound(state)}
    return {key: value for key, value in known.items() if value is not None}


def is_pinned(asked: ControllerRecipe, state: dual.ControllerState) -> bool:
    """Whether the controller spent so many steps at a bound that it is off in effect: worth a warning."""
    return asked.enabled and dual.is_pinned(state)
