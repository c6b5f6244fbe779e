"""`oneshot` of ours and of upstream, and a session inside somebody else's loop."""

from __future__ import annotations

import importlib
import itertools
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, AutoProcessor

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.export import VerificationError
from grace_plugin.upstream import active_session, keep_processor_files
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.pairs import Pair, loaded, recipe_text, structure
from tests.report.checkpoints import change
from tests.tiny import make_samples

ONESHOT = {"epochs": 0.5, "learning_rate": 1.0e-3, "gradient_accumulation_steps": 2}


def loader(pair: Pair, **change: Any) -> DataLoader:
    """Calibration batches of upstream's form: no labels."""
    collator = ConversationCollator(AutoProcessor.from_pretrained(pair.student))

    def collate(chosen: Any) -> dict[str, torch.Tensor]:
        return {k: v for k, v in collator(chosen).items() if k != "labels"}

    return DataLoader(make_samples(8, seed=41), batch_size=2, collate_fn=collate)  # type: ignore[arg-type]


@pytest.mark.slow
def test_upstream_oneshot__grace_pipeline__verified_checkpoint(llava: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    upstream_oneshot(
        model=loaded(llava), recipe=recipe_text(llava.teacher, oneshot=ONESHOT), dataset=loader(llava), pipeline="grace",
        output_dir=str(out),
    )  # fmt: skip
    found = grace_plugin.verify(out, source=llava.student)
    assert (found["verified"], found["layers"], found["layers_with_other_codes"]) == (True, 21, 0)
    assert found["logits_equal"]
    assert found["processor_files"] > 2 and found["processor_files_changed"] == []
    assert {path.name for path in out.iterdir()} - {path.name for path in llava.student.iterdir()} == {
        "grace", "recipe.yaml", "verification.json",
    }  # fmt: skip


def test_upstream_oneshot__next_run__writes_its_processor(llava: Pair, tmp_path: Path) -> None:
    """Also behind a run of ours that left its hook: it was over another model."""
    entry = importlib.import_module("llmcompressor.entrypoints.oneshot")
    before = entry.post_process
    keep_processor_files(loaded(llava))
    assert entry.post_process is not before
    upstream_oneshot(model=loaded(llava), processor=str(llava.student), output_dir=str(tmp_path / "out"))
    assert entry.post_process is before
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def burning(pair: Pair) -> DataLoader:
    """Calibration batches until the third."""
    batches, made = loader(pair), itertools.count(1)

    def collate(chosen: Any) -> Any:
        if next(made) == 3:
            raise OSError("the disk is on fire")
        return batches.collate_fn(chosen)

    return DataLoader(batches.dataset, batch_size=2, collate_fn=collate)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["ours", "upstream"])
def test_upstream_oneshot__failure__model_given_back(llava: Pair, tmp_path: Path, entry: str) -> None:
    student = loaded(llava)
    before, start = structure(student), {n: p.clone() for n, p in student.named_parameters()}
    asked = {"epochs": 2, "learning_rate": 1.0e-3, "warmup_share": 0.0}
    options = {"recipe": recipe_text(llava.teacher, oneshot=asked), "dataset": burning(llava)}
    oneshot = grace_plugin.oneshot if entry == "ours" else partial(upstream_oneshot, pipeline="grace")
    with pytest.raises(OSError, match="the disk is on fire"):
        oneshot(model=student, output_dir=str(tmp_path / "out"), **options)
    if entry == "upstream":
        vars(student).pop("save_pretrained")  # upstream wraps it on any model it is given, and leaves it so
    assert structure(student) == before
    assert any(not torch.equal(p, start[n]) for n, p in student.named_parameters())
    assert not (tmp_path / "out").exists()


def upstream_run(pair: Pair, out: Path, student: Any = None) -> None:
    """Upstream's own entry point, saving by itself."""
    upstream_oneshot(
        model=loaded(pair) if student is None else student, recipe=recipe_text(pair.teacher, oneshot=ONESHOT),
        dataset=loader(pair), pipeline="grace", output_dir=str(out),
    )  # fmt: skip


def test_upstream_oneshot__output_dir_not_empty__refused_before_training(llava: Pair, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    student = loaded(llava)
    start = {n: p.clone() for n, p in student.named_parameters()}
    with pytest.raises(FileExistsError, match=r"out exists and is not empty; choose another output_dir"):
        upstream_run(llava, out, student)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes"]
    assert start.keys() == dict(student.named_parameters()).keys()
    assert all(torch.equal(p, start[n]) for n, p in student.named_parameters())


@pytest.mark.slow
def test_upstream_oneshot__empty_output_dir__verified(llava: Pair, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    upstream_run(llava, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    found = json.loads((tmp_path / "out" / "verification.json").read_text())
    assert (found["verified"], found["codes_differing"], found["forward_weights_differing"]) == (True, 0, 0)


class Failing:
    """Mixed into a student whose save path is broken: `fault` is called with the folder when it is written."""

    fault: Any = None

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().save_pretrained(save_directory, *args, **kwargs)  # type: ignore[misc]
        fault, self.fault = self.fault, None
        if fault is not None:
            fault(Path(save_directory))
        return out


def failing(pair: Pair, fault: Any) -> Any:
    """A student that cannot be saved the first time."""
    student = loaded(pair)
    student.__class__ = type("Failing", (Failing, type(student)), {})
    student.fault = fault
    return student


def wrong_code(folder: Path) -> None:
    change(folder, "layers.0.mlp.up_proj.weight_packed", lambda packed: packed.view(-1)[3:4].bitwise_xor_(1))


def full_disk(folder: Path) -> None:
    raise OSError("no space left")


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "error"), [(wrong_code, VerificationError), (full_disk, OSError)])
def test_upstream_oneshot__save_broken__nothing_left(
    llava: Pair, tmp_path: Path, fault: Any, error: type[Exception]
) -> None:
    student = failing(llava, fault)
    with pytest.raises(error, match=r"codes_differing|no space left"):
        upstream_run(llava, tmp_path / "out", student)
    assert list(tmp_path.iterdir()) == []
    student.save_pretrained(str(tmp_path / "again"))  # what was trained is not lost
    assert grace_plugin.verify(tmp_path / "again")["verified"]


@pytest.mark.slow
def test_save_pretrained__save_compressed_false__refused(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava)
    grace_plugin.oneshot(
        student, recipe=recipe_text(llava.teacher, oneshot=ONESHOT), dataset=loader(llava), output_dir=tmp_path / "out"
    )
    with pytest.raises(ValueError, match="call save_pretrained without save_compressed=False"):
        student.save_pretrained(str(tmp_path / "dense"), save_compressed=False)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail_inside(student: Any, recipe: str) -> None:
    with grace_plugin.grace_session(student, recipe, total_steps=2):
        assert "weight_log_scale" in dict(student.model.language_model.layers[0].mlp.up_proj.named_parameters())
        raise ValueError("mine")


@pytest.mark.slow
def test_session__error_or_no_save__model_given_back(llava: Pair) -> None:
    student = loaded(llava)
    before = structure(student)
    with pytest.raises(ValueError, match="mine"):
        fail_inside(student, recipe_text(llava.teacher))
    assert structure(student) == before
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2):
        pass
    assert structure(student) == before


def test_session__model_refused__left_alone(llava: Pair) -> None:
    """Also what another quantization has put on its layers."""
    student = loaded(llava)
    layer = student.model.language_model.layers[0].mlp.up_proj
    layer.register_parameter("weight_scale", torch.nn.Parameter(torch.ones(1)))
    layer.quantization_status = "mine"
    before = structure(student)
    with pytest.raises(ValueError, match=r"set teacher\.model in the recipe"):
        grace_plugin.grace_session(student, recipe_text(None), total_steps=2).__enter__()
    assert structure(student) == before


def test_upstream_oneshot__other_pipeline__nothing_written(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"GRACE trained nothing; call oneshot\(\.\.\., pipeline='grace'\)"):
        upstream_oneshot(
            model=loaded(llava),
            recipe=recipe_text(llava.teacher),
            dataset=loader(llava),
            output_dir=str(tmp_path / "out"),
        )
    assert not (tmp_path / "out").exists()


def test_upstreams_oneshot__refused__the_next_reset_says_nothing_more(llava: Pair, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    with pytest.raises(FileExistsError, match="out exists and is not empty"):
        upstream_run(llava, tmp_path / "out")
    sink = logger.add(said.append)
    active_session().reset()
    logger.remove(sink)
    assert "Compression lifecycle reset" in said[-1]
    assert not any("trained nothing" in line or "finalizing" in line for line in said)


def test_upstream_oneshot__no_data__refused(llava: Pair, tmp_path: Path) -> None:
    with pytest.raises((ValueError, RuntimeError), match="none was given; pass dataset= to oneshot"):
        upstream_oneshot(
            model=loaded(llava), recipe=recipe_text(llava.teacher), pipeline="grace", output_dir=str(tmp_path / "out")
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_oneshot__samples__verified_and_processor_copied(llava: Pair, tmp_path: Path) -> None:
    """8 samples by 2 are 4 batches, two windows an epoch; half an epoch is one step."""
    result = grace_plugin.oneshot(
        str(llava.student), recipe=recipe_text(None, oneshot=ONESHOT), dataset=make_samples(99, seed=41),
        output_dir=tmp_path / "out",
        teacher=llava.teacher, num_calibration_samples=8, batch_size=2,
    )  # fmt: skip
    assert result.verification["verified"] and result.verification["processor_files_changed"] == []
    assert (result.checkpoint / "tokenizer_config.json").read_bytes() == (
        llava.student / "tokenizer_config.json"
    ).read_bytes()
    assert json.loads((result.checkpoint / "grace/record.json").read_text())["run"]["steps"] == 1


@pytest.mark.slow
def test_oneshot__optim_in_recipe__used(llava: Pair, tmp_path: Path) -> None:
    """Adafactor (8 bytes a parameter instead of 16) and AdamW move the same student to different codes; both verify."""
    found = {}
    for optim in ("adafactor", "adamw_torch"):
        result = grace_plugin.oneshot(
            str(llava.student), recipe=recipe_text(llava.teacher, oneshot={**ONESHOT, "optim": optim}),
            dataset=make_samples(8, seed=41), output_dir=tmp_path / optim, batch_size=2,
        )  # fmt: skip
        assert result.verification["verified"]
        found[optim] = (result.checkpoint / "model.safetensors").read_bytes()
    assert found["adafactor"] != found["adamw_torch"]


def test_oneshot__output_dir_not_empty__refused_before_loading(llava: Pair, tmp_path: Path) -> None:
    (tmp_path / "notes").write_text("x")
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        grace_plugin.oneshot("/no/where", recipe=recipe_text(None), dataset=make_samples(1), output_dir=tmp_path)


@pytest.mark.slow
def test_session__own_loop__verified_checkpoint(llava: Pair, tmp_path: Path) -> None:
    student = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.float32)
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    windows = [[collator(make_samples(2, seed=s)) for s in (n, n + 1)] for n in (51, 53)]
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
            grace.objective.begin_step(batches)
            for batch in batches:
                grace.objective.compute_loss(student, batch).backward()
            record = grace.objective.reduce_metrics()
            assert record.finite and record.images == 4
            optimizer.step()
            grace.objective.end_step()
            optimizer.zero_grad()
        found = grace.save(tmp_path / "out")
    assert found["verified"] and found["layers"] == 21
    assert grace_plugin.verify(tmp_path / "out")["layers_with_other_codes"] == 0
    assert active_session() is before


def one_step(grace: Any, student: Any, pair: Pair) -> None:
    """One optimizer step of a session."""
    batch = ConversationCollator(AutoProcessor.from_pretrained(pair.student))(make_samples(2, seed=51))
    optimizer = torch.optim.SGD(grace.parameter_groups(1e-3))
    grace.objective.begin_step([batch])
    grace.objective.compute_loss(student.train(), batch).backward()
    grace.objective.reduce_metrics()
    optimizer.step()
    grace.objective.end_step()


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "error"), [(wrong_code, VerificationError), (full_disk, OSError)])
def test_session_save__after_a_failure__can_be_repeated(
    llava: Pair, tmp_path: Path, fault: Any, error: type[Exception]
) -> None:
    """A full folder is refused while the run still goes on; a save that breaks can be repeated elsewhere."""
    student = failing(llava, fault)
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2) as grace:
        one_step(grace, student, llava)
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "notes").write_text("mine")
        with pytest.raises(FileExistsError, match="full exists and is not empty"):
            grace.save(tmp_path / "full")
        one_step(grace, student, llava)
        with pytest.raises(error, match=r"codes_differing|no space left"):
            grace.save(tmp_path / "broken")
        assert [path.name for path in tmp_path.iterdir()] == ["full"]
        found = grace.save(tmp_path / "out")
    assert found["verified"] and found["codes_differing"] == 0
    assert grace_plugin.verify(tmp_path / "out")["verified"]
    assert json.loads((tmp_path / "out/grace/record.json").read_text())["run"]["steps"] == 2


@pytest.mark.slow
def test_session_save__weights_changed_behind_torch__refused_and_named(llava: Pair, tmp_path: Path) -> None:
    """A write through .data is counted by nothing: the next forward pass multiplies by what was kept."""
    student = loaded(llava)
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=1) as grace:
        one_step(grace, student, llava)
        batch = ConversationCollator(AutoProcessor.from_pretrained(llava.student))(make_samples(1, images=0))
        student(**{k: v for k, v in batch.items() if k != "labels"})
        student.model.language_model.layers[1].mlp.up_proj.weight.data.neg_()
        message = (
            r"in 1 of 21 layers the forward pass multiplies by weights that are not code .*layers\.1\.mlp\.up_proj: "
        )
        with pytest.raises(RuntimeError, match=message):
            grace.save(tmp_path / "out")
        assert list(tmp_path.iterdir()) == []
        found = grace.save(tmp_path / "out")
    assert (found["verified"], found["forward_weights_differing"]) == (True, 0)
    assert json.loads((tmp_path / "out/grace/record.json").read_text())["forward"]["weights"] == found["codes"]


def test_session_save__no_step__refused(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava)
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=2) as grace:
        with pytest.raises(RuntimeError, match="GRACE trained nothing"):
            grace.save(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_oneshot__ready_batches_and_a_tokenizer__saved_and_verified(llava: Pair, tmp_path: Path) -> None:
    """Batches that are made already need no processor that renders samples."""
    tokenizer = AutoProcessor.from_pretrained(llava.student).tokenizer
    result = grace_plugin.oneshot(
        loaded(llava),
        recipe=recipe_text(llava.teacher, oneshot=ONESHOT),
        dataset=loader(llava),
        output_dir=tmp_path / "out",
        processor=tokenizer,
    )
    assert result.verification["codes_differing"] == 0
