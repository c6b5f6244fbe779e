"""The lines that rank 0 prints: a run's shape before the first step, its speed and memory after the last, its checkpoint."""

from __future__ import annotations

import logging
import math
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from grace_plugin.export.ranks import is_writer
from grace_plugin.run.outputs import kept_streams

__all__ = ["checkpoint_lines", "count_tokens", "folder_bytes", "header_line", "say", "speed_line", "throughput"]


def size(count: float) -> str:
    """Bytes as text, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def count_tokens(batch: Mapping[str, Any]) -> int:
    """Count the tokens of a batch in host memory that are no padding; 0 for one without tokens."""
    mask = batch.get("attention_mask")
    return int(mask.sum()) if mask is not None else batch["input_ids"].numel() if "input_ids" in batch else 0


def counted(count: int, noun: str) -> str:
    """A count with its noun in singular or plural."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def say(line: str, arguments: Any = None) -> None:
    """Print a line on rank 0, unless the training arguments' `log_level` is above "info"."""
    level = arguments.get_process_log_level() if arguments is not None and arguments.log_level != "passive" else 0
    if is_writer() and level < logging.WARNING:
        with kept_streams():
            print(line, flush=True)


def header_line(trainer: Any, steps: int) -> str:
    """Return one line: processes, batch, steps, epochs, what trains, and the memory of the weights."""
    asked, student = trainer.args, trainer.objective.student
    parameters = list(student.parameters())
    held = sum(p.numel() * p.element_size() for p in parameters)
    trains, total = (sum(p.numel() for p in parameters if p.requires_grad or every) for every in (False, True))
    batch = asked.train_batch_size * asked.gradient_accumulation_steps * asked.world_size
    try:
        samples = len(trainer.train_dataset)
    except TypeError:
        samples = 0
    batches = samples / (asked.train_batch_size * asked.world_size)
    batches = math.floor(batches) if asked.dataloader_drop_last else math.ceil(batches)
    # the last window of an epoch may be short
    per_epoch = max(1, math.ceil(batches / asked.gradient_accumulation_steps))
    epochs = f", {steps / per_epoch:.2f} epochs of {counted(samples, 'sample')}" if samples else " of a stream"
    processes = f"{asked.world_size} process{'es' if asked.world_size > 1 else ''} on {asked.device.type}"
    return (
        f"GRACE: {processes}, micro-batch {asked.train_batch_size} x accumulation {asked.gradient_accumulation_steps} = global "
        f"batch {batch}, {counted(steps, 'step')}{epochs}; trains {trains:,} of {total:,} parameters, "
        f"weights {size(held)}{_teacher(trainer)}"
    )


def _teacher(trainer: Any) -> str:
    """Return the memory of a teacher that is a model in memory, "" for any other."""
    model = getattr(trainer.objective.teacher, "model", None)
    if not isinstance(model, torch.nn.Module):
        return ""
    return f", teacher {size(sum(p.numel() * p.element_size() for p in model.parameters()))}"


def throughput(trainer: Any, seconds: float, tokens: int) -> dict[str, float]:
    """Return seconds of training, tokens of all ranks, tokens per second, and this process's peak memory in bytes.

    Collective: every rank takes part.
    """
    counted = torch.tensor(tokens, dtype=torch.int64, device=trainer.args.device)
    tokens = int(trainer.accelerator.reduce(counted, reduction="sum"))
    if trainer.args.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(trainer.args.device)
    else:
        unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    per_second = round(tokens / max(seconds, 1e-9), 1)
    return {
        "train_seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": per_second,
        "peak_memory_bytes": peak,
    }


def speed_line(trainer: Any, found: Mapping[str, float]) -> str:
    """Return one line of what `throughput` found."""
    kind = "CUDA" if trainer.args.device.type == "cuda" else "resident"
    steps = counted(trainer.state.global_step, "step")
    return (
        f"GRACE: {steps} in {found['train_seconds']:.1f} s, {found['tokens_per_second']:,.0f} "
        f"tokens/s, peak memory {size(found['peak_memory_bytes'])} ({kind}, rank 0)"
    )


def folder_bytes(folder: Path) -> int:
    """Return the bytes of all files of a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def checkpoint_lines(folder: Path, seconds: float) -> str:
    """Return the size of a checkpoint, the time it took in all, and how to serve it."""
    return f"GRACE: checkpoint of {size(folder_bytes(folder))} after {seconds:.1f} s; serve it: vllm serve {folder}"
