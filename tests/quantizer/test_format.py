"""The format of a weight, what it refuses, and the table that formats are added to from outside."""

import dataclasses

import pytest
import torch
from torch import nn

from grace_plugin.quantizer import FormatRow, IntegerQuantizer, QuantFormat, attach, register_format
from grace_plugin.quantizer.format import FORMATS


def test_code_range__symmetric_integers__one_more_negative_code():
    found = [QuantFormat(bits, stored_dtype=torch.float16).code_range for bits in (2, 3, 4, 8)]
    assert found == [(-2, 1), (-4, 3), (-8, 7), (-128, 127)]


@pytest.mark.parametrize("bits", [1, 9, 0, -4])
def test_format__bits_that_are_not_packed__refused(bits):
    with pytest.raises(ValueError, match=f"num_bits must be between 2 and 8, got {bits}"):
        QuantFormat(bits, stored_dtype=torch.float16)


def test_format__values_of_no_checkpoint__refused():
    with pytest.raises(ValueError, match=r"scales cannot be stored as torch.int8; use torch.bfloat16"):
        QuantFormat(4, stored_dtype=torch.int8)
    for size in (0, -2):
        with pytest.raises(ValueError, match=f"group_size {size} is not a positive number"):
            QuantFormat(4, size)
    with pytest.raises(dataclasses.FrozenInstanceError):
        QuantFormat().num_bits = 3


def test_quantizer__formats_that_are_not_learned__refused():
    with pytest.raises(ValueError, match=r"8-bit codes do not survive.*use float16"):
        _ = QuantFormat(8).quantizer
    with pytest.raises(ValueError, match=r"no fake quantizer learns asymmetric weights of 4 bits"):
        _ = QuantFormat(4, symmetric=False).quantizer
    assert QuantFormat(8).integer_range == (-128, 127)
    for bits in range(2, 9):
        assert QuantFormat(bits, stored_dtype=torch.float16).quantizer.has_kernel
        assert bits == 8 or QuantFormat(bits).quantizer.has_kernel


def test_groups__widths__divided_or_refused():
    assert [QuantFormat(4, size).groups(256) for size in (128, 256, 1, -1, None)] == [2, 1, 256, 1, 1]
    assert QuantFormat(4, -1) == QuantFormat(4, None) and hash(QuantFormat(4, -1)) == hash(QuantFormat(4, None))
    assert QuantFormat(4, 128).width_problem(256) is None
    assert QuantFormat(4, None).width_problem(200) is None
    assert QuantFormat(4, 128).width_problem(200) == "input width 200 is not divisible by group_size 128"
    assert QuantFormat(4, 128).width_problem(64) == "input width 64 is not divisible by group_size 128"
    with pytest.raises(ValueError, match="input width 200 is not divisible by group_size 128; choose a group_size"):
        QuantFormat(4, 128).groups(200)
    assert [str(QuantFormat(4, 32)), str(QuantFormat(3, None))] == ["4 bits, group 32", "3 bits, per channel"]


class Narrow(IntegerQuantizer):
    """Symmetric integers without the most negative one."""

    def code_range(self, fmt):
        return -fmt.integer_range[1], fmt.integer_range[1]


class Wide(IntegerQuantizer):
    """One code more than the bits hold."""

    def code_range(self, fmt):
        return fmt.integer_range[0], fmt.integer_range[1] + 1


def test_register_format__row_from_outside__takes_precedence():
    row, linear = FormatRow("narrow integers", (3,), Narrow()), nn.Linear(64, 8)
    register_format(row)
    try:
        group = attach({"a": linear}, QuantFormat(3, 16), low=0.1, high=0.3)
        codes, _ = group.freeze()["a"]
        assert codes.min() == -3 and codes.max() == 3
        assert QuantFormat(4).code_range == (-8, 7)
    finally:
        FORMATS.remove(row)
    assert QuantFormat(3).code_range == (-4, 3)


def test_register_format__codes_beyond_the_bits__refused():
    before = list(FORMATS)
    with pytest.raises(ValueError, match="format 'wide' has codes from -8 to 8; 4 bits hold -8 to 7"):
        register_format(FormatRow("wide", (4,), Wide()))
    assert before == FORMATS


def test_integer_quantizer__subclass_with_its_own_rounding__no_kernel() -> None:
    class Floor(IntegerQuantizer):
        def round(self, quotient: torch.Tensor) -> torch.Tensor:
            return quotient.floor()

    class Narrow(IntegerQuantizer):
        def code_range(self, fmt: QuantFormat) -> tuple[int, int]:
            return -1, 1

    assert (Floor().has_kernel, Narrow().has_kernel, IntegerQuantizer().has_kernel) == (False, True, True)
