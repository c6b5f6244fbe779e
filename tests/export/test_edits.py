"""`verify` finds every edit of a checkpoint, on the machine that wrote it and with another thread count, in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import grace_plugin
from grace_plugin.digest import file_digest
from grace_plugin.export import VerificationError
from grace_plugin.export.record import CONFIG, RECORD, VERIFICATION, read_sealed, write_sealed
from tests.conftest import Finished
from tests.export.edits import Edit, byte_edits, edited, field_edits, files_of, verdict
from tests.pairs import Pair, loaded, recipe_text
from tests.run.test_oneshot import one_step
from tests.tiny import build


@pytest.fixture(scope="module")
def copy(finished: Finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy for all edits of this file, each of which is taken back."""
    return Path(shutil.copytree(finished.folder, tmp_path_factory.mktemp("edits") / "copy"))


@pytest.mark.slow
@pytest.mark.parametrize("threads_of", ["same", "other"])
def test_verify__edited_bytes_and_fields__all_found(
    copy: Path, threads_of: str, request: pytest.FixtureRequest
) -> None:
    if threads_of == "other":
        request.getfixturevalue("threads")
    names = files_of(copy)
    edits = byte_edits(copy, len(names), seed=3) + field_edits(copy, 24, seed=4)
    assert {edit.file for edit in edits} == set(names)
    passed = []
    for edit in edits:
        told = verdict(copy, edit)
        if told is None:
            passed.append((edit.file, edit.what))
        else:
            assert Path(edit.file).name in told and len(told.splitlines()) == 1 and len(told) < 600
            assert told.startswith(f"{copy} is not what was trained: ")
    assert passed == []
    assert grace_plugin.verify(copy)["verified"]


def test_read_sealed__any_byte_changed__refused(tmp_path: Path) -> None:
    """Every byte with every bit turned over, and line ends made other line ends."""
    file = tmp_path / "record.json"
    write_sealed(file, {"a": [2.5, None], "n": float("nan")})
    content = file.read_bytes()
    assert read_sealed(file)["a"] == [2.5, None]
    for place in range(len(content)):
        for flip in (*(1 << bit for bit in range(8)), ord("\n") ^ ord("\r")):
            file.write_bytes(content[:place] + bytes([content[place] ^ flip]) + content[place + 1 :])
            with pytest.raises(ValueError, match=r"^record\.json "):
                read_sealed(file)


def set_field(content: bytes, path: str, value: Any) -> bytes:
    document = json.loads(content)
    *outer, last = path.split(".")
    place = document
    for key in outer:
        place = place[key]
    place[last] = value
    return (json.dumps(document, indent=2) + "\n").encode()


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("text_config.rope_parameters.rope_theta", 1e6, r"rope_theta \(recorded 10000\.0, found 1000000\.0\)"),
        ("text_config.rms_norm_eps", 0.1, r"rms_norm_eps \(recorded 1e-06, found 0\.1\)"),
        ("text_config.eos_token_id", 7, r"text_config\.eos_token_id"),
        ("text_config.max_position_embeddings", 9, r"text_config\.max_position_embeddings \(recorded 2048, found 9\)"),
        ("dtype", "float32", r"dtype \(recorded \"bfloat16\", found \"float32\"\)"),
        ("quantization_config.config_groups", {}, r"quantization_config\.config_groups"),
        ("extra", 1, r"extra \(recorded nothing, found 1\)"),
    ],
)
def test_verify__config_field_changed__named_with_both_values(copy: Path, field: str, value: Any, told: str) -> None:
    edit = Edit(CONFIG, field, lambda content: set_field(content, field, value))
    with edited(copy, edit), pytest.raises(VerificationError, match=f"config.json differs in .*{told}"):
        grace_plugin.verify(copy)


def test_verify__config_reformatted__named(copy: Path) -> None:
    edit = Edit(CONFIG, "spaces", lambda content: json.dumps(json.loads(content)).encode())
    assert "config.json holds the same values in other text" in str(verdict(copy, edit))


@pytest.mark.parametrize(
    "name",
    [
        "chat_template.json",
        "additional_chat_templates/tools.jinja",
        "added_tokens.json",
        "special_tokens_map.json",
        "adapter_config.json",
        "model-2.safetensors",
        "modeling_own.py",
        "grace/other",
        "LICENSE.safetensors",
        "NOTICE_of.py",
        ".gitignore",
        ".github/x.yaml",
        ".cache/other",
        "docs/README.md",
        "readme.md",
    ],
)
def test_verify__added_file__named(copy: Path, name: str) -> None:
    file = copy / name
    made = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")
    try:
        with pytest.raises(VerificationError, match=f"is not what was trained: not written by the run: {name}$"):
            grace_plugin.verify(copy)
    finally:
        file.unlink()
        if made:
            file.parent.rmdir()
        (copy / VERIFICATION).unlink()
    assert grace_plugin.verify(copy)["verified"]


def test_verify__files_of_the_hub_and_of_git__named_as_not_covered(copy: Path) -> None:
    for name in (
        "README.md", "LICENSE", ".gitattributes", ".git/config", ".git/objects/1", ".cache/huggingface/download/x.lock",
    ):  # fmt: skip
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("x")
    found = grace_plugin.verify(copy)
    assert found["verified"]
    named = [".cache/huggingface/*", ".git/*", ".gitattributes", "LICENSE", "README.md"]
    assert found["files_not_covered"] == named
    shutil.rmtree(copy / ".git")
    for name in ("README.md", "LICENSE", ".gitattributes"):
        (copy / name).unlink()
    shutil.rmtree(copy / ".cache")
    assert grace_plugin.verify(copy)["files_not_covered"] == []


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        (RECORD, b"{", r"record\.json is not JSON any more"),
        (RECORD, b"\xff\xfe", r"record\.json is not JSON any more"),
        (RECORD, b"[]", r"record\.json is not what GRACE writes: it holds a list"),
        (RECORD, b"{}", r"record\.json holds no hash of itself: an earlier version wrote it, or it was edited"),
        (RECORD, b"[" * 100_000, r"record\.json is not JSON any more"),
        (CONFIG, b"{", r"config\.json cannot be read"),
        ("model.safetensors", b"", r"the weights cannot be loaded"),
        ("model.safetensors", b"\xff" * 100, r"the weights cannot be loaded"),
        (VERIFICATION, b"{}", r"verification\.json holds no hash of itself"),
    ],
)
def test_verify__damaged_file__one_sentence(copy: Path, file: str, content: bytes, told: str) -> None:
    with edited(copy, Edit(file, "damaged", lambda _: content)), pytest.raises(VerificationError, match=told) as caught:
        grace_plugin.verify(copy)
    assert len(str(caught.value).splitlines()) == 1 and len(str(caught.value)) < 600


@pytest.mark.parametrize("cut", [8, 100, 10_000])
def test_verify__truncated_weights__named(copy: Path, cut: int) -> None:
    told = str(verdict(copy, Edit("model.safetensors", "cut", lambda content: content[:-cut])))
    assert "changed after the run: model.safetensors; the weights cannot be loaded: " in told


def test_verify__missing_weights__named(copy: Path) -> None:
    away = copy.parent / "away"
    (copy / "model.safetensors").rename(away)
    try:
        with pytest.raises(VerificationError, match=r"is not what was trained: missing: model\.safetensors$"):
            grace_plugin.verify(copy)
    finally:
        away.rename(copy / "model.safetensors")


@pytest.mark.parametrize(("key", "value"), [("layers", []), ("files", None), ("student", None), ("attention", 3)])
def test_verify__record_of_wrong_types__named(copy: Path, finished: Finished, key: str, value: Any) -> None:
    kept = (copy / RECORD).read_bytes()
    write_sealed(copy / RECORD, read_sealed(copy / RECORD) | {key: value})
    try:
        with pytest.raises(VerificationError, match="is not what was trained: ") as caught:
            grace_plugin.verify(copy, source=finished.pair.student)
        assert len(str(caught.value).splitlines()) == 1
    finally:
        (copy / RECORD).write_bytes(kept)


def reseal(folder: Path) -> None:
    """A record that knows the files as they are and another environment: what is left is the comparison of logits."""
    record = read_sealed(folder / RECORD)
    record["files"] = {name: file_digest(folder / name) for name in record["files"]}
    record["environment"] |= {"device": "another"}
    write_sealed(folder / RECORD, record)


def test_logit_bound__other_kernels_and_another_rope_theta__told_apart(finished: Finished, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(finished.folder, tmp_path / "copy"))
    reseal(folder)
    with torch.backends.mkldnn.flags(enabled=False):
        found = grace_plugin.verify(folder)
    assert found["verified"] and not found["logits_equal"]
    assert found["logits_largest_difference"] < 0.5 * found["logits_bound"]
    config = folder / CONFIG
    config.write_bytes(set_field(config.read_bytes(), "text_config.rope_parameters.rope_theta", 20_000.0))
    reseal(folder)
    with pytest.raises(VerificationError, match="logits_within_bound"):
        grace_plugin.verify(folder)
    found = json.loads((folder / VERIFICATION).read_text())
    assert found["logits_largest_difference"] > 2 * found["logits_bound"]


def test_verify__source_missing_or_another_student__error(copy: Path, finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match=r"there is no source folder .*nowhere; give the folder of the BF16 student"
    ):
        grace_plugin.verify(copy, source=tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"teacher is not the student that the run trained from \(student\): config\.json"
    ):
        grace_plugin.verify(copy, source=finished.pair.teacher)
    with pytest.raises(ValueError, match=r"is not the student that the run trained from \(student\): config\.json"):
        grace_plugin.verify(copy, source=tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder; give the folder of a checkpoint"):
        grace_plugin.verify(tmp_path / "nowhere")


def test_verify__read_only_folder__verified_without_a_file(finished: Finished, tmp_path: Path) -> None:
    place = tmp_path / "mounted"
    place.mkdir()
    for command in (["mount", "--bind", finished.folder, place], ["mount", "-o", "remount,bind,ro", place]):
        made = subprocess.run([str(part) for part in command], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mounting is not permitted here: {made.stderr.strip()}")
    try:
        found = grace_plugin.verify(place)
        assert found["verified"]
        assert found["verification_note"] == "verification.json could not be written: Read-only file system"
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)  # weights may still be mapped


@pytest.mark.slow
def test_verify__processor_saved_afterwards__named_as_not_proven(llava: Pair, tmp_path: Path) -> None:
    """Somebody who calls the model's own `save_pretrained` may save a processor of their own into the folder."""
    student, out = loaded(llava), tmp_path / "out"
    with grace_plugin.grace_session(student, recipe_text(llava.teacher), total_steps=1) as grace:
        one_step(grace, student, llava)
        grace.save(tmp_path / "proven")
    student.save_pretrained(str(out))
    assert grace_plugin.verify(out)["processor_files_changed"] == []
    _, processor = build("llava")
    processor.chat_template = "{{ messages[0]['content'] }}"
    processor.save_pretrained(out)
    (out / "special_tokens_map.json").write_text("{}")
    found = grace_plugin.verify(out)
    assert found["verified"] and "chat_template.jinja" in found["processor_files_changed"]
    assert found["files_not_proven"] == [
        "chat_template.jinja",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert grace_plugin.verify(tmp_path / "proven")["files_not_proven"] == []
