"""Write a finished run as a checkpoint, or write nothing: stage, write, verify, rename.

The checkpoint goes to a temporary folder through llm-compressor's own save path, gets the files that `plan` has prepared, is
verified by reloading it, and only then appears at its destination. Any failure ends the run with the error and leaves no
folder behind.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml
from torch import nn

from grace_plugin.digest import tensor_digest
from grace_plugin.export.plan import ExportPlan, checkpoint_bytes, rehearse_save
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
    environment,
    files_below,
    is_local,
    read_sealed,
    write_sealed,
)
from grace_plugin.export.stage import check_space, locate
from grace_plugin.export.verify import VerificationError, check_against_run
from grace_plugin.upstream import modify_save_pretrained, running_output_dir
from grace_plugin.vlm import family_of


def save_checkpoint(model: nn.Module, run: Any, output_dir: str | os.PathLike[str]) -> dict[str, Any]:
    """Write, verify and rename; returns the verification. Every rank calls it, rank 0 writes, all read it back.

    After a failure it can be called again, with another destination.

    Raises:
        FileExistsError: the destination is not empty.
        VerificationError: a proof failed; nothing is left at the destination.
    """
    return install_save(model, run).publish(output_dir, own_processor=False)


def install_save(model: Any, run: Any) -> VerifiedSave:
    """Make `model.save_pretrained` write a verified checkpoint or nothing; returns what it has become.

    For upstream's own `oneshot(output_dir=...)`, and for users who save the model themselves.
    """
    modify_save_pretrained(model)
    if not isinstance(model.save_pretrained, VerifiedSave):
        model.save_pretrained = VerifiedSave(model, run, model.save_pretrained)
    return model.save_pretrained


class VerifiedSave:
    """`model.save_pretrained` of a trained student.

    Args:
        model: the student. Where several ranks train on GPUs it is in host memory after a save.
        run: the GraceModifier that it was trained by.
        compressed_save: llm-compressor's `save_pretrained` of this model.
    """

    _overridden = True  # llm-compressor's mark: it does not wrap this method again

    def __init__(self, model: Any, run: Any, compressed_save: Callable[..., None]) -> None:
        self.model, self.run, self.compressed_save = model, run, compressed_save
        self.plan: ExportPlan = run.export_plan or rehearse_save(model, run)

    def __call__(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        # A user may save a processor of their own afterwards, and the checkpoint must still verify. Upstream's `oneshot`
        # writes none behind this (`upstream.keep_processor_files`), so that the processor's files can be proven there.
        self.publish(save_directory, own_processor=running_output_dir() is None, **kwargs)

    def publish(self, output_dir: str | os.PathLike[str], *, own_processor: bool, **kwargs: Any) -> dict[str, Any]:
        """Write to a temporary folder, verify it there, and let it appear at the destination; returns the verification.

        Args:
            own_processor: record the processor's files without proving them.
            kwargs: of `save_pretrained`.
        """
        if not kwargs.get("save_compressed", True):
            raise ValueError("a GRACE checkpoint is written packed; call save_pretrained without save_compressed=False")
        device = next(self.model.parameters()).device
        # on every rank: nodes may see different file systems
        destination = run_on_all_ranks(lambda: locate(output_dir), device)
        needed = checkpoint_bytes(self.model)

        def write() -> None:
            if is_writer():
                destination.clear()
                check_space(destination, needed)
                destination.stage.mkdir(parents=True)
            self._write(destination.stage, **kwargs)
            if is_writer():
                _record_files(destination.stage, own_processor=own_processor)

        def rename() -> None:
            if is_writer():
                destination.publish()

        try:
            run_on_all_ranks(write, device)
            verification = run_on_all_ranks(lambda: check_against_run(destination.stage, self.run.frozen), device)
            run_on_all_ranks(rename, device)
            return verification
        except BaseException:  # Ctrl-C too
            if is_writer():
                destination.clear()
            raise

    def _write(self, folder: Path, **kwargs: Any) -> None:
        model, plan = self.model, self.plan
        device = next(model.parameters()).device.type
        logits = probe_logits(model, plan.probe.batch)
        wrong = check_finite(logits, model, plan.probe.kind)
        if wrong:
            raise VerificationError(f"nothing was written: {wrong}")
        if device != "cpu" and dist.is_available() and dist.is_initialized():
            # compressed-tensors' save would move every rank to rank 0's GPU, and NCCL would wait for ever
            model.to("cpu")
        with _plain_generation_config(model):
            self.compressed_save(str(folder), **kwargs)
        if not is_writer():
            return
        rewrite_ignore(folder, model, family_of(model).quantization_ignore())
        write_probe(folder / PROBE, plan.probe.batch, logits)
        write_sealed(folder / RECORD, self._record(device))
        _complete(folder, plan)

    def _record(self, device: str) -> dict[str, Any]:
        """What the run knows of its final weights; `_record_files` adds the files. device: where the logits were computed."""
        run, plan = self.run, self.plan
        return {
            "student": plan.student,
            "teacher": plan.teacher,
            "processor": plan.processor.kind,
            "stored_dtype": str(run.saved_dtype).removeprefix("torch."),
            "environment": environment(),
            "logits_device": device,
            "probe": plan.probe.kind,
            "attention": attention_of(self.model),
            "run": run.objective.state_dict(),
            "forward": run.objective.forward_proof,
            "layers": {
                name: {"codes": tensor_digest(codes), "scales": tensor_digest(scales)}
                for name, (codes, scales) in run.frozen.items()
            },
            "dense": dense_digests(self.model, set(run.frozen)),
        }


def _complete(folder: Path, plan: ExportPlan) -> None:
    """Add the files that are not the model's own, and remove local paths from the recipe."""
    for name, content in plan.processor.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    if plan.run_file is not None:
        (folder / RUN_FILE).write_text(plan.run_file, encoding="utf-8")
    if plan.generation is not None:
        (folder / GENERATION).write_bytes(plan.generation)
    if not plan.record_paths:
        strip_paths(folder)
    # safetensors writes files with mode 0600 whatever the umask; `mkdir` has followed it
    mode = folder.stat().st_mode & 0o666
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def _record_files(folder: Path, *, own_processor: bool) -> None:
    """Add the hashes of all files to the record; with `own_processor` those of the processor are kept apart, unproven."""
    record = read_sealed(folder / RECORD)
    files = files_below(folder)
    record["unproven"] = {n: sha for n, sha in files.items() if own_processor and is_processor_file(n)}
    record["files"] = {name: sha for name, sha in files.items() if name not in record["unproven"]}
    record["config"] = json.loads((folder / CONFIG).read_text())
    write_sealed(folder / RECORD, record)
    (folder / RECORD).chmod(folder.stat().st_mode & 0o666)


@contextmanager
def _plain_generation_config(model: Any) -> Iterator[None]:
    # Models are shipped with settings that transformers reads and refuses to write; `plan.generation` replaces this file.
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    if own is not None:
        model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        if own is not None:
            model.generation_config = own


def strip_paths(folder: Path) -> None:
    """Replace local paths of models in the checkpoint's recipe by the names of their folders."""
    path = folder / RECIPE
    if not path.is_file():
        return
    content = yaml.safe_load(path.read_text())
    # written again only when a path was found: other recipes stay byte for byte what upstream wrote
    if _strip(content):
        path.write_text(yaml.safe_dump(content, allow_unicode=True, sort_keys=False, width=1000))


def _strip(value: Any) -> bool:
    """Replace paths in place; returns whether there was one."""
    if isinstance(value, list):
        return any([_strip(item) for item in value])  # a list, because `any` would stop at the first
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

    Args:
        folder: the checkpoint.
        model: the saved model, whose linears without a scheme are the ignored ones.
        patterns: the family's patterns (vision tower, projector, head).
    """
    # llm-compressor writes names of the checkpoint, which transformers does not map back to names of modules for LLaVA and
    # Qwen2-VL: loading ends in missing keys of the vision tower. Regular expressions match in both. Goes when transformers
    # maps the names of `ignore`.
    path = folder / CONFIG
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
