"""Old names work for one release, with a warning that gives the new one."""

from __future__ import annotations

import warnings
from argparse import ArgumentParser
from typing import Any

import pytest

import grace_plugin.data
from grace_plugin.cli.register_grace import _data_check
from grace_plugin.data import BadSamplesError, Prepared, SampleError, load_samples, prepare
from grace_plugin.deprecation import deprecated_method, renamed_arguments


class _Loop:
    def begin_step(self, number: int) -> int:
        """Return the number after it."""
        return number + 1

    window = deprecated_method("Loop", "window", "begin_step")


class _OwnLoop(_Loop):
    def begin_step(self, number: int) -> int:
        """Return the number before it."""
        return number - 1


@renamed_arguments(size="length")
def _double(length: int) -> int:
    return 2 * length


def test_deprecated_method__called__warns_and_calls_the_new_one() -> None:
    with pytest.warns(
        FutureWarning, match=r"^Loop.window is now begin_step; the old name will be removed in the next release$"
    ) as found:
        assert _Loop().window(3) == 4
    assert found[0].filename == __file__
    with pytest.warns(FutureWarning):
        assert _OwnLoop().window(3) == 2


def test_renamed_arguments__old_name__warns_and_is_passed_on() -> None:
    with pytest.warns(FutureWarning, match=r"^the argument size of _double\(\) is now length; "):
        assert _double(size=4) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _double(length=5) == 10


def test_renamed_arguments__both_names__refused() -> None:
    with pytest.raises(TypeError, match=r"^_double\(\) got length and its old name size; give length$"):
        _double(size=4, length=4)


@pytest.mark.parametrize(
    ("old", "new"), [("load_rows", load_samples), ("BadRowsError", BadSamplesError), ("RowError", SampleError)]
)
def test_data__names_of_0_1__are_the_new_objects(old: str, new: Any) -> None:
    with pytest.warns(FutureWarning, match=rf"^grace_plugin\.data\.{old} is now grace_plugin\.data\.{new.__name__}; "):
        assert getattr(grace_plugin.data, old) is new


def test_data__unknown_name__attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"^module 'grace_plugin\.data' has no attribute 'load_everything'$"):
        grace_plugin.data.load_everything  # noqa: B018


@pytest.mark.parametrize("option", ["--max_bad_rows", "--max_bad_samples"])
def test_data_check__either_name_of_the_share__is_stored(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = ArgumentParser()
    _data_check(parser)
    assert parser.parse_args(["samples.jsonl", "--model", "m", option, "0.25"]).max_bad_samples == 0.25
    said = "--max_bad_rows is now --max_bad_samples; the old name will be removed in the next release\n"
    assert capsys.readouterr().err == (said if option == "--max_bad_rows" else "")
    assert parser.parse_args(["samples.jsonl", "--model", "m"]).max_bad_samples == 1.0
    assert "max_bad_rows" not in parser.format_help()


def test_prepare__max_bad_rows__is_max_bad_samples() -> None:
    """The share is checked before the samples are read, so no processor is needed."""
    with (
        pytest.warns(FutureWarning, match=r"max_bad_rows of prepare\(\) is now max_bad_samples"),
        pytest.raises(ValueError, match=r"^max_bad_samples is a share of the samples between 0 and 1, got 2.0$"),
    ):
        prepare([{}], None, max_bad_rows=2.0)  # type: ignore[call-arg, arg-type]
    assert Prepared.__name__ == "Prepared"
