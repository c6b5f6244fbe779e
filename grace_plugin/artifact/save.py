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
from typing import Any

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
from grace_plugin.artifact.probe import probe_logits, write_probe
from grace_plugin.artifact.ranks import is_writer, together
from grace_plugin.artifact.verify import check_against_run
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


def install_save(model: Any, modifier: GraceModifier) -> None:
    """Make `model.save_pretrained` write a GRACE checkpoint through llm-compressor's wrapper.

    Called before the session ends. It copies the source's processor files as well; their hashes are recorded by
    `save_checkpoint` alone, so that somebody who saves a processor of his own behind it still has a checkpoint that verifies.
    """
    modify_save_pretrained(model)
    compressed_save: Callable[..., None] = model.save_pretrained
    if getattr(compressed_save, "_grace", False):
        return
    patterns = family_of(model).quantization_ignore()

    def save_pretrained(save_directory: str | Path, **kwargs: Any) -> None:
        folder = Path(save_directory)
        probe, device = modifier.objective.probe, next(model.parameters()).device.type
        logits = probe_logits(model, probe) if probe is not None else None
        compressed_save(str(folder), **kwargs)
        if not is_writer():
            return
        rewrite_ignore(folder, model, patterns)
        if probe is not None and logits is not None:
            write_probe(folder / PROBE, probe, logits)
        write_record(folder, model, modifier, device)
        copy_processor(source_folder(getattr(model, "name_or_path", "")), folder)

    save_pretrained._overridden = True  # type: ignore[attr-defined]  # upstream's mark: do not wrap again
    save_pretrained._grace = True  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained


def write_record(folder: Path, model: nn.Module, modifier: GraceModifier, device: str) -> None:
    """Write what the run knows of its last training forward: hashes of codes and scales per layer, and of all other weights.

    device: "cpu" or "cuda", where the probe's logits were computed.
    """
    record = {
        "source": str(getattr(model, "name_or_path", "")),
        "stored_dtype": str(modifier.saved_dtype).removeprefix("torch."),
        "environment": environment(),
        "logits_device": device,
        "run": modifier.objective.state_dict(),
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

    Raises:
        FileExistsError: the destination is not empty.
        VerificationError: a proof failed; nothing is left at the destination.
    """
    device = next(model.parameters()).device
    destination = together(lambda: check_destination(output_dir), device)
    partial = destination.with_name(f".{destination.name}.partial")
    source = source_folder(getattr(model, "name_or_path", ""))
    install_save(model, modifier)

    def write() -> None:
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
            partial.parent.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(partial)  # type: ignore[operator]
        if is_writer():
            record_processor(source, partial)

    def publish() -> None:
        if is_writer():
            if destination.exists():
                destination.rmdir()
            partial.rename(destination)

    try:
        together(write, device)
        verification = together(lambda: check_against_run(partial, modifier.frozen, source), device)
        together(publish, device)
        return verification
    except BaseException:
        if is_writer():
            shutil.rmtree(partial, ignore_errors=True)
        raise
