"""Limits that a model's config states: context length, token ids, depth."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["check_depth", "context_length", "vocabulary_rows"]

# Other rope types state the scaled length in max_position_embeddings.
_SCALED = ("linear", "dynamic", "yarn")


def vocabulary_rows(config: Any) -> int | None:
    """Return the rows of the model's embedding, or None where its config does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _scalings(config: Any) -> Iterator[Mapping[str, Any]]:
    """Yield the rope settings of a text config: one, or one for each kind of layer."""
    # transformers 5 renamed rope_scaling to rope_parameters; remote code and old configs still set the former
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    if isinstance(found, Mapping):
        yield found
        yield from (part for part in found.values() if isinstance(part, Mapping))


def context_length(config: Any) -> int | None:
    """Return how many tokens a model takes, rope scaling included, or None where its config does not say."""
    text = config.get_text_config()
    most = getattr(text, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return None
    longest = most
    for scaling in _scalings(text):
        if scaling.get("rope_type", scaling.get("type")) in _SCALED and scaling.get("factor"):
            longest = max(longest, int((scaling.get("original_max_position_embeddings") or most) * scaling["factor"]))
    return longest


def check_depth(config: Any, role: str) -> None:
    """Refuse a decoder without a penultimate layer, which the relational term needs.

    Args:
        config: of a model.
        role: "student" or "teacher".

    Raises:
        ValueError: the decoder has fewer than two layers.
    """
    layers = config.get_text_config().num_hidden_layers
    if layers < 2:
        raise ValueError(
            f"the {role}'s decoder has {layers} layer(s); the relational term needs at least 2, because it "
            "reads the last but one: set relational: {enabled: false}"
        )
