"""What GRACE must know of a vision-language model, and nothing more.

A `Family` answers five questions, always from the model's own config, never from a literal id: which token ids stand for
visual tokens, how many of them each image or video owns, where the decoder is, which modules stay unquantized, which stay
frozen. Everything outside `vlm/` asks these questions and names no family.

A placeholder is not always a visual token: some families close each line of patches with a learned newline that stands under
the image's own token id. `true_tokens` takes those out; row, column and frame tags have ids of their own and never count.

Legend: B batch, S sequence, M visual tokens of the batch, I images and videos of the batch.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["VISUAL_RUNS", "Capture", "Family", "VisualTokens", "capture", "check_depth", "matches", "runs"]

Batch = Mapping[str, Any]
VISUAL_RUNS = "visual_spans"
"""The batch entry of families that write a video's frames as images: for each image and video, of how many unbroken runs of
the image's token it is made (a list of numbers, which no model takes); without it each run is an image of its own."""


@dataclass(frozen=True)
class VisualTokens:
    """Where the visual tokens of a batch are.

    index: int64 [M], flat positions in [B * S], the tokens of image 0 first, then those of image 1, and so on.
    sizes: visual tokens of each image or video, host integers, sum(sizes) == M.
    """

    index: Tensor
    sizes: tuple[int, ...]


@dataclass
class Capture:
    """Hidden states of one forward pass: `final` is the decoder's normed output, `penultimate` the output of layer L-2.

    A decoder of one layer has no penultimate state; `check_depth` refuses it where one is read.
    """

    final: Tensor | None = None
    penultimate: Tensor | None = None


class Family(ABC):
    """One family of vision-language models; subclasses hold facts, this class holds the checks."""

    model_type: ClassVar[str]
    #: the batch entry that carries the pixels of each kind of visual input
    pixel_keys: ClassVar[dict[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    #: module-name patterns, "re:" as in compressed-tensors, matched from the start
    vision: ClassVar[tuple[str, ...]]
    projector: ClassVar[tuple[str, ...]]
    head: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?lm_head$",)
    #: routers of mixtures of experts, which stay as they are
    router: ClassVar[tuple[str, ...]] = ()
    #: images of one prompt that vLLM lays out as transformers does; None for any number
    served_images: ClassVar[int | None] = None
    #: whether a token's place is one number, so that rows packed into one sequence compute what they compute alone
    packs: ClassVar[bool] = False
    #: module path of the decoder inside the model
    decoder: ClassVar[str] = "model.language_model"

    @abstractmethod
    def token_ids(self, config: Any) -> dict[str, int]:
        """Placeholder token id of each kind of visual input ("image", "video"), from the model's config."""

    @abstractmethod
    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        """Placeholders of each image (or video) of the batch, in order; `total` tokens of that kind were found."""

    def takes_videos(self, config: Any) -> bool:
        """Whether rows with videos are trained and served; by default, whether they have a token of their own."""
        return "video" in self.token_ids(config)

    def true_tokens(self, config: Any, batch: Batch, kind: str) -> list[list[bool]] | None:
        """Per image, which of its placeholders are visual tokens; None when all of them are."""
        return None

    def unfuse_experts(self, model: nn.Module) -> None:
        """Turn experts held as one parameter into linears; a model without such experts is left alone."""
        return None

    def reading(self) -> AbstractContextManager[None]:
        """Inside it, transformers reads a quantized checkpoint of this family as `unfuse_experts` left the model."""
        return nullcontext()

    def host_inputs(self, model: Any, host: Batch, device: torch.device) -> dict[str, Any]:
        """Inputs of the model's forward pass that it would otherwise make of what it reads back from the device.

        They take the place of the batch's entries of the same name, or come beside them; by default there are none.

        Args:
            model: of this family, unwrapped.
            host: the batch in host memory.
            device: of the model.
        """
        return {}

    @abstractmethod
    def pixel_signature(self, config: Any) -> dict[str, Any]:
        """The config values that decide how many visual tokens an image becomes; equal for a teacher and its student."""

    def softcap(self, config: Any) -> float | None:
        """c where the model is served with logits c * tanh(logits / c); None where they are the head's product.

        vLLM follows the decoder's config; transformers' `Gemma3ForConditionalGeneration` leaves the cap out of its own logits.
        """
        cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
        return cap

    def text_model(self, model: nn.Module) -> nn.Module:
        """The decoder: a module with `layers` (nn.ModuleList) and `norm`."""
        return model.get_submodule(self.decoder)

    def check_packing(self) -> None:
        """Refuse packed rows for a family that cannot keep them apart.

        Raises:
            ValueError: names the family and the way out.
        """
        if not self.packs:
            raise ValueError(
                f"rows of family '{self.model_type}' cannot be packed: its positions are not one number per token, and "
                "the model would lay all packed rows out as one. Leave packing out; batches are grouped by length instead"
            )

    def quantization_ignore(self) -> list[str]:
        """Patterns of the linears that stay in the checkpoint's dtype: vision tower, projector, lm_head, routers."""
        return [*self.vision, *self.projector, *self.head, *self.router]

    def trains(self, parameter_name: str) -> bool:
        """Whether a parameter trains by default: projector and decoder do, the vision tower does not."""
        return matches(parameter_name, self.projector) or not matches(parameter_name, self.vision)

    def visual_tokens(self, config: Any, batch: Batch) -> VisualTokens:
        """Positions and per-image split of the visual tokens of a batch.

        Raises:
            ValueError: pixels without matching tokens, tokens without pixels, or a split that does not add up; the
                message names the family and its file.
        """
        ids = batch["input_ids"].reshape(-1)
        where = f"family '{self.model_type}' ({type(self).__module__.rsplit('.', 1)[-1]}.py)"
        indices, sizes = [], []
        for kind, token_id in self.token_ids(config).items():
            index = (ids == token_id).nonzero().squeeze(1)
            key = self.pixel_keys[kind]
            has_pixels = batch.get(key) is not None
            if has_pixels and index.numel() == 0:
                raise ValueError(
                    f"{where}: the batch carries {key} but no token with the {kind} id {token_id} of the model's config; "
                    "the processor and the model do not belong together, or the family's file does not fit this model"
                )
            if not has_pixels:
                if index.numel():
                    raise ValueError(f"{where}: {index.numel()} {kind} tokens in the batch but no {key} entry")
                continue
            split = self.sizes(config, batch, kind, index.numel())
            if sum(split) != index.numel():
                raise ValueError(
                    f"{where}: {index.numel()} {kind} tokens in the batch, but its {len(split)} {kind}s own {sum(split)}; "
                    "were visual tokens cut by truncation?"
                )
            kept = self.true_tokens(config, batch, kind)
            if kept is not None:
                index = index[torch.tensor([true for image in kept for true in image], device=index.device)]
                split = [sum(image) for image in kept]
            indices.append(index)
            sizes.extend(split)
        empty = torch.zeros(0, dtype=torch.int64, device=ids.device)
        return VisualTokens(torch.cat([empty, *indices]), tuple(sizes))


def runs(batch: Batch, token_id: int) -> tuple[list[int], Tensor]:
    """Unbroken runs of a token in a batch: their lengths in order, and the token id just before each (int64 [runs])."""
    ids = batch["input_ids"]
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]  # a run never reaches over the end of a row
    hit, joined = (ids == token_id).flatten(), (before == token_id).flatten()
    first = hit & ~joined
    number = first.cumsum(0)[hit]
    return torch.bincount(number, minlength=1)[1:].tolist(), before.flatten()[first]


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """compressed-tensors' own convention: "re:" is a regular expression matched from the start, anything else a name."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


def check_depth(config: Any, role: str) -> None:
    """Refuse a decoder without a penultimate layer, which the relational term reads.

    Args:
        config: of a model. role: "student" or "teacher".

    Raises:
        ValueError: the decoder has fewer than two layers.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers < 2:
        raise ValueError(
            f"the {role}'s decoder has {layers} layer(s); the relational term needs at least 2, because it "
            "reads the last but one: set relational: {enabled: false}"
        )


@contextmanager
def capture(text_model: nn.Module) -> Iterator[Capture]:
    """Collect the decoder's final (normed) and penultimate hidden states of the forward pass run inside.

    The penultimate state is the output of decoder layer L-2, counted in this model's own depth, before the final norm. Only
    the first pass is kept, so that the recomputation of activation checkpointing changes nothing. Of a decoder of one layer the
    final states alone are collected.
    """
    layers = text_model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    caught = Capture()

    def keep(slot: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if getattr(caught, slot) is None:
                setattr(caught, slot, output[0] if isinstance(output, tuple) else output)

        return hook

    handles = [text_model.get_submodule("norm").register_forward_hook(keep("final"))]
    if len(layers) > 1:
        handles.append(layers[len(layers) - 2].register_forward_hook(keep("penultimate")))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
