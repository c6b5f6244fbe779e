"""`oneshot` of ours and of upstream, and a session inside somebody else's loop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.upstream import active_session
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.pairs import Pair, recipe_text
from tests.tiny import rows

ONESHOT = {"epochs": 0.5, "learning_rate": 1.0e-3, "gradient_accumulation_steps": 2}


def loaded(pair: Pair) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pair.student, dtype="auto")


def loader(pair: Pair, **change: Any) -> DataLoader:
    """Calibration batches of upstream's form: no labels."""
    collator = ConversationCollator(AutoProcessor.from_pretrained(pair.student))

    def collate(chosen: Any) -> dict[str, torch.Tensor]:
        return {k: v for k, v in collator(chosen).items() if k != "labels"}

    return DataLoader(rows(8, seed=41), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]


def test_upstreams_oneshot_with_our_pipeline_gives_a_checkpoint_that_verifies(llava: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upstream_oneshot(
        model=loaded(llava), recipe=recipe_text(llava.teacher, oneshot=ONESHOT), dataset=loader(llava), pipeline="grace",
        output_dir=str(out),
    )  # fmt: skip
    found = grace_plugin.verify(out, source=llava.student)
    assert (found["verified"], found["layers"], found["codes_differing"]) == (True, 21, 0)
    assert found["logits_equal"]


def test_without_our_pipeline_nothing_was_trained_and_nothing_is_written(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"GRACE trained nothing; call oneshot\(\.\.\., pipeline='grace'\)"):
        upstream_oneshot(
            model=loaded(llava),
            recipe=recipe_text(llava.teacher),
            dataset=loader(llava),
            output_dir=str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_the_pipeline_needs_data(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="none was given; pass dataset= to oneshot"):
        upstream_oneshot(
            model=loaded(llava), recipe=recipe_text(llava.teacher), pipeline="grace", output_dir=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


def test_ours_verifies_and_copies_the_processor(llava: Pair, tmp_path: Path) -> None:
    """8 rows by 2 are 4 batches, two windows an epoch; half an epoch is one step."""
    result = grace_plugin.oneshot(
        str(llava.student), recipe=recipe_text(None, oneshot=ONESHOT), dataset=rows(99, seed=41), output_dir=tmp_path / "out",
        teacher=llava.teacher, num_calibration_samples=8, batch_size=2,
    )  # fmt: skip
    assert result.verification["verified"] and result.verification["processor_files_changed"] == []
    assert (result.checkpoint / "tokenizer_config.json").read_bytes() == (
        llava.student / "tokenizer_config.json"
    ).read_bytes()
    assert json.loads((result.checkpoint / "grace/record.json").read_text())["run"]["steps"] == 1


def test_the_recipes_optimizer_is_taken(llava: Pair, tmp_path: Path) -> None:
    """Adafactor (8 bytes a parameter instead of 16) and AdamW move the same student to different codes; both verify."""
    found = {}
    for optim in ("adafactor", "adamw_torch"):
        result = grace_plugin.oneshot(
            str(llava.student), recipe=recipe_text(llava.teacher, oneshot={**ONESHOT, "optim": optim}),
            dataset=rows(8, seed=41), output_dir=tmp_path / optim, batch_size=2,
        )  # fmt: skip
        assert result.verification["verified"]
        found[optim] = (result.checkpoint / "model.safetensors").read_bytes()
    assert found["adafactor"] != found["adamw_torch"]


def test_ours_refuses_a_destination_before_it_loads(llava: Pair, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        grace_plugin.oneshot("/no/where", recipe=recipe_text(None), dataset=rows(1), output_dir=tmp_path)


def test_a_session_in_ones_own_loop(llava: Pair, tmp_path: Path) -> None:
    student = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.float32)
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    windows = [[collator(rows(2, seed=s)) for s in (n, n + 1)] for n in (51, 53)]
    student.train()
    before = active_session()
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2) as grace:
        groups = grace.parameter_groups(1e-3, weight_decay=0.1)
        assert [g["lr"] for g in groups] == [1e-3, pytest.approx(1e-2)]
        assert [g["weight_decay"] for g in groups] == [0.1, 0.0]
        assert len(groups[1]["params"]) == 21
        assert sum(len(g["params"]) for g in groups) == sum(p.requires_grad for p in student.parameters())
        optimizer = torch.optim.AdamW(groups)
        for batches in windows:
            grace.objective.window(batches)
            for batch in batches:
                grace.objective.loss(student, batch).backward()
            record = grace.objective.measure()
            assert record.finite and record.images == 4
            optimizer.step()
            grace.objective.step(1.0)
            optimizer.zero_grad()
        found = grace.save(tmp_path / "out")
    assert found["verified"] and found["layers"] == 21
    assert grace_plugin.verify(tmp_path / "out")["codes_differing"] == 0
    assert active_session() is before


def test_saving_a_session_that_trained_nothing_is_refused(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava)
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2) as grace:
        with pytest.raises(RuntimeError, match="GRACE trained nothing"):
            grace.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
