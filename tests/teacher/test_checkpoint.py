"""What a checkpoint is known by, and its head read alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from grace_plugin.teacher.checkpoint import open_checkpoint
from grace_plugin.teacher.store import differences
from tests.pairs import Pair
from tests.tiny import EVERY, build


def folder_with(path: Path, tensors: dict[str, torch.Tensor], **config: object) -> str:
    path.mkdir()
    model, _ = build("llava")
    model.config.save_pretrained(path)
    written = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps(written))
    save_file(tensors, path / "model.safetensors")
    return str(path)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "qwen3_vl_moe"])
def test_head__by_family__that_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    assert family in EVERY
    model, _ = build(family)
    model.save_pretrained(tmp_path)
    weight, bias = open_checkpoint(str(tmp_path)).head("float32")
    assert torch.equal(weight, model.get_output_embeddings().weight) and bias is None


def test_head__with_bias__in_the_given_dtype(tmp_path: Path) -> None:
    weight, bias = torch.randn(8, 4), torch.randn(8)
    tensors = {"language_model.lm_head.weight": weight, "language_model.lm_head.bias": bias, "a.weight": torch.zeros(2)}
    source = open_checkpoint(folder_with(tmp_path / "t", tensors, dtype=None))
    assert all(torch.equal(a, b) for a, b in zip(source.head("auto"), (weight, bias), strict=True))
    assert source.dtype("auto") == torch.float32
    half = source.head("bfloat16")
    assert half[1] is not None and {half[0].dtype, half[1].dtype} == {torch.bfloat16}


def test_head__none_or_two__refused(tmp_path: Path) -> None:
    two = {"a.lm_head.weight": torch.zeros(2, 2), "b.lm_head.weight": torch.zeros(2, 2)}
    with pytest.raises(ValueError, match="2 tensors that could be its head"):
        open_checkpoint(folder_with(tmp_path / "two", two)).head("auto")
    with pytest.raises(ValueError, match=r"neither lm_head\.weight nor embed_tokens\.weight"):
        open_checkpoint(folder_with(tmp_path / "none", {"a.weight": torch.zeros(2)})).head("auto")
    (tmp_path / "none/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors; its head is read from safetensors"):
        open_checkpoint(str(tmp_path / "none")).head("auto")


def test_fingerprint__folder_and_snapshot__content_and_commit(llava: Pair, tmp_path: Path) -> None:
    first = open_checkpoint(str(llava.teacher)).fingerprint()
    assert sorted(first) == ["config.json", "model.safetensors"]
    moved = shutil.copytree(llava.teacher, tmp_path / "moved")
    assert open_checkpoint(str(moved)).fingerprint() == first
    content = bytearray((moved / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (moved / "model.safetensors").write_bytes(content)
    changed = open_checkpoint(str(moved)).fingerprint()
    assert differences(first, changed).startswith("model.safetensors: ")
    (moved / "model.safetensors").write_bytes(content + b" ")
    with pytest.raises(
        ValueError, match=r"cannot read .*model\.safetensors of the teacher: .*; fetch or save it again"
    ):
        open_checkpoint(str(moved)).fingerprint()
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = shutil.copytree(llava.teacher, tmp_path / "models--a--b/snapshots" / commit)
    assert open_checkpoint(str(snapshot)).fingerprint() == {"commit": commit}
