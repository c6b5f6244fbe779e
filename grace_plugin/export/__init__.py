"""A finished run to a checkpoint that proves itself."""

from grace_plugin.export.plan import ExportPlan, rehearse_save
from grace_plugin.export.save import install_save, save_checkpoint
from grace_plugin.export.verify import VerificationError, verify

__all__ = ["ExportPlan", "VerificationError", "install_save", "rehearse_save", "save_checkpoint", "verify"]
