"""What an operation touches: the largest tensor it makes and its matrix products, seen at the dispatcher."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

PRODUCTS = {"mm", "addmm", "bmm"}


class Footprint(TorchDispatchMode):
    """Context manager; ``largest`` is the most elements of any tensor made inside, ``made`` all of their elements,
    ``products`` the dtypes multiplied, ``calls`` how many products there were.
    """

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.made = 0
        self.products = set()
        self.calls = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
                self.made += value.numel()
        if func.overloadpacket._qualified_op_name.removeprefix("aten::") in PRODUCTS:
            self.calls += 1
            self.products |= {arg.dtype for arg in args if isinstance(arg, torch.Tensor)}
        return out
