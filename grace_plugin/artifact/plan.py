"""What a save will need, prepared and tried before the first step: a run must not train to its end and then fail to save."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from grace_plugin.artifact.probe import Probe, make_probe
from grace_plugin.modifier import GraceModifier

__all__ = ["ExportPlan", "rehearse_save"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportPlan:
    """What goes into a checkpoint in addition to the trained weights.

    probe: the batch that the checkpoint is verified on.
    """

    probe: Probe


def rehearse_save(model: Any, modifier: GraceModifier, *, processor: Any = None, probe: Any = None) -> ExportPlan:
    """Try everything that a save needs, leave nothing behind, and keep the plan on the modifier until the save.

    Args:
        model: the student, with a real `name_or_path`.
        modifier: of the run.
        processor: what the run trains with; read from the student's folder by default.
        probe: samples or a batch to verify the checkpoint on, published with it; seeded noise by default.

    Raises:
        ValueError: something that the save needs is missing or cannot be used.
    """
    reads = processor if processor is not None else _processor_of(model)
    plan = ExportPlan(make_probe(model, reads, probe))
    modifier.export_plan = plan
    return plan


def _processor_of(model: Any) -> Any:
    """The processor in the student's folder; None, and a line in the log, where there is none."""
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
