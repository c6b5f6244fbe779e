"""One process trains on one GPU and holds the whole student."""

from __future__ import annotations

import logging
import os
from typing import TypeVar

from transformers import TrainingArguments

__all__ = ["check_whole", "one_gpu"]

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def check_whole(fsdp: object = None, deepspeed: object = None) -> None:
    """Refuse engines that cut the student: the loss multiplies by its head and the quantizer reads its linears, both whole.

    Raises:
        ValueError: FSDP, DeepSpeed, Megatron-LM or a parallelism config, asked for by an argument or by `accelerate launch`.
    """
    asked = {"FSDP": fsdp, "DEEPSPEED": deepspeed, "MEGATRON_LM": None, "PARALLELISM_CONFIG": None}
    cut = [
        name for name, given in asked.items() if given or os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true"
    ]
    if cut:
        raise ValueError(
            f"{cut[0]} cuts the student into parts, and GRACE trains with a whole student in every process (one process, or "
            "DDP by `torchrun` or `accelerate launch --multi_gpu`). A student that does not fit a card so: training.method "
            "lora or scales, training.master_weights keep, an 8-bit optim=, gradient_checkpointing=True, teacher.kind cached"
        )


def one_gpu(arguments: Arguments) -> Arguments:
    """The arguments, with one GPU for this process.

    Raises:
        ValueError: see `check_whole`.

    Where several GPUs are visible to a run that was started as one process, Trainer multiplies the batch by their number and
    wraps the model in `nn.DataParallel`, whose replicas neither the learned scales nor the window of an optimizer step survive.
    """
    check_whole(arguments.fsdp, arguments.deepspeed)
    if arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to one process: this run uses %s alone; start it by `accelerate launch` or `torchrun` to "
            "train on all of them, or set CUDA_VISIBLE_DEVICES to choose one",
            arguments.n_gpu,
            arguments.device,
        )
        arguments._n_gpu = 1
    return arguments
