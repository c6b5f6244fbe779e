"""What is kept of a compiled kernel, and when it is started again."""

import pytest
import torch

from grace_plugin.quantizer.fake_quant_triton import Kernel


class Compiled:
    """Started as what `triton.jit` compiles to is; keeps what it was started with."""

    def __init__(self, starts):
        self.starts = starts

    def __getitem__(self, grid):
        return lambda *arguments: self.starts.append((self, grid, arguments))


class Function:
    """Called as a function of `triton.jit` is: compiles at every call, or runs in Python as under its interpreter."""

    def __init__(self, interpreted=False):
        self.starts, self.compiled, self.interpreted = [], [], interpreted

    def __getitem__(self, grid):
        def start(*arguments, num_warps):
            self.compiled.append((grid, arguments, num_warps))
            return None if self.interpreted else Compiled(self.starts)

        return start


def test_kernel__second_start__not_compiled_again():
    function, x, y = Function(), torch.zeros(32), torch.ones(32)
    kernel = Kernel(function)
    kernel.start(3, (x, 48, 0.5), ("A", True), 4)
    assert function.compiled == [((3,), (x, 48, 0.5, "A", True), 4)] and function.starts == []
    kernel.start(5, (y, 16, 7.0), ("A", True), 4)
    assert len(function.compiled) == 1
    ((_, grid, arguments),) = function.starts
    assert grid == (5, 1, 1) and arguments == (y, 16, 7.0, "A", True)


@pytest.mark.parametrize(
    ("other", "constants", "warps"),
    [
        ((torch.zeros(9)[1:], 48), ("A",), 4), ((torch.zeros(8).half(), 48), ("A",), 4), ((torch.zeros(8), 47), ("A",), 4),
        ((torch.zeros(8), 1), ("A",), 4), ((torch.zeros(8), 16 << 31), ("A",), 4), ((torch.zeros(8), 48), ("B",), 4),
        ((torch.zeros(8), 48), ("A",), 8), ((torch.zeros(8, device="meta"), 48), ("A",), 4),
    ],
)  # fmt: skip
def test_kernel__other_properties__compiled_again(other, constants, warps):
    function = Function()
    kernel = Kernel(function)
    for arguments, names, count in [((torch.zeros(8), 48), ("A",), 4), (other, constants, warps)] * 2:
        kernel.start(1, arguments, names, count)
    assert len(function.compiled) == 2
    (first, _, _), (second, _, again) = function.starts
    assert first is not second and again == (*other, *constants)


@pytest.mark.parametrize(
    ("one", "other", "kernels"), [(16, (1 << 31) - 16, 1), ((1 << 31) - 16, 1 << 31, 2), (47, 1, 2), (47, 2, 1)]
)
def test_kernel__whole_numbers__share_by_size_and_alignment(one, other, kernels):
    function = Function()
    kernel = Kernel(function)
    for number in (one, other):
        kernel.start(1, (torch.zeros(8), number), (), 4)
    assert len(function.compiled) == kernels and len(function.starts) == 2 - kernels


def test_kernel__interpreter__asked_every_time():
    function = Function(interpreted=True)
    kernel = Kernel(function)
    for _ in range(3):
        kernel.start(1, (torch.zeros(8), 48), (), 4)
    assert len(function.compiled) == 3
