"""The batch that a finished checkpoint is verified on, and a model's logits on it.

The batch is published with the checkpoint, so it holds nothing of the training data: by default it is an image of seeded noise
with a fixed text, through the run's own processor. A caller may give samples or a batch instead.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from grace_plugin.data import ConversationCollator
from grace_plugin.vlm import family_of

logger = logging.getLogger(__name__)

POSITIONS = 16
"""Number of supervised positions whose logits are compared."""
_SQUARES, _SIDE = (12, 16), 16  # squares of noise, 16 pixels wide: processors would average finer noise away
_QUESTION = "What does this image show?"
_ANSWER = (
    "It shows seeded noise. This text is the same for every checkpoint and comes from no data set, "
    "so publishing it publishes nothing that the model was trained on."
)
_TOKENS = 32


class Probe(NamedTuple):
    """kind: "synthetic image", "synthetic text" (no processor could be used) or "given". batch: tensors in host memory."""

    kind: str
    batch: dict[str, Tensor]


def make_probe(model: Any, processor: Any = None, given: Any = None) -> Probe:
    """Build the probe: from `given`, else a noise image through the processor, else seeded token ids.

    Args:
        model: the student, whose family says which token ids stand for images.
        processor: a transformers processor with a chat template; None where there is none.
        given: samples, as in a dataset, or a collated batch with `input_ids`; it is published with the checkpoint.

    Raises:
        ValueError: nothing usable was given.
    """
    if given is not None:
        return Probe("given", _given(processor, given))
    if processor is None:
        return Probe("synthetic text", _token_ids(model))
    try:
        return Probe("synthetic image", _tensors(ConversationCollator(processor)([_noise_sample()])))
    except Exception as error:  # processors raise anything, and a custom loop may do without a chat template
        logger.warning(
            "the processor cannot make a batch of an image and a text (%.200s); the checkpoint is verified on seeded token "
            "ids without an image, pass probe= for samples of your own",
            error,
        )
        return Probe("synthetic text", _token_ids(model))


def _given(processor: Any, given: Any) -> dict[str, Tensor]:
    if isinstance(given, Mapping) and isinstance(given.get("input_ids"), Tensor):
        return _tensors(given)
    samples = list(given) if isinstance(given, list | tuple) else []
    if not samples:
        raise ValueError(
            f"probe= takes a list of samples or a collated batch with input_ids, got {type(given).__name__} "
            f"with {len(samples)} samples"
        )
    if processor is None:
        raise ValueError("probe= holds samples and there is no processor to collate them; pass processor= or a batch")
    return _tensors(ConversationCollator(processor)(samples))


def _tensors(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value.detach().cpu().clone() for key, value in batch.items() if isinstance(value, Tensor)}


def _noise_sample() -> dict[str, Any]:
    """Return one sample with an image of seeded noise; the global random state is left as it was."""
    from PIL import Image

    # a generator of its own: the global random state is part of what a resumed run must repeat
    noise = torch.randint(0, 256, (*_SQUARES, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    noise = noise.repeat_interleave(_SIDE, dim=0).repeat_interleave(_SIDE, dim=1)
    user = [{"type": "image"}, {"type": "text", "text": _QUESTION}]
    return {
        "messages": [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": _ANSWER}]},
        ],
        "images": [Image.fromarray(noise.numpy())],
    }


def _token_ids(model: Any) -> dict[str, Tensor]:
    """Return seeded token ids [1, 32], none of them a placeholder of an image or video."""
    # a placeholder without pixels is an error in every family
    placeholders = set(family_of(model).token_ids(model.config).values())
    rows = model.get_input_embeddings().weight.shape[0]
    allowed = torch.tensor([i for i in range(rows) if i not in placeholders])
    drawn = torch.randint(len(allowed), (1, _TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": allowed[drawn], "attention_mask": torch.ones_like(drawn)}


def attention_of(model: Any) -> dict[str, str]:
    """Return the attention implementation of each sub-config, "" for the model's own; for `set_attn_implementation`."""
    config = model.config
    parts = {"": config, **{name: getattr(config, name, None) for name in config.sub_configs}}
    return {name: part._attn_implementation for name, part in parts.items() if part is not None}


@torch.no_grad()
def probe_logits(model: nn.Module, probe: dict[str, Tensor]) -> Tensor:
    """Compute logits [<= POSITIONS, V] of a model, in its own dtype, at the probe's first positions that predict a label.

    A probe without labels, or without a supervised token, is read at its last positions.
    """
    device = next(p.device for p in model.parameters())
    # without dropout, or the logits would differ from pass to pass
    was_training = model.training
    model.eval()
    inputs = {k: v.to(device) for k, v in probe.items() if k != "labels"}
    logits = model(**inputs, use_cache=False).logits
    model.train(was_training)
    picked = torch.arange(logits.shape[0] * logits.shape[1])[-POSITIONS:]
    if "labels" in probe:
        supervised = torch.nn.functional.pad(probe["labels"][:, 1:] != -100, (0, 1)).flatten().nonzero().squeeze(1)
        picked = supervised[:POSITIONS] if supervised.numel() else picked
    return logits.flatten(0, 1)[picked.to(device)].cpu()


def check_finite(logits: Tensor, model: nn.Module, kind: str) -> str | None:
    """Return a sentence about logits that are not finite and the weights that cause it; None where all are finite."""
    if bool(logits.isfinite().all()):
        return None
    named = [name for name, parameter in model.named_parameters() if not bool(parameter.isfinite().all())]
    cause = f"these weights hold NaN or Inf: {', '.join(named[:5])}" if named else "all weights are finite"
    return f"the logits on the probe ({kind}) are not finite; {cause}"


def write_probe(path: Path, probe: dict[str, Tensor], logits: Tensor) -> None:
    """Write the probe's inputs and the trained model's logits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"input.{k}": v.contiguous() for k, v in probe.items()}
    save_file({**tensors, "logits": logits.contiguous()}, path)


def read_probe(path: Path) -> tuple[dict[str, Tensor], Tensor]:
    """Read inputs and logits written by `write_probe`."""
    tensors: dict[str, Any] = load_file(path)
    return {k.removeprefix("input."): v for k, v in tensors.items() if k.startswith("input.")}, tensors["logits"]
