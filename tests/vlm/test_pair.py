"""Tokenizers of teacher and student are compared id by id and by what they make of a text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText

from grace_plugin.vlm import load_tokenizer, shared_vocabulary
from tests.pairs import Pair
from tests.tiny import FAMILIES, build, make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "expected"), [(0, 0, 0), (128, 64, 0), (0, 192, 0), (-3, 0, -3), (0, -5, -5)]
)
def test_padded_heads_of_any_size_share_the_tokenizers_ids(
    family: str, student_rows: int, teacher_rows: int, expected: int
) -> None:
    """Rows and result relative to the tokenizer's length."""
    tokenizer = make_tokenizer(family)
    size = len(tokenizer)
    found = shared_vocabulary(
        tokenizer, make_tokenizer(family), student_rows=size + student_rows, teacher_rows=size + teacher_rows
    )
    assert found == size + expected


def test_processors_are_taken_for_their_tokenizers() -> None:
    (_, a), (_, b) = build("llava"), build("llava")
    assert shared_vocabulary(a, b, student_rows=999, teacher_rows=999) == len(a.tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_another_tokenizer_is_refused_with_examples(family: str) -> None:
    ours, theirs = make_tokenizer(family), make_tokenizer(family, "other")
    size = min(len(ours), len(theirs))
    differing = [i for i in range(size) if ours.convert_ids_to_tokens(i) != theirs.convert_ids_to_tokens(i)]
    with pytest.raises(
        ValueError, match=rf"differ on {len(differing)} of {size} shared ids .*{differing[0]}: "
    ) as caught:
        shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999)
    assert "choose a teacher of the same tokenizer generation" in str(caught.value)


def test_a_teacher_with_further_tokens_behind_is_taken() -> None:
    ours, theirs = make_tokenizer("llava"), make_tokenizer("llava")
    theirs.add_tokens(["<extra>"])
    assert shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999) == len(ours)


def test_the_same_ids_cut_differently_are_refused() -> None:
    ours, theirs = make_tokenizer("llava"), make_tokenizer("llava")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=r"share their ids but cut the same text differently"):
        shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999)


def test_the_tokenizer_beside_a_checkpoint(llava: Pair) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.bfloat16)
    assert load_tokenizer(model, "student").get_vocab() == make_tokenizer("llava").get_vocab()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_a_model_without_a_readable_folder_is_named(role: str, tmp_path) -> None:
    model, _ = build("llava")
    with pytest.raises(ValueError, match=rf"the {role} has no name_or_path.*pass {role}_processor="):
        load_tokenizer(model, role)
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"cannot read the {role}'s tokenizer from .*gone.*pass {role}_processor="):
        load_tokenizer(model, role)
