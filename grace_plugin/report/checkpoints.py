"""The two checkpoints of a comparison: configs and processors are read and compared before any weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grace_plugin.data import processor_settings
from grace_plugin.export.verify import load
from grace_plugin.vlm import Family, family_of, shared_vocabulary

SHAPE = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "num_experts",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
STORED = "pack-quantized"


@dataclass
class ComparedCheckpoint:
    """A checkpoint, read but not loaded. role: "A" (the reference) or "B" (compared with it)."""

    role: str
    path: str
    config: Any
    processor: Any = None

    @property
    def scheme(self) -> dict[str, Any] | None:
        """Its quantization_config, None for a dense checkpoint."""
        found = getattr(self.config, "quantization_config", None)
        return found if found is None or isinstance(found, dict) else found.to_dict()

    def load(self) -> Any:
        """Load the model in eval mode and its stored dtype; packed layers become dense in its first forward pass."""
        if self.scheme is not None:
            return load(Path(self.path))
        from transformers import AutoModelForImageTextToText

        model = AutoModelForImageTextToText.from_pretrained(self.path, dtype="auto").eval()
        # experts held as one parameter become linears, as B has them
        family_of(model).unfuse_experts(model)
        return model


@dataclass
class CheckpointPair:
    """Two comparable checkpoints. vocabulary: token ids that the tokenizer defines. notes: differences that do not matter."""

    a: ComparedCheckpoint
    b: ComparedCheckpoint
    family: Family
    vocabulary: int
    notes: list[str] = field(default_factory=list)


def _load(what: type[Any], name: str, path: str, fix: str) -> Any:
    """Call `from_pretrained` of a class of transformers; `name` and `fix` are of the message."""
    try:
        return what.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {name} at {path!r}: {str(error).splitlines()[0]} {fix}") from error


def _read(role: str, source: str | os.PathLike[str]) -> ComparedCheckpoint:
    from transformers import AutoConfig

    path, fix = os.fspath(source), "Give the folder of a checkpoint (with config.json) or a hub id"
    return ComparedCheckpoint(role, path, _load(AutoConfig, f"checkpoint {role}", path, fix))


def _processor(checkpoint: ComparedCheckpoint) -> Any:
    from transformers import AutoProcessor

    fix = "Copy the tokenizer and processor files into that folder"
    return _load(AutoProcessor, f"the processor of checkpoint {checkpoint.role}", checkpoint.path, fix)


def _shape(checkpoint: ComparedCheckpoint, family: Family) -> dict[str, Any]:
    text = checkpoint.config.get_text_config()
    found = {"model_type": checkpoint.config.model_type}
    found |= {key: getattr(text, key) for key in SHAPE if getattr(text, key, None) is not None}
    return found | family.pixel_signature(checkpoint.config) | family.token_ids(checkpoint.config)


def _differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, str]:
    keys = dict.fromkeys([*ours, *theirs])
    return {key: f"{ours.get(key)!r} / {theirs.get(key)!r}" for key in keys if ours.get(key) != theirs.get(key)}


def _check_scheme(a: ComparedCheckpoint, b: ComparedCheckpoint) -> None:
    if b.scheme is None:
        swapped = "; A has them, so give the two the other way round" if a.scheme is not None else ""
        raise ValueError(
            f"checkpoint B at {b.path!r} has no quantized layers (no quantization_config in its config.json){swapped}. Give "
            "the BF16 model first and the quantized checkpoint second"
        )
    for one in (a, b):
        stored = None if one.scheme is None else one.scheme.get("format", one.scheme.get("quant_method"))
        if stored not in (None, STORED):
            raise ValueError(
                f"checkpoint {one.role} at {one.path!r} is stored as {stored!r}; the report reads weights packed as integers "
                f"({STORED}), as train, oneshot and llm-compressor's weight-only schemes write them"
            )


def read_pair(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> CheckpointPair:
    """Read configs and processors of both checkpoints and check that they can be compared; no weights are loaded.

    Args:
        a: the reference, usually in BF16.
        b: the checkpoint compared with it, with packed integer weights.

    Raises:
        ValueError: a checkpoint cannot be read, they differ in architecture or tokenizer, or B has no packed weights.
    """
    first, second = _read("A", a), _read("B", b)
    families = [family_of(one) for one in (first, second)]
    differing = _differing(*(_shape(one, family) for one, family in zip((first, second), families, strict=True)))
    if differing:
        listed = "; ".join(f"{key}: {values}" for key, values in differing.items())
        raise ValueError(
            f"A at {first.path!r} and B at {second.path!r} are of different architectures (A / B): {listed}. Layers can be "
            "compared between checkpoints of one model only: give the model that B was quantized from"
        )
    _check_scheme(first, second)
    first.processor, second.processor = _processor(first), _processor(second)
    settings = _differing(*(processor_settings(one.processor) for one in (first, second)))
    if "tokenizer" in settings:
        raise ValueError(
            f"the tokenizers of A at {first.path!r} and B at {second.path!r} differ, so the same samples would be other "
            "tokens; copy A's tokenizer files into B, or compare with the model that B was made from"
        )
    size = first.config.get_text_config().vocab_size
    vocabulary = shared_vocabulary(first.processor, first.processor, student_rows=size, teacher_rows=size)
    # One processor for both models, or a difference in pixels would count as a difference of the weights.
    notes = [
        f"B's processor differs in {key} ({values}); samples are read with A's" for key, values in settings.items()
    ]
    return CheckpointPair(first, second, families[0], vocabulary, notes)
