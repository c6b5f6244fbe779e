"""Training runs: a thin client of the Hugging Face Trainer, and the calibration pipeline for `oneshot`."""

from grace_plugin.run.finish import export
from grace_plugin.run.grace_run import TrainResult
from grace_plugin.run.pipeline import GracePipeline, oneshot
from grace_plugin.run.rerun import train_from
from grace_plugin.run.session import GraceSession, grace_session
from grace_plugin.run.train import train

__all__ = ["GracePipeline", "GraceSession", "TrainResult", "export", "grace_session", "oneshot", "train", "train_from"]
