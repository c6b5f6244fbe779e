"""How many threads torch has for what it computes in host memory."""

from __future__ import annotations

from typing import Any

from torch import Tensor, get_num_threads
from torch.utils._python_dispatch import TorchDispatchMode


class Threads(TorchDispatchMode):
    """How many threads torch has for each operation in host memory, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, set[int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.device.type == "cpu":
            self.found.setdefault(func.__name__, set()).add(get_num_threads())
        return out
