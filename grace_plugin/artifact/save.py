"""Write a finished run as a checkpoint, or write nothing.

The checkpoint goes to a temporary folder beside its destination through llm-compressor's own save path, gets the source's
processor files byte for byte, is verified by reloading it, and only then renamed. Whatever fails ends the run with the error
and leaves no folder behind.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
from torch import nn

from grace_plugin.artifact.layout import (
    PROBE,
    RECORD,
    dense_digests,
    digest,
    environment,
    file_digest,
    processor_files,
    rewrite_ignore,
    source_folder,
)
from grace_plugin.artifact.plan import ExportPlan, rehearse_save
from grace_plugin.artifact.probe import attention_of, check_finite, probe_logits, write_probe
from grace_plugin.artifact.ranks import is_writer, together
from grace_plugin.artifact.verify import VerificationError, check_against_run
from grace_plugin.modifier import GraceModifier
from grace_plugin.upstream import modify_save_pretrained
from grace_plugin.vlm import family_of

__all__ = ["check_destination", "install_save", "save_checkpoint"]


def check_destination(output_dir: str | os.PathLike[str]) -> Path:
    """A destination that does not exist or is empty.

    Raises:
        FileExistsError: something lies there; nothing is touched.
    """
    path = Path(output_dir)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; choose another output_dir or remove it")
    return path


def install_save(model: Any, modifier: GraceModifier) -> Callable[..., dict[str, Any]]:
    """Make `model.save_pretrained` write a verified GRACE checkpoint, or nothing, and return the function behind it.

    Called before the session ends, for upstream's own `oneshot(output_dir=...)` and for users who save the model themselves.
    The source's processor files are copied; their hashes are recorded by `save_checkpoint` alone, so that somebody who saves a
    processor of his own behind it still has a checkpoint that verifies. Where several ranks train on GPUs the model is in host
    memory afterwards.
    """
    modify_save_pretrained(model)
    compressed_save: Callable[..., None] = model.save_pretrained
    if hasattr(compressed_save, "_grace"):
        return cast(Callable[..., dict[str, Any]], compressed_save._grace)

    plan: ExportPlan = modifier.export_plan or rehearse_save(model, modifier)

    def write(folder: Path, **kwargs: Any) -> None:
        device = next(model.parameters()).device.type
        logits = probe_logits(model, plan.probe.batch)
        wrong = check_finite(logits, model, plan.probe.kind)
        if wrong:
            raise VerificationError(f"nothing was written: {wrong}")
        if device != "cpu" and dist.is_available() and dist.is_initialized():
            model.to("cpu")  # upstream gives every rank rank 0's GPU afterwards, and NCCL would wait for ever
        compressed_save(str(folder), **kwargs)
        if not is_writer():
            return
        rewrite_ignore(folder, model, family_of(model).quantization_ignore())
        write_probe(folder / PROBE, plan.probe.batch, logits)
        write_record(folder, model, modifier, device, plan)
        copy_processor(source_folder(getattr(model, "name_or_path", "")), folder)

    def publish(save_directory: str | os.PathLike[str], *, own_processor: bool = True, **kwargs: Any) -> dict[str, Any]:
        return _publish(model, modifier, save_directory, write, own_processor=own_processor, **kwargs)

    def save_pretrained(save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        publish(save_directory, **kwargs)

    save_pretrained._overridden = True  # type: ignore[attr-defined]  # upstream's mark: do not wrap again
    save_pretrained._grace = publish  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained
    return publish


def write_record(folder: Path, model: nn.Module, modifier: GraceModifier, device: str, plan: ExportPlan) -> None:
    """Write what the run knows of its final weights: hashes of codes and scales per layer, and of all other weights.

    `forward` counts the weights that were compared with those that the forward pass multiplies by.

    device: "cpu" or "cuda", where the probe's logits were computed.
    """
    record = {
        "source": str(getattr(model, "name_or_path", "")),
        "stored_dtype": str(modifier.saved_dtype).removeprefix("torch."),
        "environment": environment(),
        "logits_device": device,
        "probe": plan.probe.kind,
        "attention": attention_of(model),
        "run": modifier.objective.state_dict(),
        "forward": modifier.objective.forward_proof,
        "layers": {
            name: {"codes": digest(codes), "scales": digest(scales)}
            for name, (codes, scales) in modifier.frozen.items()
        },
        "dense": dense_digests(model, set(modifier.frozen)),
    }
    path = folder / RECORD
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def copy_processor(source: Path, folder: Path) -> None:
    """Copy the source's processor files byte for byte."""
    for file in processor_files(source):
        shutil.copy2(file, folder / file.name)


def record_processor(source: Path, folder: Path) -> None:
    """Add the hashes of the source's processor files to the record."""
    record = json.loads((folder / RECORD).read_text())
    record["processor_files"] = {file.name: file_digest(file) for file in processor_files(source)}
    (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")


def save_checkpoint(model: nn.Module, modifier: GraceModifier, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Write, verify and rename; returns the verification. Every rank calls it, rank 0 writes, all read it back.

    After a failure it can be called again, with another destination.

    Raises:
        FileExistsError: the destination is not empty.
        VerificationError: a proof failed; nothing is left at the destination.
    """
    return install_save(model, modifier)(output_dir, own_processor=False)


def _publish(
    model: nn.Module, modifier: GraceModifier, output_dir: str | os.PathLike[str], write: Callable[..., None], *,
    own_processor: bool, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write to a temporary folder beside the destination, verify it there, and rename it."""
    if not kwargs.get("save_compressed", True):
        raise ValueError("a GRACE checkpoint is written packed; call save_pretrained without save_compressed=False")
    device = next(model.parameters()).device
    destination = together(lambda: check_destination(output_dir), device)
    partial = destination.with_name(f".{destination.name}.partial")
    source = source_folder(getattr(model, "name_or_path", ""))

    def write_partial() -> None:
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
        write(partial, **kwargs)
        if is_writer() and not own_processor:
            record_processor(source, partial)

    def rename() -> None:
        if is_writer():
            if destination.exists():
                destination.rmdir()
            partial.rename(destination)

    try:
        together(write_partial, device)
        verification = together(lambda: check_against_run(partial, modifier.frozen, source), device)
        together(rename, device)
        return verification
    except BaseException:
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
        raise
