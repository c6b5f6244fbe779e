"""The GRACE objective for any training loop: prepare, begin_step, compute_loss, reduce_metrics, end_step, finalize."""

from grace_plugin.objective.grace import GraceObjective
from grace_plugin.objective.terms import Chart, LossTerm, register_term
from grace_plugin.objective.window import StepRecord

__all__ = ["Chart", "GraceObjective", "LossTerm", "StepRecord", "register_term"]
