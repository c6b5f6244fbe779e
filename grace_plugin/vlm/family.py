"""The interface of a family of vision-language models.

A `Family` holds every fact about a model that the rest of the package needs: which token ids stand for visual tokens, how many
of them each image or video owns, where the decoder is, which modules stay unquantized or frozen, and how vLLM lays the layers
out. Facts come from the model's config, not from literal ids. Code outside `vlm/` asks these methods and names no family.

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

__all__ = ["VISUAL_SPANS", "Capture", "Family", "VisualTokens", "capture", "image_token_spans", "matches"]

Batch = Mapping[str, Any]
VISUAL_SPANS = "visual_spans"
"""Batch entry of families that write a video's frames as images: per image or video, the number of spans of the image token
that it consists of (a list, which no model takes). Without the entry each span is an image of its own."""


@dataclass(frozen=True)
class VisualTokens:
    """Positions of the visual tokens of a batch.

    index: int64 [M], flat positions in [B * S], the tokens of image 0 first, then those of image 1, and so on.
    sizes: visual tokens of each image or video, host integers, sum(sizes) == M.
    """

    index: Tensor
    sizes: tuple[int, ...]


@dataclass
class Capture:
    """Hidden states of one forward pass, [B, S, d] each: `final` after the decoder's norm, `penultimate` of layer L-2.

    `penultimate` is None for a decoder of one layer, which `check_depth` refuses where the state is needed.
    """

    final: Tensor | None = None
    penultimate: Tensor | None = None


class Family(ABC):
    """One family of vision-language models: subclasses hold facts, this class holds the checks."""

    model_type: ClassVar[str]
    #: batch entry that carries the pixels of each kind of visual input
    pixel_keys: ClassVar[dict[str, str]] = {"image": "pixel_values", "video": "pixel_values_videos"}
    #: module-name patterns as in compressed-tensors: "re:" is a regular expression matched from the start
    vision: ClassVar[tuple[str, ...]]
    projector: ClassVar[tuple[str, ...]]
    head: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?lm_head$",)
    #: routers of mixtures of experts, which stay unquantized
    router: ClassVar[tuple[str, ...]] = ()
    #: module path of the decoder inside the model
    decoder: ClassVar[str] = "model.language_model"
    #: ends of the names of tensors that can be the output head, in order; the second is the embedding that a tied head shares
    head_tensors: ClassVar[tuple[str, ...]] = ("lm_head.weight", "embed_tokens.weight")
    #: linears of one parent module that vLLM merges into one matrix, so they need one quantization format
    fused: ClassVar[tuple[tuple[str, ...], ...]] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    #: linears that vLLM splits along their inputs under tensor parallelism; all others are split along their outputs
    row_parallel: ClassVar[tuple[str, ...]] = ("o_proj", "down_proj")
    #: images of one prompt that vLLM lays out as transformers does; None for any number
    served_images: ClassVar[int | None] = None
    #: whether positions are one number per token, so that samples packed into one sequence compute what they compute alone
    packs: ClassVar[bool] = False

    @abstractmethod
    def token_ids(self, config: Any) -> dict[str, int]:
        """Return the placeholder token id of each kind of visual input ("image", "video")."""

    @abstractmethod
    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        """Return the number of placeholders of each image (or video) of the batch, in order.

        Args:
            config: of the model.
            batch: of the collator.
            kind: "image" or "video".
            total: placeholders of that kind in the batch.
        """

    @abstractmethod
    def pixel_signature(self, config: Any) -> dict[str, Any]:
        """Return the config values that decide how many visual tokens an image becomes; teacher and student must agree."""

    def takes_videos(self, config: Any) -> bool:
        """Return whether samples with videos are trained and served; by default, whether videos have a token of their own."""
        return "video" in self.token_ids(config)

    def true_tokens(self, config: Any, batch: Batch, kind: str) -> list[list[bool]] | None:
        """Return, per image, which of its placeholders are visual tokens; None when all of them are.

        Some families end each line of patches with a learned newline vector under the image's own token id.
        """
        return None

    def unfuse_experts(self, model: nn.Module) -> None:
        """Replace experts that are held as one parameter by linears, in place; a model without them is left as it is."""
        return None

    def loading_context(self) -> AbstractContextManager[None]:
        """Return a context in which transformers loads a quantized checkpoint with the experts that `unfuse_experts` made."""
        return nullcontext()

    def host_inputs(self, model: Any, host: Batch, device: torch.device) -> dict[str, Any]:
        """Return inputs of the forward pass that the model would otherwise compute from values read back from the device.

        They are added to the batch or replace entries of the same name. The default is none.

        Args:
            model: of this family, unwrapped.
            host: the batch in host memory.
            device: of the model.
        """
        return {}

    def softcap(self, config: Any) -> float | None:
        """Return c where the served logits are c * tanh(logits / c), else None."""
        # vLLM follows the decoder's config; transformers' Gemma3ForConditionalGeneration leaves the cap out of its own logits.
        cap: float | None = getattr(config.get_text_config(), "final_logit_softcapping", None)
        return cap

    def text_model(self, model: nn.Module) -> nn.Module:
        """Return the decoder: a module with `layers` (nn.ModuleList) and `norm`."""
        return model.get_submodule(self.decoder)

    def check_packing(self) -> None:
        """Refuse packed samples for a family that cannot keep them apart.

        Raises:
            ValueError: names the family and how to fix it.
        """
        if not self.packs:
            raise ValueError(
                f"samples of family '{self.model_type}' cannot be packed: its positions are not one number per token, and "
                "the model would lay all packed samples out as one. Leave packing out; batches are grouped by length instead"
            )

    def quantization_ignore(self) -> list[str]:
        """Return patterns of the linears that stay unquantized: vision tower, projector, output head, routers."""
        return [*self.vision, *self.projector, *self.head, *self.router]

    def ignore_pattern(self, module_name: str) -> str:
        """Return a pattern for a module of a saved checkpoint that transformers and vLLM both match when they load it."""
        # transformers renames modules as it loads (LLaVA: language_model.model.* to model.language_model.*), but not the names
        # of quantization_config.ignore; vLLM keeps an inner "model." of its own.
        inside = module_name.removeprefix(f"{self.decoder}.")
        if inside == module_name:
            return rf"re:(.*\.)?{re.escape(module_name)}$"
        return rf"re:.*{self.decoder.rpartition('.')[2]}\.(model\.)?{re.escape(inside)}$"

    def trains(self, parameter_name: str) -> bool:
        """Return whether a parameter trains by default: projector and decoder do, the vision tower does not."""
        return matches(parameter_name, self.projector) or not matches(parameter_name, self.vision)

    def visual_tokens(self, config: Any, batch: Batch) -> VisualTokens:
        """Return positions and per-image sizes of the visual tokens of a batch.

        Raises:
            ValueError: pixels without matching tokens, tokens without pixels, or a split that does not add up; the
                message names the family and its file.
        """
        # Everything that does not match is an error: with a wrong token id the relational term would silently be zero.
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
        empty = torch.zeros(0, dtype=torch.int64, device=ids.device)  # torch.cat refuses an empty list
        return VisualTokens(torch.cat([empty, *indices]), tuple(sizes))


def image_token_spans(batch: Batch, token_id: int) -> tuple[list[int], Tensor]:
    """Find the unbroken spans of a token in a batch; returns their lengths, and the token id before each (int64 [spans])."""
    ids = batch["input_ids"]
    before = torch.nn.functional.pad(ids, (1, 0), value=-1)[:, :-1]  # a span never crosses the end of a sequence
    hit, joined = (ids == token_id).flatten(), (before == token_id).flatten()
    first = hit & ~joined
    number = first.cumsum(0)[hit]
    return torch.bincount(number, minlength=1)[1:].tolist(), before.flatten()[first]


def matches(name: str, patterns: tuple[str, ...] | list[str]) -> bool:
    """Return whether a name matches a pattern of compressed-tensors: "re:" matches from the start, all else is equality."""
    return any(re.match(p[3:], name) if p.startswith("re:") else p == name for p in patterns)


@contextmanager
def capture(text_model: nn.Module) -> Iterator[Capture]:
    """Collect the decoder's final (after its norm) and penultimate hidden states of the forward pass run inside.

    The penultimate state is the output of decoder layer L-2, counted in this model's own depth, before the final norm.
    """
    layers = text_model.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    caught = Capture()

    def keep(slot: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if getattr(caught, slot) is None:  # activation checkpointing runs the layers again in the backward pass
                setattr(caught, slot, output[0] if isinstance(output, tuple) else output)

        return hook

    # Hooks rather than output_hidden_states=True, which keeps the states of all layers and normalizes the last of them.
    handles = [text_model.get_submodule("norm").register_forward_hook(keep("final"))]
    if len(layers) > 1:
        handles.append(layers[len(layers) - 2].register_forward_hook(keep("penultimate")))
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
