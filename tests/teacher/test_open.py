"""Open pairs as a run does: settings of both checkpoints, custom teachers, and teachers of another generation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForImageTextToText

import grace_plugin
from grace_plugin.teacher import ResidentTeacher, TeacherStates
from tests.pairs import Pair, recipe_text, run
from tests.tiny import build, make_samples, save

BIGGER: dict[str, Any] = {"seed": 1, "hidden": 512, "layers": 4, "vocab_rows": 400}


def opened(student: Path, teacher: Path) -> None:
    """Open and close a session of the two, which checks the pair."""
    model = AutoModelForImageTextToText.from_pretrained(student)
    with grace_plugin.grace_session(model, recipe_text(teacher), total_steps=1):
        pass


@pytest.mark.parametrize(
    ("family", "part", "size", "shown"),
    [
        ("llava", "image", {"shortest_edge": 112}, r"image settings .*size: .*_edge': 56\} / \{'shortest_edge': 112\}"),
        ("qwen2_vl", "image", {"shortest_edge": 3136, "longest_edge": 50176}, r"image settings .*12544.* / .*50176"),
        ("qwen2_vl", "video", {"shortest_edge": 3136, "longest_edge": 50176}, r"video settings .*12544.* / .*50176"),
    ],
)  # fmt: skip
def test_session__teacher_with_other_settings__refused(
    pair_of: Callable[[str], Pair], tmp_path: Path, family: str, part: str, size: dict[str, int], shown: str
) -> None:
    made = pair_of(family)
    model, processor = build(family, **BIGGER)
    getattr(processor, f"{part}_processor").size = size
    save(model, processor, tmp_path / "teacher")
    opened(made.student, made.teacher)
    with pytest.raises(ValueError, match=f"teacher and student have different {shown}"):
        opened(made.student, tmp_path / "teacher")


class Own(ResidentTeacher):
    """A teacher as a user writes one, which keeps how often it was asked."""

    asked = 0

    def states(self, *args: Any, **options: Any) -> TeacherStates:
        self.asked += 1
        return super().states(*args, **options)


def test_session_and_oneshot__custom_teacher__used(llava: Pair, tmp_path: Path) -> None:
    """By a session and by `oneshot`; what `train` makes of one is the demo's test."""
    recipe = recipe_text(None, oneshot={"epochs": 1.0, "learning_rate": 1.0e-3, "gradient_accumulation_steps": 2})
    own = Own(AutoModelForImageTextToText.from_pretrained(llava.teacher))
    student = AutoModelForImageTextToText.from_pretrained(llava.student)
    with grace_plugin.grace_session(student, recipe, total_steps=1, teacher=own) as grace:
        assert grace.objective.teacher is own
    done = grace_plugin.oneshot(
        model=llava.student, recipe=recipe, dataset=make_samples(8), output_dir=tmp_path / "out", teacher=own, batch_size=2,
        num_calibration_samples=8,
    )  # fmt: skip
    assert own.asked == 4 and done.verification["verified"]


def test_train__other_generation_same_tokenizer__trained(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    student = pair_of("qwen2_vl").student
    save(*build("qwen2_5_vl", **BIGGER), tmp_path / "teacher")
    made = Pair("qwen2_vl", student, tmp_path / "teacher")
    done = run(made, tmp_path / "out", make_samples(4), logging_steps=1)
    assert done.verification["verified"]
    logs = [log for log in done.history if "loss_gdkd" in log]
    assert len(logs) == 2 and all(log["loss_gdkd"] > 0 and log["loss_rcka"] > 0 for log in logs)


def test_train__other_generation_other_tokenizer__refused(pair_of: Callable[[str], Pair], tmp_path: Path) -> None:
    save(*build("qwen2_5_vl", words="other", **BIGGER), tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"tokenizers differ on \d+ of .*same tokenizer generation"):
        run(Pair("qwen2_vl", pair_of("qwen2_vl").student, tmp_path / "teacher"), tmp_path / "out", make_samples(4))
    assert not (tmp_path / "out").exists()
