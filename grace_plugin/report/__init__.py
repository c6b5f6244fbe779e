"""Pages about what was trained: where a checkpoint differs from another, and how a training went."""

from grace_plugin.report.compare import damage
from grace_plugin.report.training import training

__all__ = ["damage", "training"]
