"""Run the methods of the demo in worker processes: make a model, score it on the held-out questions, report seconds.

A worker computes with few threads and takes one job after another; the bundled models are so small that two processes on two
cores do twice the work of one process with two threads. The output of a job goes to the worker's log.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["SHARED", "Job", "Result", "count_all", "jobs_of", "prepare_worker", "run_job"]

SHARED = "teacher-states"
"""Folder of the teacher's states, which runs share while the demo runs."""

_WORKER: dict[str, Any] = {}


@dataclass(frozen=True)
class Job:
    """One method of the table. kind: "bundled", "rtn", "gptq", "fine_tune", "kl" or "grace"; bits: 16 is BF16."""

    name: str
    kind: str
    bits: int
    source: str = ""


@dataclass
class Result:
    """The result of a job; answers and right are in the order of the held-out samples."""

    job: Job
    answers: list[str]
    right: list[bool]
    bytes: int
    seconds: dict[str, float]
    verification: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)


def jobs_of(low_bits: Sequence[int] = (2,)) -> tuple[Job, ...]:
    """Return the methods of the table, with GRACE and round-to-nearest at `low_bits` in addition to 4 bits.

    The longest come first, so that the workers end at about the same time, and one GRACE run before the others, which read the
    teacher's states that it computes.
    """
    return (
        Job("GRACE INT4", "grace", 4, "recipe"),
        Job("BF16 fine-tuned", "fine_tune", 16),
        *(Job(f"GRACE {bits}-bit", "grace", bits) for bits in low_bits),
        Job("QAT + plain KL INT4", "kl", 4),
        Job("teacher BF16", "bundled", 16, "teacher"),
        Job("GPTQ INT4", "gptq", 4),
        Job("round-to-nearest INT4", "rtn", 4),
        *(Job(f"round-to-nearest {bits}-bit", "rtn", bits) for bits in low_bits),
        Job("student BF16", "bundled", 16, "student"),
    )


def prepare_worker(logs: str, questions: int, threads: int, board: MutableMapping[str, Any]) -> None:
    """Initialize a worker process: threads, its log file, and where progress is posted."""
    import torch

    torch.set_num_threads(threads)
    # "medium" selects oneDNN's float32 products, which are faster than MKL's; with AMX it would round to bfloat16
    if not torch.cpu._is_amx_tile_supported():
        torch.set_float32_matmul_precision("medium")
    log = os.open(os.path.join(logs, f"worker-{os.getpid()}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, sys.stdout.fileno())
    os.dup2(log, sys.stderr.fileno())
    _WORKER.update(questions=questions, board=board)


def _held_out() -> tuple[Any, list[dict[str, Any]], Any]:
    """Return the processor, the held-out samples and their encoded prompts, made once per worker."""
    if "samples" not in _WORKER:
        from transformers import AutoProcessor

        from examples.bundled_demo.methods import STUDENT
        from examples.bundled_demo.scenes import heldout_samples
        from examples.bundled_demo.score import encode_questions

        processor = AutoProcessor.from_pretrained(STUDENT)
        samples = list(heldout_samples(_WORKER["questions"]))
        _WORKER.update(processor=processor, samples=samples, encoded=encode_questions(processor, samples))
    return _WORKER["processor"], _WORKER["samples"], _WORKER["encoded"]


def _post(name: str, done: float, total: float) -> None:
    _WORKER["board"][name] = (done, total)


def _progress(name: str) -> Any:
    from transformers import TrainerCallback

    class Post(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            _post(name, state.global_step, state.max_steps * 1.2)

    return Post()


def count_all(questions: int) -> dict[str, int]:
    """Count the compositions of the demo's training, its test and the models' training; ValueError where two share one."""
    from examples.bundled_demo.disjoint import count_compositions
    from examples.bundled_demo.methods import Budget

    return count_compositions(Budget.steps * Budget.batch_size, questions)


def run_job(job: Job, output: str, recipe: str) -> Result:
    """Make the method's model under `output`, reload it from disk and score it."""
    from examples.bundled_demo import methods
    from examples.bundled_demo.score import greedy_answers, is_right

    _post(job.name, 0, 1)
    start = time.monotonic()
    folder = Path(output) / job.name.replace(" ", "-")
    verification: dict[str, Any] = {}
    history: list[dict[str, Any]] = []
    processor, samples, encoded = _held_out()
    if job.kind == "bundled":
        folder = methods.TEACHER if job.source == "teacher" else methods.STUDENT
    elif job.kind in ("rtn", "gptq"):
        methods.post_training(job.kind, job.bits, folder, processor)
    else:
        callbacks = [_progress(job.name)]
        if job.kind == "fine_tune":
            result = methods.fine_tune(folder, callbacks)
        elif job.kind == "kl":
            result = methods.plain_kl(job.bits, folder, callbacks, shared=Path(output) / SHARED)
        else:
            result = methods.grace(Path(recipe), job.bits, folder, callbacks, shared=Path(output) / SHARED)
        verification, history = result.verification, result.history
    made = time.monotonic()
    model = methods.scored_model(folder, encoded[0])
    answers = greedy_answers(model, processor, encoded, lambda done, total: _post(job.name, 5 + done / total, 6))
    end = time.monotonic()
    right = [is_right(sample, answer) for sample, answer in zip(samples, answers, strict=True)]
    size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return Result(job, answers, right, size, {"make": made - start, "score": end - made}, verification, history)
