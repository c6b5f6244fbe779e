"""Values of a sample as messages quote them: short, whatever the value is.

A sample may hold a data URI of a megabyte where a path is expected, or an integer of a million digits. A message that quotes
it whole fills the terminal and every line of `data_rejected.jsonl`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

__all__ = ["MESSAGE", "shortened", "shown"]

MESSAGE = 480
"""Characters of one sample's message, at most."""


def shown(value: Any, limit: int = 80) -> str:
    """Return `repr(value)` cut to about `limit` characters; of a long text or bytes, say how long it is.

    The whole representation is never built, so the cost does not depend on the size of the value.
    """
    if isinstance(value, (str, bytes)):
        if len(value) <= limit:
            # escapes may make it four times as long
            return shortened(repr(value), 2 * limit)
        unit = "characters" if isinstance(value, str) else "bytes"
        return f"{shortened(repr(value[:limit]), 2 * limit)}... ({len(value):,} {unit})"
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        # repr refuses more than 4,300 digits
        return f"an integer of {value.bit_length():,} bits"
    # before Python 3.12 it takes no arguments
    short = reprlib.Repr()
    short.maxlevel, short.maxdict, short.maxstring, short.maxother = 6, 8, limit // 2, limit
    try:
        return shortened(short.repr(value), limit)
    except Exception:  # __repr__ may raise anything, also of an item in a list
        return f"a {type(value).__name__}" + (f" of {len(value)} keys" if isinstance(value, Mapping) else "")


def shortened(text: Any, limit: int = 200) -> str:
    """Return a text of at most `limit` characters: its beginning and its end, on one line.

    For what other libraries say, and for whole messages, whose end says how to fix the error.
    """
    text = str(text)
    if len(text) > limit:
        end = limit // 3
        text = f"{text[: limit - end - 5]} ... {text[-end:]}"
    return " ".join(text.splitlines()) if "\n" in text or "\r" in text else text
