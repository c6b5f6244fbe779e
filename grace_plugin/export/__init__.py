"""A finished run to a checkpoint that proves itself."""

from grace_plugin.export.plan import ExportPlan, rehearse_save
from grace_plugin.export.verify import VerificationError, verify
from grace_plugin.export.write import install_save, save_checkpoint

__all__ = ["ExportPlan", "VerificationError", "install_save", "rehearse_save", "save_checkpoint", "verify"]
