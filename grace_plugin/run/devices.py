"""One process trains on one GPU and holds the whole student."""

from __future__ import annotations

import logging
import os
from typing import TypeVar

from transformers import TrainingArguments

__all__ = ["refuse_sharding", "use_one_gpu"]

logger = logging.getLogger(__name__)
Arguments = TypeVar("Arguments", bound=TrainingArguments)


def refuse_sharding(fsdp: object = None, deepspeed: object = None) -> None:
    """Refuse engines that shard the student: the loss reads its whole head, and the quantizer its whole linears.

    Raises:
        ValueError: FSDP, DeepSpeed, Megatron-LM or a parallelism config, asked for by an argument or by `accelerate launch`.
    """
    asked = {"FSDP": fsdp, "DEEPSPEED": deepspeed, "MEGATRON_LM": None, "PARALLELISM_CONFIG": None}
    for name, given in asked.items():
        if given or os.environ.get(f"ACCELERATE_USE_{name}", "").lower() == "true":
            raise ValueError(
                f"{name} shards the student, and GRACE trains with a whole student in every process (one process, or DDP by "
                "`torchrun` or `accelerate launch --multi_gpu`). A student that does not fit a card so: training.method lora "
                "or scales, training.master_weights keep, an 8-bit optim=, gradient_checkpointing=True, teacher.kind cached"
            )


def use_one_gpu(arguments: Arguments) -> Arguments:
    """Return the arguments, with one GPU for this process.

    Raises:
        ValueError: as `refuse_sharding`.
    """
    refuse_sharding(arguments.fsdp, arguments.deepspeed)
    if arguments.n_gpu > 1:
        logger.warning(
            "%d GPUs are visible to one process: this run uses %s alone; start it by `accelerate launch` or `torchrun` to "
            "train on all of them, or set CUDA_VISIBLE_DEVICES to choose one",
            arguments.n_gpu,
            arguments.device,
        )
        # Trainer would wrap the model in nn.DataParallel, whose replicas have neither the learned scales nor the objective's
        # accumulation window; no public argument prevents it
        arguments._n_gpu = 1
    return arguments
