"""Families of vision-language models: one file per arrangement of visual tokens, and a registry."""

from grace_plugin.vlm import anyres, llava, qwen_vl, tiles  # noqa: F401 - each registers its families; add a new file here
from grace_plugin.vlm.compatibility import (
    check_image_processors,
    check_pixels,
    load_image_processor,
    load_tokenizer,
    shared_vocabulary,
)
from grace_plugin.vlm.config_limits import check_depth, context_length, vocabulary_rows
from grace_plugin.vlm.family import VISUAL_SPANS, Capture, Family, VisualTokens, capture, matches
from grace_plugin.vlm.image_size import bounded_size
from grace_plugin.vlm.registry import FAMILIES, family_of, register_family

__all__ = [
    "FAMILIES",
    "VISUAL_SPANS",
    "Capture",
    "Family",
    "VisualTokens",
    "bounded_size",
    "capture",
    "check_depth",
    "check_image_processors",
    "check_pixels",
    "context_length",
    "family_of",
    "load_image_processor",
    "load_tokenizer",
    "matches",
    "register_family",
    "shared_vocabulary",
    "vocabulary_rows",
]
