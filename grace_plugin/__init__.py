"""GRACE for llm-compressor: gated relational distillation inside quantization-aware training of vision-language models.

Importing the package registers `GraceModifier` with llm-compressor's ModifierFactory and the `grace` calibration pipeline, and
does nothing else. Importing it again changes nothing.
"""

from grace_plugin.export import VerificationError, verify
from grace_plugin.modifier import GraceModifier
from grace_plugin.objective import GraceObjective
from grace_plugin.run import GraceSession, TrainResult, export, grace_session, oneshot, train, train_from
from grace_plugin.run.pipeline import register_pipeline
from grace_plugin.upstream import ModifierFactory

__all__ = [
    "GraceModifier",
    "GraceObjective",
    "GraceSession",
    "TrainResult",
    "VerificationError",
    "export",
    "grace_session",
    "oneshot",
    "train",
    "train_from",
    "verify",
]
__version__ = "0.1.0"

ModifierFactory.register("GraceModifier", GraceModifier)
register_pipeline()
