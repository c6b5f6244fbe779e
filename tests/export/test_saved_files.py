"""What a checkpoint contains in addition to weights: the processor that was trained with, known files alone, no local paths."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.export import VerificationError
from grace_plugin.export.plan import checkpoint_bytes, rehearse_save
from grace_plugin.export.processor import is_processor_file, left_out, plan_processor, processor_files
from grace_plugin.export.record import RECORD, is_local
from grace_plugin.export.write import strip_paths
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.pairs import Pair, loaded, modifier_of, recipe_text, run
from tests.run.test_oneshot import ONESHOT, loader
from tests.tiny import FAMILIES, make_samples

GREEDY = b'{\n  "_from_model_config": true,\n  "do_sample": false,\n  "temperature": 0.9,\n  "top_p": 0.6\n}'
JUNK = ("params.json", "train.log", "rows.jsonl", "events.out.tfevents.1", "scores.npz", "notes.txt")


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


@pytest.fixture
def student(llava: Pair, tmp_path: Path) -> Path:
    """A copy of the student's folder, to be changed."""
    return Path(shutil.copytree(llava.student, tmp_path / "student"))


@pytest.mark.slow
def test_run__student_with_foreign_files__known_files_saved(
    llava: Pair, student: Path, tmp_path: Path, umask: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A generation config that transformers reads and refuses to write, files of other tools, a umask of its own."""
    (student / "generation_config.json").write_bytes(GREEDY)
    for name in JUNK:
        (student / name).write_text("secret")
    (student / "additional_chat_templates").mkdir()
    (student / "additional_chat_templates/tools.jinja").write_text("{{ tools }}")
    out = run(llava, tmp_path / "out", model=str(student), max_steps=1).checkpoint
    assert (out / "generation_config.json").read_bytes() == GREEDY
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "grace/probe.safetensors",
        RECORD,
        "model.safetensors",
        "processor_config.json",
        "recipe.yaml",
        "run.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
        "verification.json",
    }
    assert caplog.text.count("not copied from the student's folder") == 1
    assert all(name in caplog.text for name in JUNK)
    assert {oct(path.stat().st_mode & 0o777) for path in out.rglob("*")} == {"0o640", "0o750"}
    assert not [path for path in out.rglob("*") if path.is_file() and str(tmp_path).encode() in path.read_bytes()]
    record = json.loads((out / RECORD).read_text())
    assert (record["student"]["name"], record["teacher"]["name"], record["processor"]) == (
        "student",
        "teacher",
        "source",
    )
    assert set(record["student"]["fingerprint"]) == {"config.json", "model.safetensors"}
    assert "path" not in record["student"]
    assert grace_plugin.verify(out, source=student)["verified"]


@pytest.mark.slow
def test_run__record_paths__local_paths_kept(llava: Pair, tmp_path: Path) -> None:
    out = run(llava, tmp_path / "out", max_steps=1, record_paths=True).checkpoint
    record = json.loads((out / RECORD).read_text())
    assert record["student"]["path"] == str(llava.student) and record["teacher"]["path"] == str(llava.teacher)
    assert f"model: {llava.teacher}" in (out / "recipe.yaml").read_text()


def changed_processor(pair: Pair, *, side: int = 56) -> Any:
    """The student's processor with another chat template, another size of images if asked for, and traces of use."""
    processor = AutoProcessor.from_pretrained(pair.student)
    processor.chat_template = processor.chat_template.replace("ASSISTANT:", "HELPER:")
    processor.image_processor.size = {"shortest_edge": side}
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    return processor


@pytest.mark.slow
def test_run__given_processor__saved_and_proven(llava: Pair, tmp_path: Path) -> None:
    processor = changed_processor(llava, side=64)
    assert processor.chat_template != AutoProcessor.from_pretrained(llava.student).chat_template
    out = run(llava, tmp_path / "out", processor=processor, teacher_processor=processor, max_steps=1).checkpoint
    served = AutoProcessor.from_pretrained(out)
    one = make_samples(1, seed=5)
    trained, again = ConversationCollator(processor)(one), ConversationCollator(served)(one)
    assert torch.equal(trained["input_ids"], again["input_ids"]) and torch.equal(
        trained["pixel_values"], again["pixel_values"]
    )
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    assert (tokenizer["truncation"], tokenizer["padding"]) == (None, None)
    assert json.loads((out / RECORD).read_text())["processor"] == "given"
    found = grace_plugin.verify(out, source=llava.student)
    assert found["processor_files"] == 4 and "not the source's" in found["source_note"]
    (out / "chat_template.jinja").write_text("other")
    with pytest.raises(VerificationError, match=r"changed after the run: chat_template\.jinja"):
        grace_plugin.verify(out)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["upstream", "ours", "session"])
def test_entry_points__given_processor__saved(llava: Pair, tmp_path: Path, entry: str) -> None:
    processor, out = changed_processor(llava), tmp_path / "out"
    recipe = recipe_text(llava.teacher, oneshot=ONESHOT)
    if entry == "upstream":
        upstream_oneshot(
            model=loaded(llava),
            recipe=recipe,
            dataset=loader(llava),
            pipeline="grace",
            output_dir=str(out),
            processor=processor,
        )
    elif entry == "ours":
        grace_plugin.oneshot(
            str(llava.student),
            recipe=recipe,
            dataset=make_samples(4),
            output_dir=out,
            processor=processor,
            batch_size=2,
        )
    else:
        student = loaded(llava).train()
        batch = ConversationCollator(processor)(make_samples(1))
        with grace_plugin.grace_session(student, recipe, total_steps=1, processor=processor, output_dir=out) as grace:
            grace.objective.begin_step([batch])
            grace.objective.compute_loss(student, batch).backward()
            grace.objective.reduce_metrics()
            grace.objective.end_step()
            grace.save(out)
    assert "HELPER:" in (out / "chat_template.jinja").read_text()
    assert grace_plugin.verify(out)["files_not_proven"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_plan_processor__students_own_after_use__copied_byte_for_byte(family: str, pair_of: Any) -> None:
    """Also after it was used with padding and truncation, and loaded again."""
    source = pair_of(family).student
    processor = AutoProcessor.from_pretrained(source)
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=5)
    assert processor.tokenizer.backend_tokenizer.truncation is not None
    for given in (processor, processor.tokenizer, None):
        planned = plan_processor(source, given, 10**6)
        assert planned.kind == "source"
        assert planned.files == {p.name: p.read_bytes() for p in processor_files(source)}


def test_plan_processor__changed_tokenizer_alone__image_processor_kept(llava: Pair) -> None:
    tokenizer = AutoProcessor.from_pretrained(llava.student).tokenizer
    tokenizer.add_tokens(["<box>"])
    planned = plan_processor(llava.student, tokenizer, 10**6)
    assert planned.kind == "given" and b"<box>" in planned.files["tokenizer.json"]
    assert planned.files["processor_config.json"] == (llava.student / "processor_config.json").read_bytes()


@pytest.mark.slow
def test_plan_processor__tokens_beyond_the_embedding__refused_by_name(llava: Pair, tmp_path: Path) -> None:
    processor = AutoProcessor.from_pretrained(llava.student)
    processor.tokenizer.add_tokens(["<box>", "</box>"])
    with pytest.raises(
        ValueError, match=r"the processor has 2 tokens beyond the 383 rows of .*'<box>' \(383\), '</box>' \(384\)"
    ):
        run(llava, tmp_path / "out", processor=processor)
    assert not (tmp_path / "out").exists()


def broken_generation(student: Any) -> None:
    student.generation_config.temperature = 0.5  # with do_sample false: transformers refuses to write it


def broken_config(student: Any) -> None:
    student.config.top_k = 3
    student.config.do_sample = True


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (broken_generation, "the student's generation_config cannot be saved: .*; repair it first"),
        (broken_config, "the student's config cannot be saved: .*"),
    ],
)
def test_rehearse_save__config_not_writable__refused_before_the_first_step(
    llava: Pair, tmp_path: Path, break_it: Any, message: str
) -> None:
    student = loaded(llava)
    break_it(student)
    with pytest.raises(ValueError, match=message) as caught:
        rehearse_save(student, modifier_of(recipe_text(llava.teacher)), output_dir=tmp_path / "out")
    assert len(str(caught.value).splitlines()) == 1 and list(tmp_path.iterdir()) == []


def test_plan_processor__not_savable__refused(llava: Pair) -> None:
    class Broken:
        tokenizer = None

        def save_pretrained(self, folder: str) -> None:
            raise RuntimeError("no vocabulary file")

    with pytest.raises(ValueError, match=r"the processor cannot be saved: no vocabulary file; repair"):
        plan_processor(llava.student, Broken(), 10)


def test_rehearse_save__broken_generation_config__refused(llava: Pair, student: Path) -> None:
    (student / "generation_config.json").write_text("{")
    model = loaded(llava)
    model.config._name_or_path = model.name_or_path = str(student)
    with pytest.raises(ValueError, match=r"generation_config\.json cannot be read: .*; repair or remove it"):
        rehearse_save(model, modifier_of(recipe_text(llava.teacher)))


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "tokenizer.model",
        "spiece.model",
        "qwen.tiktoken",
        "tekken.json",
        "chat_template.json",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "processor_config.json",
        "video_preprocessor_config.json",
    ],
)
def test_is_processor_file__known_names__true(name: str) -> None:
    assert is_processor_file(name)


def test_left_out__files_of_other_tools__named(tmp_path: Path) -> None:
    names = ("adapter_config.json", "hf_quant_config.json", *JUNK)
    for name in (
        *names,
        "model-00001-of-2.safetensors",
        "config.json",
        "README.md",
        ".gitattributes",
        "generation_config.json",
    ):
        (tmp_path / name).write_text("x")
    assert left_out(tmp_path) == sorted(names)
    assert processor_files(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("teacher: {model: /data/models/big, cache: /scratch/states}", "teacher: {model: big, cache: states}"),
        ("teacher: ./models/big", "teacher: {model: big}"),
        ("teacher: {model: org/big}", "teacher: {model: org/big}"),
        ("a: {b: {teacher: {model: ~/big}}}", "a: {b: {teacher: {model: big}}}"),
    ],
)
def test_strip_paths__local_paths__removed_and_hub_ids_kept(tmp_path: Path, text: str, expected: str) -> None:
    import yaml

    (tmp_path / "recipe.yaml").write_text(text)
    strip_paths(tmp_path)
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text()) == yaml.safe_load(expected)
    assert not is_local("org/big") and is_local(str(tmp_path))


def test_checkpoint_bytes__llava__within_5_percent(llava: Pair, finished: Any) -> None:
    weights = (finished.folder / "model.safetensors").stat().st_size
    with grace_plugin.grace_session(loaded(llava), recipe_text(llava.teacher), total_steps=1) as grace:
        assert checkpoint_bytes(grace.student) == pytest.approx(weights, rel=0.05)
