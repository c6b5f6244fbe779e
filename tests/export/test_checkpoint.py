"""Verification: every kind of change is found, and a failed proof leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import grace_plugin
from grace_plugin.data import ConversationCollator
from grace_plugin.digest import file_digest, tensor_digest
from grace_plugin.export import VerificationError
from grace_plugin.export.probe import POSITIONS, probe_logits, read_probe
from grace_plugin.export.processor import processor_files, source_folder
from grace_plugin.export.record import PROBE, RECORD, VERIFICATION, write_sealed
from grace_plugin.export.verify import LOGIT_BOUND
from tests.conftest import Finished
from tests.pairs import Pair, loaded, recipe_text, run
from tests.report.checkpoints import change, stored_name
from tests.tiny import FAMILIES, build, make_samples

LAYER = "model.language_model.layers.1.self_attn.q_proj"


@pytest.fixture
def copy(finished: Finished, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished.folder, tmp_path / "copy"))


def reseal(folder: Path, **changes: Any) -> None:
    """Write a record as somebody would who knows how: hashes of the files as they are, so that later proofs decide."""
    record = json.loads((folder / RECORD).read_text()) | changes
    record["files"] = {name: file_digest(folder / name) for name in record["files"]}
    write_sealed(folder / RECORD, record)


def failed(folder: Path) -> list[str]:
    """Names of the proofs that failed; the verdict on disk says the same."""
    with pytest.raises(VerificationError, match="is not what was trained"):
        grace_plugin.verify(folder)
    verdict = json.loads((folder / VERIFICATION).read_text())
    assert verdict["verified"] is False
    return verdict["failed"]


def test_verify__untouched_checkpoint__all_proofs(copy: Path) -> None:
    found = grace_plugin.verify(copy)
    assert found["verified"] and found["failed"] == []
    assert (found["layers"], found["layers_stored"]) == (21, 21)
    assert (found["layers_with_other_codes"], found["layers_with_other_scales"]) == (0, 0)
    assert "codes_differing" not in found and "scales_differing" not in found  # hashes count no codes
    assert found["forward_weights_differing"] == 0
    model, _ = build("llava")
    decoder = [m.weight.numel() for m in model.model.language_model.layers.modules() if isinstance(m, nn.Linear)]
    assert found["codes"] == sum(decoder)
    assert found["logits_equal"] and found["logits_compared"] > 0 and found["probe"] == "synthetic image"
    assert found["weights_differing"] == 0
    assert found["processor_files"] == 4 and found["processor_files_changed"] == []
    verdict = json.loads((copy / VERIFICATION).read_text())
    assert len(verdict.pop("sha256")) == 64 and verdict == found


def flip_last_bit(tensor: torch.Tensor) -> None:
    tensor.view(-1)[3:4].view(torch.int16 if tensor.dtype == torch.bfloat16 else torch.int32).bitwise_xor_(1)


@pytest.mark.parametrize(
    ("ending", "expected"),
    [
        ("layers.1.self_attn.q_proj.weight_packed", "layers_with_other_codes"),
        ("layers.1.self_attn.q_proj.weight_scale", "layers_with_other_scales"),
        ("layers.2.input_layernorm.weight", "dense_differing"),
        ("multi_modal_projector.linear_1.bias", "dense_differing"),
        ("lm_head.weight", "dense_differing"),
    ],
)
def test_verify__one_changed_bit__found(copy: Path, ending: str, expected: str) -> None:
    change(copy, ending, flip_last_bit)
    assert expected in failed(copy)


def test_verify__one_changed_layer__named(copy: Path) -> None:
    change(copy, "layers.1.self_attn.q_proj.weight_packed", flip_last_bit)
    failed(copy)
    found = json.loads((copy / VERIFICATION).read_text())
    assert found["layers_differing"] == [LAYER]
    assert (found["layers_with_other_codes"], found["layers_with_other_scales"]) == (1, 0)


def test_verify__missing_probe__named(copy: Path) -> None:
    (copy / PROBE).unlink()
    assert failed(copy) == ["files_missing"]
    with pytest.raises(VerificationError, match=r"is not what was trained: missing: grace/probe\.safetensors$"):
        grace_plugin.verify(copy)


@pytest.mark.parametrize("gone", [False, True])
def test_verify__processor_file_changed_or_missing__found(copy: Path, gone: bool) -> None:
    file = copy / "tokenizer_config.json"
    if gone:
        file.unlink()
        file = copy / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    assert failed(copy) == ["processor_files_changed"]
    names = ["chat_template.jinja", "tokenizer_config.json"] if gone else ["tokenizer_config.json"]
    assert json.loads((copy / VERIFICATION).read_text())["processor_files_changed"] == names


def test_verify__source_with_other_processor_files__found(finished: Finished, copy: Path, tmp_path: Path) -> None:
    source = Path(shutil.copytree(finished.pair.student, tmp_path / "source"))
    assert grace_plugin.verify(copy, source=source)["processor_files"] == 4
    (source / "chat_template.jinja").write_text("other")
    with pytest.raises(VerificationError, match=r"processor files are not the source's: chat_template\.jinja"):
        grace_plugin.verify(copy, source=source)


def test_verify__changed_logits_same_environment__found(copy: Path) -> None:
    tensors = load_file(copy / PROBE)
    tensors["logits"].view(-1)[0] += 1.0
    save_file(tensors, copy / PROBE)
    assert failed(copy) == ["files_changed"]
    reseal(copy)
    assert failed(copy) == ["logits_equal"]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_verify__run_of_text_alone__verified_on_an_image_too(family: str, pair_of: Any, tmp_path: Path) -> None:
    result = run(pair_of(family), tmp_path / "out", make_samples(4, images=0), max_steps=1)
    for found in (result.verification, grace_plugin.verify(result.checkpoint)):
        assert (found["verified"], found["logits_equal"], found["weights_differing"]) == (True, True, 0)
        assert found["logits_compared"] > 0
    probe, _ = read_probe(result.checkpoint / PROBE)
    assert "pixel_values" in probe
    tensors = load_file(result.checkpoint / PROBE)
    tensors["logits"].view(-1)[0] += 1.0
    save_file(tensors, result.checkpoint / PROBE)
    reseal(result.checkpoint)
    assert failed(result.checkpoint) == ["logits_equal"]


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", {"text_config": "eager", "vision_config": "sdpa"}])
def test_verify__attention_of_the_run__used_for_the_logits(llava: Pair, tmp_path: Path, attention: Any) -> None:
    student = loaded(llava)
    student.set_attn_implementation(attention)
    result = run(llava, tmp_path / "out", model=student)
    assert result.verification["logits_equal"]
    found = grace_plugin.verify(result.checkpoint)
    assert found["logits_equal"]
    recorded = json.loads((result.checkpoint / RECORD).read_text())["attention"]
    assert recorded == {
        "": "eager" if attention == "eager" else "sdpa",
        "text_config": "eager",
        "vision_config": "eager" if attention == "eager" else "sdpa",
    }


@pytest.mark.parametrize(("added", "verified"), [(0.002, True), (1.0, False)])
def test_verify__another_environment__logits_within_the_bound(copy: Path, added: float, verified: bool) -> None:
    tensors = load_file(copy / PROBE)
    largest = tensors["logits"].abs().max().item()
    tensors["logits"] += added * largest
    save_file(tensors, copy / PROBE)
    record = json.loads((copy / RECORD).read_text())
    reseal(copy, environment=record["environment"] | {"device": "another"})
    if verified:
        found = grace_plugin.verify(copy)
    else:
        assert failed(copy) == ["logits_within_bound"]
        found = json.loads((copy / VERIFICATION).read_text())
    assert not found["logits_equal"]
    assert found["logits_bound"] == pytest.approx(LOGIT_BOUND["bfloat16"] * largest * (1 + added), rel=0.02)
    assert "another environment" in found["logits_note"]


def test_verify__layer_not_in_the_record__found(copy: Path) -> None:
    record = json.loads((copy / RECORD).read_text())
    record["layers"]["model.no_such_layer"] = record["layers"].pop(LAYER)
    (copy / RECORD).write_text(json.dumps(record))
    assert failed(copy) == ["record"]
    reseal(copy, layers=record["layers"])
    assert {"layers_with_other_codes", "layers_with_other_scales"} <= set(failed(copy))


def test_verify__no_record__refused(copy: Path) -> None:
    (copy / RECORD).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{copy} holds no grace/record\.json: it was not written by GRACE"):
        grace_plugin.verify(copy)


def test_checkpoint__processor_files__byte_for_byte_the_sources(finished: Finished) -> None:
    names = {path.name for path in processor_files(finished.pair.student)}
    assert names == {"tokenizer.json", "tokenizer_config.json", "processor_config.json", "chat_template.jinja"}
    for name in names:
        assert (finished.folder / name).read_bytes() == (finished.pair.student / name).read_bytes()


def test_probe__logits__those_of_the_reloaded_model_at_supervised_positions(finished: Finished) -> None:
    probe, expected = read_probe(finished.folder / PROBE)
    model = AutoModelForImageTextToText.from_pretrained(finished.folder, dtype="auto").eval()
    with torch.no_grad():
        logits = model(**{k: v for k, v in probe.items() if k != "labels"}).logits
    places = (probe["labels"][:, 1:] != -100).nonzero().tolist()[:POSITIONS]
    assert torch.equal(expected, torch.stack([logits[b, s] for b, s in places]))
    assert "pixel_values" in probe


def test_probe_logits__no_labels__last_positions() -> None:
    model, processor = build("llava")
    batch = ConversationCollator(processor)(make_samples(1))
    del batch["labels"]
    model.train()
    found = probe_logits(model, batch)
    assert model.training
    with torch.no_grad():
        assert torch.equal(found, model.eval()(**batch).logits[0, -POSITIONS:])


@pytest.mark.slow
def test_run__twice__same_bytes(finished: Finished, tmp_path: Path) -> None:
    """Also: a saved recipe run again, with the teacher's path that it does not publish, gives the same run."""
    again = run(
        finished.pair,
        tmp_path / "out",
        finished.dataset,
        recipe=finished.folder / "recipe.yaml",
        max_steps=8,
        gradient_accumulation_steps=2,
        logging_steps=1,
        teacher=finished.pair.teacher,
    )
    records = [json.loads((folder / RECORD).read_text()) for folder in (finished.folder, again.checkpoint)]
    for record in records:  # run.yaml says that the second was given a recipe and a teacher in another way
        del record["files"]["run.yaml"], record["sha256"]
    assert records[0] == records[1]
    for name in ("model.safetensors", "config.json", "recipe.yaml", PROBE):
        ours, theirs = (
            hashlib.sha256((folder / name).read_bytes()).hexdigest() for folder in (finished.folder, again.checkpoint)
        )
        assert ours == theirs, name


def test_checkpoint__codes__differ_from_rounding_to_nearest(finished: Finished) -> None:
    """Training moved them: the checkpoint is not round-to-nearest of the source."""
    scale = load_file(finished.folder / "model.safetensors")[
        stored_name(finished.folder, "layers.0.mlp.up_proj.weight_scale")
    ]
    weight = load_file(finished.pair.student / "model.safetensors")[
        stored_name(finished.pair.student, "layers.0.mlp.up_proj.weight")
    ]
    assert scale.shape == (weight.shape[0], weight.shape[1] // 128)
    assert scale.dtype == torch.bfloat16
    largest = weight.unflatten(1, (-1, 128)).abs().amax(-1) / 7
    assert not torch.equal(scale, largest)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint__loaded_by_transformers__no_missing_or_unexpected_keys(
    family: str, pair_of: Any, tmp_path: Path
) -> None:
    """The rewritten ignore list maps back; the stock one crashes here for LLaVA and Qwen2-VL."""
    result = run(pair_of(family), tmp_path / "out", max_steps=1)
    model, report = AutoModelForImageTextToText.from_pretrained(
        result.checkpoint, dtype="auto", output_loading_info=True
    )
    assert {key: list(value) for key, value in report.items() if value} == {}
    config = json.loads((result.checkpoint / "config.json").read_text())["quantization_config"]
    assert config["format"] == "pack-quantized"
    assert all(entry.startswith("re:") for entry in config["ignore"])
    packed = {name for name, module in model.named_modules() if hasattr(module, "weight_packed")}
    assert len(packed) == 21 and all(".language_model." in name for name in packed)
    AutoProcessor.from_pretrained(result.checkpoint)


@pytest.mark.slow
def test_save__proof_fails__nothing_is_left(finished: Finished, tmp_path: Path) -> None:
    """A student whose save path is broken: one packed code of the file is changed before it is verified."""
    student = AutoModelForImageTextToText.from_pretrained(finished.pair.student, dtype=torch.float32)

    class Broken(type(student)):
        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
            out = super().save_pretrained(save_directory, *args, **kwargs)
            change(Path(save_directory), "layers.0.mlp.up_proj.weight_packed", flip_last_bit)
            return out

    student.__class__ = Broken
    with pytest.raises(VerificationError, match=r'codes_differing.*"codes_differing": 1,'):
        run(finished.pair, tmp_path / "o/out", model=student)
    assert {path.name for path in (tmp_path / "o").iterdir()} <= {"out.run"}


def test_digest__other_bytes_shape_or_dtype__differs() -> None:
    tensor = torch.arange(6, dtype=torch.int8)
    others = [tensor.view(2, 3), tensor.view(torch.uint8), tensor.flip(0)]
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert len({tensor_digest(t) for t in (tensor, *others)}) == 4
    assert tensor_digest(torch.arange(12).view(3, 4).T) == tensor_digest(torch.arange(12).view(3, 4).T.contiguous())


def test_source_folder__no_such_model__named() -> None:
    with pytest.raises(ValueError, match="cannot find the processor files of 'no/such-model'"):
        source_folder("no/such-model")


def test_checkpoint__recipe__holds_inferred_values_and_no_paths(finished: Finished) -> None:
    text = (finished.folder / "recipe.yaml").read_text()
    assert r"re:(.*\.)?vision_tower\..*" in text
    assert "model: teacher\n" in text and str(finished.pair.teacher) not in text
    assert "!!python" not in text and recipe_text(finished.pair.teacher) != text
