"""What was lately computed of a text, kept while it is used: a bounded memory for one process.

Questions and answers repeat within an epoch and from one epoch to the next. What repeats is rendered and tokenised once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

__all__ = ["Recent"]

Value = TypeVar("Value")


class Recent(Generic[Value]):
    """Values by key, of which the one unused for longest goes first.

    Copies and pickles are empty: what one process remembers is not sent to another.

    Args:
        entries: how many values are kept at most.
        longest: texts of more characters are not kept, which bounds the memory as well.
    """

    def __init__(self, entries: int = 4096, longest: int = 1000) -> None:
        self.entries, self.longest = entries, longest
        self._held: OrderedDict[Hashable, Value] = OrderedDict()

    def __reduce__(self) -> tuple[type[Recent[Value]], tuple[int, int]]:
        return type(self), (self.entries, self.longest)

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable) -> Value | None:
        """The value, or None where there is none; it must not be changed."""
        value = self._held.pop(key, None)
        if value is not None:
            self._held[key] = value
        return value

    def put(self, key: Hashable, value: Value, characters: int) -> None:
        """Keep the value of a key that holds so many characters."""
        if characters > self.longest:
            return
        self._held[key] = value
        while len(self._held) > self.entries:
            self._held.popitem(last=False)
