"""Prove that a checkpoint on disk is what was trained, bit for bit.

First the files: the record has not been edited, every file of the folder is in it with the SHA-256 it was written with, and no
file is there that it does not know (a model card, a license and what git keeps aside). `config.json` is also compared field by
field, to name what was changed. Then the model: the packed codes and the scales on disk are those of the forward pass with the
final weights (at the end of a run counted element by element, `codes_differing`; later by hash, `layers_with_other_codes`); the
weights that the loaded model computes with are `code * scale` in the stored dtype; every other weight is the trained one (by
hash); the loaded model's logits on the probe are finite and the trained model's. A failed proof raises, and at the end of a run
nothing is left at the destination.

That the forward pass multiplies by those codes and scales was compared before they were baked (`objective.freeze`);
`forward_weights_differing` repeats what the run recorded.

Logits are compared bit by bit where the environment is the one that wrote the record. Elsewhere kernels add in another order,
so they are compared within `LOGIT_BOUND`.

What it does not prove: who wrote the checkpoint. Hashes find edits; whoever edits a file can write a new record as well.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from grace_plugin.digest import tensor_digest
from grace_plugin.export.probe import check_finite, probe_logits, read_probe
from grace_plugin.export.processor import first_line, processor_files
from grace_plugin.export.ranks import is_writer
from grace_plugin.export.record import (
    PROBE,
    RECORD,
    VERIFICATION,
    compare_files,
    dense_digests,
    environment,
    fingerprint,
    read_sealed,
    write_sealed,
)
from grace_plugin.quantizer.fake_quant import dequantize
from grace_plugin.upstream import unpack_from_int32
from grace_plugin.vlm import family_of

LOGIT_BOUND = {"bfloat16": 0.15, "float16": 0.02, "float32": 1e-4}
"""Largest difference of a logit in another environment, as a share of the largest recorded logit, by stored dtype.

Measured on random models of 3 and 24 layers, which amplify rounding more than trained ones: 1 to 8 threads differ by 0, other
kernels (without oneDNN) by up to 0.033 and 0.0072, another implementation of attention by up to 0.060 and 0.0084 (bfloat16,
float16). A doubled rope_theta differs by 0.43 and more.
"""


class VerificationError(RuntimeError):
    """A checkpoint is not what was trained; the message names the proofs that failed."""


def load(folder: Path) -> Any:
    """Load a checkpoint as transformers does: quantized layers still packed, dtype as stored."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    with family_of(AutoConfig.from_pretrained(folder)).loading_context():
        return AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()


def each_packed_layer(model: Any) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield name, codes (int8 [out, in]) and scales [out, groups] of every layer that is loaded in packed form."""
    for name, module in model.named_modules():
        if getattr(module, "weight_packed", None) is None:
            continue
        bits = module.quantization_scheme.weights.num_bits
        shape = torch.Size(module.weight_shape.tolist())
        yield name, unpack_from_int32(module.weight_packed, bits, shape), module.weight_scale.detach()


def packed_layers(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """Return copies of codes and scales of every layer that is loaded in packed form, by module name."""
    # copies, because the first forward pass replaces the packed tensors by dense weights
    return {name: (codes.clone(), scales.clone()) for name, codes, scales in each_packed_layer(model)}


def check_against_run(folder: Path, frozen: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Verify a checkpoint also against the codes and scales in memory, element by element; writes `verification.json`.

    Raises:
        VerificationError: lists the proofs that failed.
    """
    return _verify(folder, read_sealed(folder / RECORD), None, frozen)


def verify(checkpoint: str | Path, source: str | Path | None = None) -> dict[str, Any]:
    """Verify a checkpoint on disk against the record its run left in it, and write `verification.json` where that is possible.

    Args:
        checkpoint: folder written by `train` or `oneshot`.
        source: folder of the BF16 student. Its weights must be those that the run trained from, and processor files that the
            run took from it must be the same.

    Raises:
        FileNotFoundError: no such folder, no GRACE record in it, or no folder at `source`.
        ValueError: `source` is another student than the run's.
        VerificationError: one sentence for each proof that failed.
    """
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder; give the folder of a checkpoint that GRACE wrote")
    if not (folder / RECORD).is_file():
        raise FileNotFoundError(f"{folder} holds no {RECORD}: it was not written by GRACE, or the run did not end")
    if source is not None and not Path(source).is_dir():
        raise FileNotFoundError(
            f"there is no source folder {source}; give the folder of the BF16 student or leave it out"
        )
    try:
        record = read_sealed(folder / RECORD)
    except ValueError as error:
        return _conclude(folder, {"failed": ["record"]}, [str(error)])
    try:
        return _verify(folder, record, Path(source) if source is not None else None)
    except (KeyError, TypeError, AttributeError) as error:
        # whoever edits a record and computes its hash again may leave out any field
        sentence = f"{RECORD} is not what GRACE writes: {type(error).__name__} {str(error)[:100]}"
        return _conclude(folder, {"failed": ["record"]}, [sentence])


def _verify(
    folder: Path, record: dict[str, Any], source: Path | None, frozen: Mapping[str, tuple[Tensor, Tensor]] | None = None
) -> dict[str, Any]:
    result, sentences = compare_files(folder, record)
    if source is not None:
        sentences += _compare_source(folder, record, source, result)
    # changed weights are loaded all the same, to name the layers
    if set(result["failed"]) - {"weights_changed"}:
        return _conclude(folder, result, sentences)
    try:
        model = load(folder)
        stored = packed_layers(model)
    except Exception as error:  # safetensors, transformers and compressed-tensors raise anything for damaged weights
        result["failed"].append("load")
        return _conclude(folder, result, [*sentences, f"the weights cannot be loaded: {first_line(error)}"])
    missing = [name for name in record["layers"] if name not in stored]
    hashes = {name: {"codes": tensor_digest(c), "scales": tensor_digest(s)} for name, (c, s) in stored.items()}
    differing = {
        kind: [n for n in record["layers"] if n in stored and hashes[n][kind] != record["layers"][n][kind]]
        for kind in ("codes", "scales")
    }
    result |= {
        "layers": len(record["layers"]),
        "layers_stored": len(stored),
        "codes": sum(codes.numel() for codes, _ in stored.values()),
        "layers_with_other_codes": len(differing["codes"]) + len(missing),
        "layers_with_other_scales": len(differing["scales"]) + len(missing),
        "layers_differing": sorted({*differing["codes"], *differing["scales"], *missing}),
    }
    if frozen is not None:
        # a layer that was not stored differs in every element
        pairs = [(of_run, stored.get(name, (of_run[0].new_zeros(0),) * 2)) for name, of_run in frozen.items()]
        for place, kind in enumerate(("codes", "scales")):
            result[f"{kind}_differing"] = sum(_differing(of_run[place], found[place]) for of_run, found in pairs)
    _prove_model(record, result, model, stored, folder, recorded_here=environment() == record["environment"])
    return _conclude(folder, result, sentences)


def _differing(expected: Tensor, found: Tensor) -> int:
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return expected.numel()
    return int((expected != found.to(expected.device)).sum())


def _compare_source(folder: Path, record: dict[str, Any], source: Path, result: dict[str, Any]) -> list[str]:
    """Compare a given source with the student that the run recorded, and its processor files with the checkpoint's.

    Raises:
        ValueError: another student.
    """
    recorded, found = record["student"].get("fingerprint"), fingerprint(source)
    if found is None or (recorded is not None and found != recorded):
        names = sorted(
            name
            for name in {**(recorded or {}), **(found or {})}
            if (found or {}).get(name) != (recorded or {}).get(name)
        )
        raise ValueError(
            f"{source} is not the student that the run trained from ({record['student'].get('name')}): "
            f"{', '.join(names[:5]) or 'it holds no checkpoint'} differ{'' if len(names) > 1 else 's'}"
        )
    if record["processor"] != "source":
        result["source_note"] = "the run used another processor, so processor files are not the source's"
        return []
    names = [file.relative_to(source).as_posix() for file in processor_files(source)]
    changed = [n for n in names if not (folder / n).is_file() or (folder / n).read_bytes() != (source / n).read_bytes()]
    if not changed or result["files_not_proven"]:
        return []
    result["processor_files_changed"] = sorted({*result["processor_files_changed"], *changed})
    result["failed"] += [] if "processor_files_changed" in result["failed"] else ["processor_files_changed"]
    return [f"processor files are not the source's: {', '.join(changed)}"]


def _prove_model(
    record: dict[str, Any],
    result: dict[str, Any],
    model: Any,
    stored: dict[str, tuple[Tensor, Tensor]],
    folder: Path,
    *,
    recorded_here: bool,
) -> None:
    """Compare codes, scales, dense weights, logits and the weights of a forward pass; failures are added to `result`."""
    counts = ("codes_differing", "scales_differing", "layers_with_other_codes", "layers_with_other_scales")
    failed = result["failed"]
    failed += [key for key in counts if result.get(key)]
    result["forward_weights_differing"] = record["forward"].get("weights_differing")
    found = dense_digests(model, set(stored))
    result["dense"] = len(record["dense"])
    result["dense_differing"] = sorted(
        name for name in record["dense"].keys() | found.keys() if record["dense"].get(name) != found.get(name)
    )
    failed += ["dense_differing"] if result["dense_differing"] else []
    failed += ["layers_stored"] if result["layers"] != result["layers_stored"] else []
    try:
        failed += _compare_logits(folder, record, model, result, recorded_here=recorded_here)
    except (RuntimeError, ValueError, KeyError, OSError) as error:
        result["logits_note"] = f"the model cannot run on the probe: {str(error)[:200]}"
        failed.append("logits_compared")
        return
    modules = dict(model.named_modules())  # dense since the forward pass on the probe
    dense = ((modules[name].weight, dequantize(codes, scales)) for name, (codes, scales) in stored.items())
    result["weights_differing"] = sum(_differing(expected, found.detach()) for found, expected in dense)
    failed += ["weights_differing"] if result["weights_differing"] else []


def _compare_logits(
    folder: Path, record: dict[str, Any], model: Any, result: dict[str, Any], *, recorded_here: bool
) -> list[str]:
    """Run the model on the probe; returns the name of the proof if it failed."""
    # Another implementation of attention rounds differently. The recorded one is sure to exist in this environment only.
    if recorded_here:
        model.set_attn_implementation(record["attention"])
    if torch.cuda.is_available():  # kernels of another device round differently
        model.to(record["logits_device"])
    probe, expected = read_probe(folder / PROBE)
    logits = probe_logits(model, probe)
    result["logits_compared"] = logits.numel()
    result["probe"] = record["probe"]
    wrong = check_finite(logits, model, result["probe"])
    if wrong:
        result["logits_note"] = wrong
        return ["logits_finite"]
    result["logits_equal"] = torch.equal(logits, expected)
    if result["logits_equal"]:
        return []
    if logits.shape != expected.shape:
        result["logits_note"] = f"{tuple(logits.shape)} logits where the run recorded {tuple(expected.shape)}"
        return ["logits_equal"]
    difference = float((logits.float() - expected.float()).abs().max())
    result["logits_largest_difference"] = difference
    if recorded_here:
        return ["logits_equal"]
    bound = LOGIT_BOUND[record["stored_dtype"]] * float(expected.float().abs().max())
    result["logits_bound"] = bound
    result["logits_note"] = (
        f"recorded in another environment: logits may differ by {bound:.4g} and differ by {difference:.4g}"
    )
    return [] if difference <= bound else ["logits_within_bound"]


def _conclude(folder: Path, result: dict[str, Any], sentences: list[str]) -> dict[str, Any]:
    """Write `verification.json` where that is possible, and raise if a proof failed.

    An earlier one that was edited fails this verification and is replaced.
    """
    failed = result["failed"]
    if (folder / VERIFICATION).is_file():
        try:
            read_sealed(folder / VERIFICATION)
        except ValueError as error:
            failed.append("verdict")
            sentences.append(str(error))
    result["verified"] = not failed
    if is_writer():
        # a checkpoint on a read-only file system can be verified too
        try:
            write_sealed(folder / VERIFICATION, result)
        except OSError as error:
            result["verification_note"] = f"{VERIFICATION} could not be written: {error.strerror}"
    if failed:
        rest = [name for name in failed if name not in ("record", "verdict", "load") and not name.startswith("files_")]
        told = "; ".join(sentences) or f"{', '.join(rest)}; details: {json.dumps(result)}"
        if sentences and rest:
            told += f" ({', '.join(rest)})"
        raise VerificationError(f"{folder} is not what was trained: {told}")
    return result
