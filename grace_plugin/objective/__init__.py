"""GRACE for any training loop: prepare, window, loss, measure, step, finalize."""

from grace_plugin.objective.grace import GraceObjective
from grace_plugin.objective.window import StepRecord

__all__ = ["GraceObjective", "StepRecord"]
