"""Reports as web pages: how a checkpoint differs from another one, and how a training went."""

from typing import Any

from grace_plugin.deprecation import deprecated_attributes
from grace_plugin.report.compare import compare_checkpoints
from grace_plugin.report.training import training

__all__ = ["compare_checkpoints", "training"]

_RENAMED: dict[str, tuple[str, Any]] = {"damage": ("compare_checkpoints", compare_checkpoints)}
__getattr__ = deprecated_attributes(__name__, _RENAMED)
