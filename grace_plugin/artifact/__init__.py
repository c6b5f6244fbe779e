"""A finished run to a checkpoint that proves itself."""

from grace_plugin.artifact.save import install_save, save_checkpoint
from grace_plugin.artifact.verify import VerificationError, verify

__all__ = ["VerificationError", "install_save", "save_checkpoint", "verify"]
