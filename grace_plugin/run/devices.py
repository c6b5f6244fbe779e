"""One process trains on one GPU."""

from __future__ import annotations

import logging
from typing import TypeVar

from transformers import TrainingArguments

__all__ = ["one_gpu"]

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def one_gpu(arguments: Arguments) -> Arguments:
    """The arguments, with one GPU for this process.

    Where several GPUs are visible to a run that was started as one process, Trainer multiplies the batch by their number and
    wraps the model in `nn.DataParallel`, whose replicas neither the learned scales nor the window of an optimizer step survive.
    """
    if arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to one process: this run uses %s alone; start it by `accelerate launch` or `torchrun` to "
            "train on all of them, or set CUDA_VISIBLE_DEVICES to choose one",
            arguments.n_gpu,
            arguments.device,
        )
        arguments._n_gpu = 1
    return arguments
