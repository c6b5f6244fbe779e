"""Prove that a checkpoint on disk is what was trained, bit for bit.

Five proofs: the packed codes and the scales on disk are those of the forward pass with the final weights (at the end of a run
counted element by element, `codes_differing`; later by hash, `layers_with_other_codes`); the weights that the loaded model
computes with are `code * scale` in the stored dtype; every other weight is the trained one (by hash); the loaded model's logits
on the probe are finite and the trained model's (a checkpoint without its probe fails); tokenizer and processor files are the
source's (reported only, where upstream or a user called `save_pretrained`). A failed
proof raises, and at the end of a run nothing is left at the destination.

That the forward pass multiplies by those codes and scales was compared before they were baked (`objective.freeze`);
`forward_weights_differing` repeats what the run recorded.

Logits are compared bit by bit where the environment is the one that wrote the record; elsewhere their largest difference is
reported and does not decide, because kernels differ between machines.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_plugin.artifact.layout import (
    PROBE,
    RECORD,
    VERIFICATION,
    dense_digests,
    digest,
    environment,
    file_digest,
    processor_files,
)
from grace_plugin.artifact.probe import check_finite, probe_logits, read_probe
from grace_plugin.artifact.ranks import is_writer
from grace_plugin.quantizer.fake_quant import dequantize
from grace_plugin.upstream import unpack_from_int32
from grace_plugin.vlm import FAMILIES

__all__ = ["VerificationError", "check_against_run", "verify"]


class VerificationError(RuntimeError):
    """A checkpoint is not what was trained; the message lists the proofs that failed."""


def load(folder: Path) -> Any:
    """The checkpoint as transformers loads it: quantized layers still packed, dtype as stored."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with FAMILIES[AutoConfig.from_pretrained(folder).model_type].reading():
        return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


def each_packed_layer(model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Name, codes (int8 [out, in]) and scales [out, groups] of every layer loaded in packed form, one after the other."""
    for name, module in model.named_modules():
        if getattr(module, "weight_packed", None) is None:
            continue
        bits = module.quantization_scheme.weights.num_bits
        shape = torch.Size(module.weight_shape.tolist())
        yield name, unpack_from_int32(module.weight_packed, bits, shape), module.weight_scale.detach()


def packed_layers(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Copies of codes and scales of every layer loaded in packed form, by module name."""
    return {name: (codes.clone(), scales.clone()) for name, codes, scales in each_packed_layer(model)}


def check_against_run(folder: Path, frozen: dict[str, tuple[Tensor, Tensor]], source: Path) -> dict[str, Any]:
    """Verify a checkpoint against the codes and scales in memory, element by element, and write `verification.json`.

    Raises:
        VerificationError: lists the proofs that failed.
    """
    model = load(folder)
    stored = packed_layers(model)
    codes_differing = scales_differing = 0
    for name, (codes, scales) in frozen.items():
        found_codes, found_scales = stored.get(name, (codes.new_full((1,), -128), scales.new_full((1,), -1)))
        codes_differing += _differing(codes, found_codes)
        scales_differing += _differing(scales, found_scales)
    result = {
        "layers": len(frozen),
        "layers_stored": len(stored),
        "codes": sum(codes.numel() for codes, _ in frozen.values()),
        "codes_differing": codes_differing,
        "scales_differing": scales_differing,
    }
    return _conclude(folder, result, model, stored, source, recorded_here=True)


def verify(checkpoint: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Verify a checkpoint on disk against the record its run left in it, and write `verification.json`.

    Args:
        checkpoint: folder written by `train` or `oneshot`.
        source: folder of the BF16 student, to compare processor files with as well as with their recorded hashes.

    Raises:
        FileNotFoundError: the folder holds no GRACE record.
        VerificationError: lists the proofs that failed.
    """
    folder = Path(checkpoint)
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD}: it was not written by GRACE, or the run did not end")
    record = json.loads((folder / RECORD).read_text())
    model = load(folder)
    stored = packed_layers(model)
    missing = [name for name in record["layers"] if name not in stored]
    hashes = {name: {"codes": digest(c), "scales": digest(s)} for name, (c, s) in stored.items()}
    differing = {
        kind: [
            name for name in record["layers"] if name in stored and hashes[name][kind] != record["layers"][name][kind]
        ]
        for kind in ("codes", "scales")
    }
    result: dict[str, Any] = {
        "layers": len(record["layers"]),
        "layers_stored": len(stored),
        "codes": sum(codes.numel() for codes, _ in stored.values()),
        "layers_with_other_codes": len(differing["codes"]) + len(missing),
        "layers_with_other_scales": len(differing["scales"]) + len(missing),
        "layers_differing": sorted({*differing["codes"], *differing["scales"], *missing}),
    }
    here = environment() == record["environment"]
    original = Path(record["source"]) if source is None and "processor_files" not in record else source
    compared = Path(original) if original is not None and Path(original).is_dir() else None
    return _conclude(folder, result, model, stored, compared, recorded_here=here)


def _differing(expected: Tensor, found: Tensor) -> int:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return expected.numel()
    return int((expected != found.to(expected.device)).sum())


def _check_processor(folder: Path, record: dict[str, Any], source: Path | None, result: dict[str, Any]) -> list[str]:
    """Compare processor files with their recorded hashes and with a given source; the name of the proof if it failed."""
    expected = list(record.get("processor_files", {}).items())  # none where upstream's own oneshot saved
    if source is not None:
        expected += [(file.name, file_digest(file)) for file in processor_files(source)]
    if not expected:
        return []
    found = {name: file_digest(folder / name) for name, _ in expected if (folder / name).is_file()}
    changed = sorted({name for name, sha in expected if found.get(name) != sha})
    result["processor_files"], result["processor_files_changed"] = len({name for name, _ in expected}), changed
    return ["processor_files_changed"] if changed and "processor_files" in record else []


def _compare_logits(
    folder: Path, record: dict[str, Any], model: Any, result: dict[str, Any], *, recorded_here: bool
) -> list[str]:
    """Run the model on the probe; the name of the proof if it failed. The first forward turns packed layers into dense ones.

    Another implementation of attention would round otherwise, so the recorded one runs, where it is sure to be there.
    """
    if recorded_here and "attention" in record:
        model.set_attn_implementation(record["attention"])
    if torch.cuda.is_available():  # kernels of another device would round otherwise
        model.to(record.get("logits_device", "cpu"))
    if not (folder / PROBE).is_file():
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=next(model.parameters()).device))
        result["logits_compared"] = 0
        result["logits_note"] = f"{PROBE}, which every run writes, is missing: there are no logits to compare"
        return ["logits_compared"]
    probe, expected = read_probe(folder / PROBE)
    logits = probe_logits(model, probe)
    result["logits_compared"] = logits.numel()
    result["probe"] = record.get("probe", "training batch")
    wrong = check_finite(logits, model, result["probe"])
    if wrong:
        result["logits_note"] = wrong
        return ["logits_finite"]
    result["logits_equal"] = torch.equal(logits, expected)
    if result["logits_equal"]:
        return []
    result["logits_largest_difference"] = float((logits.float() - expected.float()).abs().max())
    if recorded_here:
        return ["logits_equal"]
    result["logits_note"] = "recorded in another environment; the difference is reported and does not decide"
    return []


def _conclude(
    folder: Path,
    result: dict[str, Any],
    model: Any,
    stored: dict[str, tuple[Tensor, Tensor]],
    source: Path | None,
    *,
    recorded_here: bool,
) -> dict[str, Any]:
    """Logits, dense weights and processor files; then the verdict, written and raised."""
    counts = ("codes_differing", "scales_differing", "layers_with_other_codes", "layers_with_other_scales")
    failed = [key for key in counts if result.get(key)]
    record = json.loads((folder / RECORD).read_text())
    result["forward_weights_differing"] = record.get("forward", {}).get("weights_differing")
    found = dense_digests(model, set(stored))
    result["dense"] = len(record["dense"])
    result["dense_differing"] = sorted(
        name for name in record["dense"].keys() | found.keys() if record["dense"].get(name) != found.get(name)
    )
    failed += ["dense_differing"] if result["dense_differing"] else []
    if result["layers"] != result["layers_stored"]:
        failed.append("layers_stored")
    failed += _compare_logits(folder, record, model, result, recorded_here=recorded_here)
    modules = dict(model.named_modules())  # dense by now
    dense = ((modules[name].weight, dequantize(codes, scales)) for name, (codes, scales) in stored.items())
    result["weights_differing"] = sum(_differing(expected, found.detach()) for found, expected in dense)
    failed += ["weights_differing"] if result["weights_differing"] else []
    failed += _check_processor(folder, record, source, result)
    result["failed"] = failed
    result["verified"] = not failed
    if is_writer():
        (folder / VERIFICATION).write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        raise VerificationError(f"{folder} is not what was trained: {', '.join(failed)}; details: {json.dumps(result)}")
    return result
