"""Optimizers that train other weights than those to keep (schedule-free ones): what is frozen and saved is the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainingArguments

from grace_plugin import grace_session
from grace_plugin.data import ConversationCollator
from grace_plugin.run.trainer import GraceTrainer
from tests.pairs import Pair, recipe_text
from tests.tiny import make_samples


class Averaging(torch.optim.SGD):
    """SGD that keeps the mean of its iterates; `eval` puts the mean into the parameters, `train` the latest iterate."""

    in_training = True
    after_step: Any = staticmethod(lambda: None)

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert self.in_training
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["steps"] = state.get("steps", 0) + 1
                mean = state.get("mean", torch.zeros_like(p))
                state["mean"] = mean + (p.detach() - mean) / state["steps"]
        self.after_step()

    def _swap(self, in_training: bool) -> None:
        if self.in_training != in_training:
            for group in self.param_groups:
                for p in group["params"]:
                    if "mean" in self.state[p]:
                        latest = p.detach().clone()
                        p.data.copy_(self.state[p]["mean"])
                        self.state[p]["mean"] = latest
        self.in_training = in_training

    def train(self) -> None:
        self._swap(True)

    def eval(self) -> None:
        self._swap(False)


NAME = "model.language_model.norm.weight"


@pytest.fixture
def session(llava: Pair) -> Any:
    """A session of three steps, its student, and a collator."""
    student = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(llava.student)
    with grace_session(student, recipe_text(llava.teacher), total_steps=3, processor=processor) as running:
        yield running, student, ConversationCollator(processor)


@pytest.mark.slow
def test_trainer__optimizer_with_an_eval_state__average_saved_in_state_and_checkpoint(
    session: Any, tmp_path: Path
) -> None:
    running, student, collator = session
    optimizer = Averaging(running.parameter_groups(1e-2))
    seen: list[torch.Tensor] = []
    optimizer.after_step = lambda: seen.append(dict(student.named_parameters())[NAME].detach().clone())
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=3, per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True, report_to="none",
        remove_unused_columns=False, label_names=["labels"], save_strategy="steps", save_steps=1, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = GraceTrainer(
        model=student, args=arguments, train_dataset=make_samples(6), data_collator=collator, objective=running.objective,
        scale_rate=10.0, optimizers=(optimizer, None),
    )  # fmt: skip
    trainer.train()
    mean = torch.stack(seen).mean(0)
    assert len(seen) == 3 and not torch.equal(seen[0], seen[2])
    weight = dict(student.named_parameters())[NAME].detach().clone()
    torch.testing.assert_close(weight, mean, rtol=0, atol=1e-6)
    assert (weight - seen[2]).abs().max() > 1e-5
    states = {step: load_file(tmp_path / f"run/checkpoint-{step}/model.safetensors")[NAME] for step in (2, 3)}
    assert torch.equal(states[2], seen[1])  # goes on from the iterate
    assert torch.equal(states[3], weight)  # is finished without training
    assert running.save(tmp_path / "out")["verified"]
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(dict(saved.named_parameters())[NAME], weight.bfloat16())


@pytest.mark.slow
@pytest.mark.parametrize("passed", [True, False])
def test_session_save__optimizer_with_an_eval_state__set_to_it_where_passed(
    session: Any, tmp_path: Path, passed: bool
) -> None:
    running, student, collator = session
    optimizer = Averaging(running.parameter_groups(1e-2))
    for seed in (1, 2, 3):
        batch = collator(make_samples(2, seed=seed))
        running.objective.begin_step([batch])
        running.objective.compute_loss(student, batch).backward()
        running.objective.reduce_metrics()
        optimizer.step()
        running.objective.end_step()
        optimizer.zero_grad()
    mean = optimizer.state[dict(student.named_parameters())[NAME]]["mean"].clone()
    assert running.save(tmp_path / "out", **({"optimizer": optimizer} if passed else {}))["verified"]
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype="auto")
    assert torch.equal(dict(saved.named_parameters())[NAME], mean.bfloat16()) is passed
