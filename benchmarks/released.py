"""Processors with the image settings of released checkpoints, around the tiny tokenizers of tests/tiny.py.

What an image costs to look at depends on these settings and not on the vocabulary.
"""

from __future__ import annotations

from typing import Any

from tests.tiny import build

__all__ = ["SETTINGS", "released"]


def _square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


#: family -> (fields of the image processor, fields of the processor)
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llava": ({"size": {"shortest_edge": 336}, "crop_size": _square(336)}, {}),
    "llava_next": (
        {
            "size": {"shortest_edge": 336},
            "crop_size": _square(336),
            "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        },
        {},
    ),
    "llava_onevision": (
        {"size": _square(384), "image_grid_pinpoints": [[384 * i, 384 * j] for i in range(1, 7) for j in range(1, 7)]},
        {"num_image_tokens": 729},
    ),
    "qwen2_vl": ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, {}),
    "qwen2_5_vl": ({"size": {"shortest_edge": 3136, "longest_edge": 12845056}}, {}),
    "qwen3_vl": ({"size": {"shortest_edge": 65536, "longest_edge": 16777216}}, {}),
    "internvl": ({"size": _square(448), "max_patches": 12}, {"image_seq_length": 256}),
    "smolvlm": ({"size": {"longest_edge": 1536}, "max_image_size": {"longest_edge": 384}}, {"image_seq_len": 81}),
    "idefics3": ({"size": {"longest_edge": 1456}, "max_image_size": {"longest_edge": 364}}, {"image_seq_len": 169}),
    "gemma3": ({"size": _square(896)}, {"image_seq_length": 256}),
    "mistral3": ({"size": {"longest_edge": 1540}}, {}),
    "pixtral": ({"size": {"longest_edge": 1024}}, {}),
}


def released(family: str) -> Any:
    """The tiny processor of a family with released image settings."""
    processor = build(family)[1]
    images, own = SETTINGS[family]
    for owner, fields in ((processor.image_processor, images), (processor, own)):
        for name, value in fields.items():
            kind = type(getattr(owner, name))
            setattr(owner, name, kind(**value) if isinstance(value, dict) and kind is not dict else value)
    return processor
