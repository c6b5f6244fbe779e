"""What a save needs, prepared and tried before the first step, so that no run trains to its end and then fails to save."""

from __future__ import annotations

import copy
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from grace_plugin.export.probe import Probe, make_probe
from grace_plugin.export.processor import (
    ProcessorFiles,
    first_line,
    left_out,
    plan_processor,
    saved_files,
    source_folder,
)
from grace_plugin.export.record import GENERATION, provenance
from grace_plugin.export.stage import check_space, rehearse
from grace_plugin.schemes import format_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportPlan:
    """What goes into a checkpoint in addition to the trained weights.

    probe: the batch that the checkpoint is verified on. processor: tokenizer and processor files. generation: content of
    generation_config.json, None for a model without one. student, teacher: names and fingerprints, with paths if
    `record_paths`. run_file: text of run.yaml, without local paths unless `record_paths`; None where there is none.
    """

    probe: Probe
    processor: ProcessorFiles
    generation: bytes | None
    student: dict[str, Any]
    teacher: dict[str, Any]
    record_paths: bool = False
    run_file: str | None = None


def rehearse_save(
    model: Any,
    run: Any,
    *,
    processor: Any = None,
    output_dir: str | os.PathLike[str] | None = None,
    run_folder: str | os.PathLike[str] | None = None,
    probe: Any = None,
    record_paths: bool = False,
) -> ExportPlan:
    """Try everything that a save needs, leave nothing behind, and keep the plan until the save.

    Args:
        model: the student, with a real `name_or_path`.
        run: the GraceModifier of the run, which keeps the plan. Modifiers call this package, so it imports none.
        processor: what the run trains with, and so what is saved; the student's own by default.
        output_dir: where the checkpoint will go, if that is known: stage, rename and free space are tried there.
        run_folder: where the run's own files will go.
        probe: samples or a batch to verify the checkpoint on, published with it; seeded noise by default.
        record_paths: whether recipe and record in the checkpoint keep local paths; else names and fingerprints alone.

    Raises:
        FileExistsError: something is at the destination.
        ValueError: something that the save needs is missing or cannot be used.
    """
    # first what costs nothing: a full disk is reported before a processor is loaded
    if output_dir is not None:
        check_space(rehearse(output_dir, run_folder), checkpoint_bytes(model))
    name = str(getattr(model, "name_or_path", ""))
    source = source_folder(name)
    given = plan_processor(source, processor, model.get_input_embeddings().weight.shape[0])
    reads = processor if processor is not None else _processor_of(model)
    saved_files(
        copy.deepcopy(model.config), "student's config"
    )  # transformers refuses some; found before the first step
    plan = ExportPlan(
        probe=make_probe(model, reads, probe),
        processor=given,
        generation=_generation(model, source),
        student=provenance(name, paths=record_paths),
        teacher=provenance(run.teacher.model, paths=record_paths),
        record_paths=record_paths,
    )
    others = left_out(source)
    if others:
        more = f" and {len(others) - 20} more" if len(others) > 20 else ""
        logger.warning("not copied from the student's folder into the checkpoint: %s%s", ", ".join(others[:20]), more)
    run.export_plan = plan
    return plan


def _processor_of(model: Any) -> Any:
    """Load the processor of the student's folder; None, with a warning, where there is none."""
    from transformers import AutoProcessor

    source = getattr(model, "name_or_path", "")
    try:
        return AutoProcessor.from_pretrained(source)
    except Exception as error:
        logger.warning(
            "no processor can be read from %.200r (%.200s); the checkpoint is verified on seeded token ids without an image, "
            "pass processor= to verify it on one",
            source,
            error,
        )
        return None


def checkpoint_bytes(model: nn.Module) -> int:
    """Return the bytes of the weights in the checkpoint: packed codes and 16-bit scales, 16 bits for all others.

    A model whose layers have no scheme yet is counted with 4 bits a weight, the least that it may need.
    """
    # by identity of the weight, since `parameters()` gives no modules and names tied weights once
    modules: list[Any] = list(model.modules())
    schemes: dict[int, Any] = {
        id(module.weight): format_of(module.quantization_scheme.weights, torch.bfloat16)
        for module in modules
        if getattr(module, "quantization_scheme", None) is not None and getattr(module, "weight", None) is not None
    }
    if not schemes:
        return sum(p.numel() for p in model.parameters()) // 2
    total = 0.0
    for parameter in model.parameters():
        scheme = schemes.get(id(parameter))
        if scheme is None:
            total += 2 * parameter.numel()
            continue
        total += parameter.numel() * scheme.num_bits / 8 + 2 * parameter.numel() / (scheme.group_size or 128)
    return int(total)


def _generation(model: Any, source: Path) -> bytes | None:
    """Return generation_config.json of the checkpoint; None for a model without one.

    Raises:
        ValueError: the file cannot be read, or the model's own settings cannot be saved.
    """
    from transformers import GenerationConfig

    if not model.can_generate():
        return None
    file, own = source / GENERATION, getattr(model, "generation_config", None)
    if file.is_file():
        try:
            stored = GenerationConfig.from_pretrained(source).to_dict()
            if own is None or stored == own.to_dict():
                # Copied, not saved: models are shipped with settings that transformers reads and refuses to write.
                return file.read_bytes()
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {first_line(error)}; repair or remove it") from error
    return None if own is None else saved_files(own, "student's generation_config")[GENERATION]
