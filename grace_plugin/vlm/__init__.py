"""Families of vision-language models: one small file for each arrangement of visual tokens, and a registry."""

from grace_plugin.vlm.base import VISUAL_RUNS, Capture, Family, VisualTokens, capture, check_depth, matches
from grace_plugin.vlm.bounds import bounded_size
from grace_plugin.vlm.limits import context_length, vocabulary_rows
from grace_plugin.vlm.pair import (
    check_image_processors,
    check_pixels,
    load_image_processor,
    load_tokenizer,
    load_video_processor,
    shared_vocabulary,
)
from grace_plugin.vlm.registry import FAMILIES, family_of, register_family

__all__ = [
    "FAMILIES",
    "VISUAL_RUNS",
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
    "load_video_processor",
    "matches",
    "register_family",
    "shared_vocabulary",
    "vocabulary_rows",
]
