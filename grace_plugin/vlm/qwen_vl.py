"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL and its mixture of experts: images and videos at their own resolution.

An image or video has `t * h * w / merge^2` visual tokens; its grid comes from the processor (`image_grid_thw`,
`video_grid_thw`, [I, 3] in patches). The merger (and Qwen3-VL's deepstack mergers) is the projector; it trains, the tower below
it is frozen. In Qwen3-VL time stamps interrupt a video's tokens, which are counted over the whole video.

transformers holds the experts of a layer as two 3D parameters, which no linear quantizer reaches. llm-compressor replaces them
by one `nn.Linear` per expert and projection; the checkpoint then holds each expert by itself, as vLLM reads it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, vision_utils
from transformers.utils.generic import get_max_seqlen

from grace_plugin.upstream import linearize_moe, load_quantizable_moe, patch_moe_mappings, remove_module_offload
from grace_plugin.vlm.family import Batch, Family
from grace_plugin.vlm.registry import register_family
from grace_plugin.vlm.transfer import to_device

__all__ = ["Qwen2VL", "Qwen3VL", "Qwen3VLMoe", "Qwen25VL"]

_FUSED_EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@register_family
class Qwen2VL(Family):
    """`Qwen2VLForConditionalGeneration`."""

    model_type = "qwen2_vl"
    vision: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?visual\..*",)
    projector: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?visual\.merger\..*",)

    def token_ids(self, config: Any) -> dict[str, int]:
        return {"image": config.image_token_id, "video": config.video_token_id}

    def sizes(self, config: Any, batch: Batch, kind: str, total: int) -> list[int]:
        grid = batch[f"{kind}_grid_thw"]
        # of a video, time stamps interrupt the tokens and are not counted
        return (grid.prod(dim=-1) // config.vision_config.spatial_merge_size**2).tolist()

    def host_inputs(self, model: Any, host: Batch, device: torch.device) -> dict[str, Any]:
        grids = {kind: host[f"{kind}_grid_thw"] for kind, key in self.pixel_keys.items() if host.get(key) is not None}
        # get_rope_index needs mm_token_type_ids; without them the model raises its own error
        if not grids or host.get("mm_token_type_ids") is None:
            return {}
        found: dict[str, Any] = {}
        if host.get("position_ids") is None:
            # the arguments differ between the models of the family
            accepted = inspect.signature(model.model.get_rope_index).parameters
            positions, _ = model.model.get_rope_index(
                **{name: host[name] for name in accepted if host.get(name) is not None}
            )
            found["position_ids"] = to_device(positions, device)
        for kind, grid in grids.items():
            found |= {
                f"{kind}_{name}": value for name, value in self._tower_inputs(model.model.visual, grid, device).items()
            }
        return found

    def _tower_inputs(self, tower: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
        """Return what the vision tower computes from its grids [I, 3] in host memory."""
        positions = to_device(vision_utils.get_vision_position_ids(grid, tower.spatial_merge_size), device)
        return {"position_ids": positions, **self._bounds(tower, "", vision_utils.get_vision_cu_seqlens(grid), device)}

    def _bounds(self, tower: Any, which: str, ends: Tensor, device: torch.device) -> dict[str, Any]:
        """Return the cumulative lengths at which the tower's attention is split, int32 [n + 1]."""
        longest, name = get_max_seqlen(ends, tower.config), f"cu_{which}seqlens"
        if longest is not None:  # kernels for variable lengths read the bounds on the device and need the longest part
            return {name: to_device(ends, device), f"max_{which}seqlen": longest}
        # The other attention functions split tensors by lengths that each layer reads on the host: on the device that would
        # be one synchronization a layer. DistributedDataParallel moves inputs to the device all the same.
        return {name: ends}

    def pixel_signature(self, config: Any) -> dict[str, Any]:
        vision = config.vision_config
        return {
            "patch_size": vision.patch_size,
            "spatial_merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
        }


@register_family
class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_type = "qwen2_5_vl"

    def _tower_inputs(self, tower: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
        sizes = {"spatial_merge_size": tower.spatial_merge_size, "window_size": tower.window_size}
        order, ends = vision_utils.get_vision_window_index(grid, patch_size=tower.patch_size, **sizes)
        windows = {"window_index": to_device(order, device), **self._bounds(tower, "window_", ends, device)}
        return {**super()._tower_inputs(tower, grid, device), **windows}


@register_family
class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration` (deepstack)."""

    model_type = "qwen3_vl"
    projector: ClassVar[tuple[str, ...]] = (
        r"re:(.*\.)?visual\.merger\..*",
        r"re:(.*\.)?visual\.deepstack_merger_list\..*",
    )

    def _tower_inputs(self, tower: Any, grid: Tensor, device: torch.device) -> dict[str, Any]:
        indices, weights = vision_utils.get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=tower.config.spatial_merge_size,
        )
        table = {"interp_indices": to_device(indices, device), "interp_weights": to_device(weights, device)}
        return {**super()._tower_inputs(tower, grid, device), **table}


@register_family
class Qwen3VLMoe(Qwen3VL):
    """`Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
    router: ClassVar[tuple[str, ...]] = (r"re:(.*\.)?mlp\.gate$",)

    def unfuse_experts(self, model: nn.Module) -> None:
        linearize_moe(model)
        for module in model.modules():
            # llm-compressor's offload pins the new linears to the device they were made on, and a trainer moves models.
            remove_module_offload(module)

    @contextmanager
    def loading_context(self) -> Iterator[None]:
        # Plain from_pretrained knows fused experts only and would draw the linears at random.
        with patch_moe_mappings(self.model_type, [], _FUSED_EXPERTS), load_quantizable_moe(AutoModelForImageTextToText):
            yield
