"""What a model's config says of the samples that it takes: how many tokens, and which token ids."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["context_length", "vocabulary_rows"]

_STRETCHED = ("linear", "dynamic", "yarn")  # others state the stretched length in max_position_embeddings


def vocabulary_rows(config: Any) -> int | None:
    """Return the rows of the model's embedding, or None where its config does not say."""
    rows = getattr(config.get_text_config(), "vocab_size", None)
    return rows if isinstance(rows, int) else None


def _scalings(config: Any) -> Iterator[Mapping[str, Any]]:
    """The rope settings of a text config: one, or one for each kind of layer."""
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
        if scaling.get("rope_type", scaling.get("type")) in _STRETCHED and scaling.get("factor"):
            longest = max(longest, int((scaling.get("original_max_position_embeddings") or most) * scaling["factor"]))
    return longest
