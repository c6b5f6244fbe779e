"""One rank of integration/test_two_processes.py: runs every scenario and writes what this rank saw.

    python -m torch.distributed.run --standalone --nproc_per_node 2 -m integration.two_workers PAIR_FOLDER OUT_FOLDER

With no torchrun around it, the same function gives the single-process run of the same global batch. RANKS_ON=cuda in the
environment gives every rank a GPU of its own, with NCCL between them.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from grace_plugin.data import ConversationCollator
from grace_plugin.run.inputs import load_processor, load_student
from grace_plugin.run.trainer import GraceTrainer
from grace_plugin.upstream import create_session
from tests.pairs import Pair, mixed_samples, modifier_of, recipe_text, run
from tests.tiny import make_samples

WORLD = int(os.environ.get("WORLD_SIZE", "1"))
CUDA = os.environ.get("RANKS_ON") == "cuda"
PLACE: dict[str, Any] = {"use_cpu": not CUDA, "bf16": False, "tf32": False if CUDA else None}
TOGETHER: dict[str, Any] = {"ddp_backend": "nccl" if CUDA else "gloo", "ddp_timeout": 60} if WORLD > 1 else {}
PICTURES, TEXTS = make_samples(4, seed=31), make_samples(4, seed=32, images=0)


def marked(chosen: list[dict[str, Any]], mark: str) -> list[dict[str, Any]]:
    return [{**sample, mark: True} for sample in chosen]


def interleaved(first: list[Any], second: list[Any]) -> list[Any]:
    """Two ranks of two samples a batch read batches in turn: rank 0 gets `first`, rank 1 `second`."""
    return [
        sample for start in range(0, len(first), 2) for part in (first, second) for sample in part[start : start + 2]
    ]


#: samples in the order they are read, and further TrainingArguments
SCENARIOS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "mixed": (mixed_samples(8), {}),
    "no_image_on_rank_1": (interleaved(PICTURES, TEXTS), {}),
    "no_image_on_rank_1_checkpointed": (interleaved(PICTURES, TEXTS), {"gradient_checkpointing": True}),
    "no_image_in_the_last_batch": (PICTURES + TEXTS, {}),
    "no_image_in_the_last_batch_of_rank_1": (interleaved(PICTURES, PICTURES[:2] + TEXTS[:2]), {}),
    "no_label_on_rank_1": (interleaved(PICTURES, marked(make_samples(4, seed=33), "mute")), {}),
    "no_image_and_no_label": (interleaved(marked(TEXTS, "mute"), marked(TEXTS, "mute")), {}),
    "not_finite_on_rank_1": (
        interleaved(PICTURES, marked(make_samples(4, seed=33), "broken"))
        + interleaved(PICTURES, make_samples(4, seed=34)),
        {"max_steps": 2},
    ),
}


class Collator:
    """The real collator; a sample marked `mute` has no label, one marked `broken` an infinite pixel."""

    def __init__(self, processor: Any) -> None:
        self.real = ConversationCollator(processor)

    def __call__(self, chosen: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = self.real([{k: sample[k] for k in ("messages", "images")} for sample in chosen])
        for number, sample in enumerate(chosen):
            if sample.get("mute"):
                batch["labels"][number] = -100
            if sample.get("broken"):
                batch["pixel_values"].view(-1)[0] = float("inf")
        return batch


class Watch(TrainerCallback):
    """Gradients before each optimizer step, parameters and counters behind it."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self.trainer: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps.append({"before": {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}})

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.steps[-1]["grad"] = {n: p.grad.cpu().clone() for n, p in model.named_parameters() if p.grad is not None}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        before = self.steps[-1].pop("before")
        parameters = dict(model.named_parameters())
        moved = [name for name, value in before.items() if not torch.equal(parameters[name], value)]
        objective = self.trainer.objective
        self.steps[-1] |= {
            "moved": moved, "record": {**objective.record.metrics, "finite": objective.record.finite},
            "controller": objective.controller_state.to_dict(), "nonfinite": objective.nonfinite_steps,
        }  # fmt: skip


def scenario(pair: Pair, name: str, folder: Path) -> list[dict[str, Any]]:
    """Steps of one scenario as this rank saw them."""
    data, options = SCENARIOS[name]
    arguments = TrainingArguments(
        output_dir=str(folder / name), **({"max_steps": 1} | options), per_device_train_batch_size=4 // WORLD,
        gradient_accumulation_steps=2, train_sampling_strategy="sequential", max_grad_norm=0.0, learning_rate=1e-3,
        **PLACE, **TOGETHER, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, label_names=["labels"], logging_nan_inf_filter=False, logging_strategy="no",
        gradient_checkpointing_kwargs={"use_reentrant": False}, lr_scheduler_type="constant",
    )  # fmt: skip
    modifier = modifier_of(recipe_text(pair.teacher))
    student = load_student(str(pair.student))
    processor = load_processor(student)
    with create_session() as session:
        session.initialize(recipe=modifier, model=student, copy_data=False, processors=(processor, None))
        watch = Watch()
        modifier.teacher_to(arguments.device)
        objective = modifier.begin(arguments.max_steps)
        trainer = GraceTrainer(
            model=student, args=arguments, train_dataset=data, data_collator=Collator(processor), objective=objective,
            scale_rate=10.0,
        )  # fmt: skip
        watch.trainer = trainer
        trainer.add_callback(watch)  # behind GRACE's own
        trainer.train()
        objective.finalize(torch.bfloat16)
    return watch.steps


def main(pair_folder: str, out: str) -> None:
    """Every scenario, then a whole `train` with its checkpoint."""
    folder, rank = Path(out), os.environ.get("RANK", "0")
    pair = Pair("llava", Path(pair_folder) / "student", Path(pair_folder) / "teacher")
    seen = {name: scenario(pair, name, folder) for name in SCENARIOS}
    result = run(
        pair, folder / "trained", make_samples(16, seed=35), max_steps=2, per_device_train_batch_size=8 // WORLD,
        **PLACE, **TOGETHER, logging_steps=1, save_strategy="steps", save_steps=1,
    )  # fmt: skip
    run(
        pair, folder / "resumed", make_samples(16, seed=35), max_steps=2, per_device_train_batch_size=8 // WORLD,
        **PLACE, **TOGETHER, logging_steps=1, save_strategy="steps", save_steps=1,
        resume_from_checkpoint=str(folder / "trained.run" / "checkpoint-1"),
    )  # fmt: skip
    torch.save(
        {"scenarios": seen, "verification": result.verification, "history": result.history}, folder / f"{rank}.pt"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
