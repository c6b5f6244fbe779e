"""Write a finished run as a checkpoint, or write nothing.

The checkpoint goes to a temporary folder through llm-compressor's own save path, gets the files that `plan` has prepared, is
verified by reloading it, and only then appears at its destination. Whatever fails ends the run with the error and leaves no
folder behind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch.distributed as dist
import yaml
from torch import nn

from grace_plugin.export.plan import ExportPlan, RunToExport, checkpoint_bytes, rehearse_save
from grace_plugin.export.probe import attention_of, check_finite, probe_logits, write_probe
from grace_plugin.export.processor import is_processor_file
from grace_plugin.export.ranks import is_writer, run_on_all_ranks
from grace_plugin.export.record import (
    CONFIG,
    GENERATION,
    PROBE,
    RECIPE,
    RECORD,
    RUN_FILE,
    dense_digests,
    digest,
    environment,
    files_below,
    is_local,
    read_sealed,
    write_sealed,
)
from grace_plugin.export.stage import Destination, check_space, locate
from grace_plugin.export.verify import VerificationError, check_against_run
from grace_plugin.upstream import modify_save_pretrained, running_output_dir
from grace_plugin.vlm import family_of

__all__ = ["install_save", "rewrite_ignore", "save_checkpoint", "strip_paths"]


def install_save(model: Any, modifier: RunToExport) -> Callable[..., dict[str, Any]]:
    """Make `model.save_pretrained` write a verified GRACE checkpoint, or nothing, and return the function behind it.

    Called before the session ends, for upstream's own `oneshot(output_dir=...)` and for users who save the model themselves.
    Processor files are recorded as unproven where a user calls `save_pretrained`, so that somebody who saves a processor of
    their own afterwards still has a checkpoint that verifies; `save_checkpoint` and upstream's `oneshot` prove them. Where
    several ranks train on GPUs the model is in host memory afterwards.
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
        with _plain_generation_config(model):
            compressed_save(str(folder), **kwargs)
        if not is_writer():
            return
        rewrite_ignore(folder, model, family_of(model).quantization_ignore())
        write_probe(folder / PROBE, plan.probe.batch, logits)
        write_record(folder, model, modifier, device, plan)
        complete(folder, plan)

    def publish(save_directory: str | os.PathLike[str], *, own_processor: bool = True, **kwargs: Any) -> dict[str, Any]:
        own_processor = own_processor and running_output_dir() is None
        return _publish(model, modifier, save_directory, write, own_processor=own_processor, **kwargs)

    def save_pretrained(save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        publish(save_directory, **kwargs)

    save_pretrained._overridden = True  # type: ignore[attr-defined]  # upstream's mark: do not wrap again
    save_pretrained._grace = publish  # type: ignore[attr-defined]
    model.save_pretrained = save_pretrained
    return publish


def write_record(folder: Path, model: nn.Module, modifier: RunToExport, device: str, plan: ExportPlan) -> None:
    """Write what the run knows of its final weights: hashes of codes and scales per layer, and of all other weights.

    `forward` counts the weights that were compared with those that the forward pass multiplies by.

    device: "cpu" or "cuda", where the probe's logits were computed.
    """
    record = {
        "student": plan.student,
        "teacher": plan.teacher,
        "processor": plan.processor.kind,
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
    write_sealed(folder / RECORD, record)


def complete(folder: Path, plan: ExportPlan) -> None:
    """Add the files that are not the model's own, take local paths out of the recipe, and give every file the umask's mode.

    Weights are written with mode 0600, whatever the umask; a checkpoint is to be read by whom the umask lets read.
    """
    for name, content in plan.processor.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if plan.run_file is not None:
        (folder / RUN_FILE).write_text(plan.run_file, encoding="utf-8")
    if plan.generation is not None:
        (folder / GENERATION).write_bytes(plan.generation)
    if not plan.record_paths:
        strip_paths(folder)
    mode = folder.stat().st_mode & 0o666  # `mkdir` has followed the umask
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def record_files(folder: Path, *, own_processor: bool) -> None:
    """Add the hashes of all files to the record; with `own_processor` those of the processor are kept apart, unproven."""
    record = read_sealed(folder / RECORD)
    files = files_below(folder)
    record["unproven"] = {n: sha for n, sha in files.items() if own_processor and is_processor_file(n)}
    record["files"] = {name: sha for name, sha in files.items() if name not in record["unproven"]}
    record["config"] = json.loads((folder / CONFIG).read_text())
    write_sealed(folder / RECORD, record)
    (folder / RECORD).chmod(folder.stat().st_mode & 0o666)


def save_checkpoint(model: nn.Module, modifier: RunToExport, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Write, verify and rename; returns the verification. Every rank calls it, rank 0 writes, all read it back.

    After a failure it can be called again, with another destination.

    Raises:
        FileExistsError: the destination is not empty.
        VerificationError: a proof failed; nothing is left at the destination.
    """
    return install_save(model, modifier)(output_dir, own_processor=False)


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    """Let the model be saved whatever its generation config says: the plan's file takes the place of the one written here."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own


def _publish(
    model: nn.Module, modifier: RunToExport, output_dir: str | os.PathLike[str], write: Callable[..., None], *,
    own_processor: bool, **kwargs: Any,
) -> dict[str, Any]:  # fmt: skip
    """Write to a temporary folder, verify it there, and let it appear at the destination."""
    if not kwargs.get("save_compressed", True):
        raise ValueError("a GRACE checkpoint is written packed; call save_pretrained without save_compressed=False")
    device = next(model.parameters()).device
    destination = run_on_all_ranks(lambda: locate(output_dir), device)
    needed = checkpoint_bytes(model)

    def write_stage() -> None:
        if is_writer():
            _prepare(destination, needed)
        write(destination.stage, **kwargs)
        if is_writer():
            record_files(destination.stage, own_processor=own_processor)

    def publish() -> None:
        if is_writer():
            destination.publish()

    try:
        run_on_all_ranks(write_stage, device)
        verification = run_on_all_ranks(lambda: check_against_run(destination.stage, modifier.frozen), device)
        run_on_all_ranks(publish, device)
        return verification
    except BaseException:
        if is_writer():
            destination.clear()
        raise


def _prepare(destination: Destination, needed: int) -> None:
    destination.clear()
    check_space(destination, needed)
    destination.stage.parent.mkdir(parents=True, exist_ok=True)
    destination.stage.mkdir()


def strip_paths(folder: Path) -> None:
    """Replace local paths of models in the checkpoint's recipe by the names of their folders."""
    path = folder / RECIPE
    if not path.is_file():
        return
    content = yaml.safe_load(path.read_text())
    if _strip(content):
        path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000))


def _strip(value: Any) -> bool:
    if isinstance(value, list):
        return any([_strip(item) for item in value])
    if not isinstance(value, dict):
        return False
    changed, teacher = False, value.get("teacher")
    if isinstance(teacher, str):
        teacher = value["teacher"] = {"model": teacher}
    if isinstance(teacher, dict):
        for key in ("model", "cache"):
            given = teacher.get(key)
            if isinstance(given, str) and is_local(given):
                teacher[key] = Path(given).resolve().name
                changed = True
    return any([_strip(item) for item in value.values()]) or changed


def rewrite_ignore(folder: Path, model: nn.Module, patterns: list[str]) -> None:
    """Rewrite `quantization_config.ignore` so that transformers and vLLM both match it.

    llm-compressor writes checkpoint-space names, which transformers does not map back for LLaVA and Qwen2-VL: towers would
    load as if they were quantized. Regular expressions over both spaces are matched by both loaders.

    Args:
        folder: the checkpoint.
        model: the saved model, whose linears without a scheme are the ignored ones.
        patterns: the family's patterns (vision tower, projector, head).
    """
    path = folder / "config.json"
    config: dict[str, Any] = json.loads(path.read_text())
    quantization = config.get("quantization_config")
    if quantization is None:
        return
    kept, family = [], family_of(model)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or getattr(module, "quantization_scheme", None) is not None:
            continue
        if any(re.match(pattern[3:], name) for pattern in patterns):
            continue
        kept.append(family.ignore_pattern(name))
    quantization["ignore"] = [*patterns, *kept]
    for group in quantization["config_groups"].values():
        group["targets"] = ["Linear"] if len(quantization["config_groups"]) == 1 else group["targets"]
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
