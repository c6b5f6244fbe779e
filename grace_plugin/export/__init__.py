"""From a trained model to a verified checkpoint: freeze, stage, write, verify, rename."""

from grace_plugin.export.freeze import freeze_model
from grace_plugin.export.plan import ExportPlan, rehearse_save
from grace_plugin.export.verify import VerificationError, verify
from grace_plugin.export.write import install_save, save_checkpoint

__all__ = [
    "ExportPlan",
    "VerificationError",
    "freeze_model",
    "install_save",
    "rehearse_save",
    "save_checkpoint",
    "verify",
]
