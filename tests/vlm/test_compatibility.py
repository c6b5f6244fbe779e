"""Tokenizers of teacher and student are compared id by id and by what they make of a text."""

from __future__ import annotations

import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForImageTextToText

from grace_plugin.vlm import (
    check_image_processors,
    check_pixels,
    family_of,
    load_image_processor,
    load_tokenizer,
    shared_vocabulary,
)
from tests.pairs import Pair
from tests.tiny import FAMILIES, build, make_tokenizer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("student_rows", "teacher_rows", "expected"), [(0, 0, 0), (128, 64, 0), (0, 192, 0), (-3, 0, -3), (0, -5, -5)]
)
def test_shared_vocabulary__padded_heads__ids_of_the_tokenizers(
    family: str, student_rows: int, teacher_rows: int, expected: int
) -> None:
    """Rows and result relative to the tokenizer's length."""
    tokenizer = make_tokenizer(family)
    size = len(tokenizer)
    found = shared_vocabulary(
        tokenizer, make_tokenizer(family), student_rows=size + student_rows, teacher_rows=size + teacher_rows
    )
    assert found == size + expected


def test_shared_vocabulary__processors__their_tokenizers_used() -> None:
    (_, a), (_, b) = build("llava"), build("llava")
    assert shared_vocabulary(a, b, student_rows=999, teacher_rows=999) == len(a.tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_shared_vocabulary__other_tokenizer__refused_with_examples(family: str) -> None:
    ours, theirs = make_tokenizer(family), make_tokenizer(family, "other")
    size = min(len(ours), len(theirs))
    differing = [i for i in range(size) if ours.convert_ids_to_tokens(i) != theirs.convert_ids_to_tokens(i)]
    with pytest.raises(
        ValueError, match=rf"differ on {len(differing)} of {size} shared ids .*{differing[0]}: "
    ) as caught:
        shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999)
    assert "choose a teacher of the same tokenizer generation" in str(caught.value)


def test_shared_vocabulary__teacher_with_more_tokens__accepted() -> None:
    ours, theirs = make_tokenizer("llava"), make_tokenizer("llava")
    theirs.add_tokens(["<extra>"])
    assert shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999) == len(ours)


def test_shared_vocabulary__same_ids_other_segmentation__refused() -> None:
    ours, theirs = make_tokenizer("llava"), make_tokenizer("llava")
    theirs.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    with pytest.raises(ValueError, match=r"share their ids but cut the same text differently"):
        shared_vocabulary(ours, theirs, student_rows=999, teacher_rows=999)


def test_load_tokenizer__checkpoint__its_vocabulary(llava: Pair) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.bfloat16)
    assert load_tokenizer(model, "student").get_vocab() == make_tokenizer("llava").get_vocab()


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_load_tokenizer__no_readable_folder__role_named(role: str, tmp_path) -> None:
    model, _ = build("llava")
    with pytest.raises(ValueError, match=rf"the {role} has no name_or_path.*pass {role}_processor="):
        load_tokenizer(model, role)
    model.name_or_path = str(tmp_path / "gone")
    with pytest.raises(ValueError, match=rf"cannot read the {role}'s tokenizer from .*gone.*pass {role}_processor="):
        load_tokenizer(model, role)


@pytest.mark.parametrize(
    ("name", "field", "value", "shown"),
    [
        ("llava", "size", {"shortest_edge": 112}, r"size: \{'shortest_edge': 56\} / \{'shortest_edge': 112\}"),
        (
            "qwen2_vl",
            "size",
            {"shortest_edge": 3136, "longest_edge": 50176},
            "'longest_edge': 12544.*'longest_edge': 50176",
        ),
        ("qwen3_vl", "image_mean", [0.1, 0.2, 0.3], r"image_mean: \[0.5, 0.5, 0.5\] / \[0.1, 0.2, 0.3\]"),
        ("llava_next", "image_grid_pinpoints", [[56, 56]], r"image_grid_pinpoints: .* / \[\[56, 56\]\]"),
        ("internvl", "max_patches", 6, "max_patches: 3 / 6"),
        ("smolvlm", "do_image_splitting", False, "do_image_splitting: True / False"),
        ("gemma3", "do_pan_and_scan", True, "do_pan_and_scan: .* / True"),
        ("qwen2_vl", "resample", 2, "resample: 3 / 2"),
    ],
)
def test_image_settings__different__refused_with_both_values(name: str, field: str, value: object, shown: str) -> None:
    (_, ours), (_, theirs) = build(name), build(name)
    check_image_processors(ours, theirs)
    setattr(theirs.image_processor, field, value)
    with pytest.raises(ValueError, match=rf"different image settings \(student / teacher\): .*{shown}"):
        check_image_processors(ours, theirs)


@pytest.mark.parametrize(
    ("name", "field", "value", "shown"),
    [
        ("qwen2_5_vl", "size", {"shortest_edge": 3136, "longest_edge": 50176}, "size: .*12544.* / .*50176"),
        ("qwen3_vl", "image_std", [0.1, 0.2, 0.3], r"image_std: \[0.5, 0.5, 0.5\] / \[0.1, 0.2, 0.3\]"),
        ("internvl", "resample", 2, "resample: 3 / 2"),
        ("llava_onevision", "do_normalize", False, "do_normalize: True / False"),
    ],
)
def test_video_settings__different__refused_with_both_values(name: str, field: str, value: object, shown: str) -> None:
    (_, ours), (_, theirs) = build(name), build(name)
    theirs.video_processor.max_frames = 5  # how many frames there are does not depend on it
    check_image_processors(ours, theirs, "video")
    setattr(theirs.video_processor, field, value)
    check_image_processors(ours, theirs)
    with pytest.raises(ValueError, match=rf"different video settings \(student / teacher\): .*{shown}"):
        check_image_processors(ours, theirs, "video")


def test_check_image_processors__no_processor__not_compared(tmp_path) -> None:
    model, processor = build("llava")
    assert load_image_processor(model) is None
    model.name_or_path = str(tmp_path)
    assert load_image_processor(model) is None
    check_image_processors(processor, None)
    check_image_processors(processor.tokenizer, processor)


def test_load_image_processor__checkpoint__its_settings(llava: Pair) -> None:
    model = AutoModelForImageTextToText.from_pretrained(llava.student, dtype=torch.bfloat16)
    _, processor = build("llava")
    found = load_image_processor(model)
    check_image_processors(processor, found)
    found.image_mean = [0.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="image_mean"):
        check_image_processors(processor, found)


@pytest.mark.parametrize(
    ("student", "teacher"), [("qwen2_vl", "qwen2_5_vl"), ("qwen3_vl", "qwen3_vl_moe"), ("smolvlm", "idefics3")]
)
def test_check_pixels__other_family_same_layout__accepted(student: str, teacher: str) -> None:
    (ours, own), (theirs, other) = build(student), build(teacher)
    check_pixels(family_of(ours), ours.config, family_of(theirs), theirs.config)
    assert shared_vocabulary(own, other, student_rows=999, teacher_rows=999) == len(own.tokenizer)


@pytest.mark.parametrize(
    ("student", "teacher", "shown"),
    [
        ("qwen2_vl", "qwen3_vl", "patch_size: 14 / 16"),
        ("llava", "llava_next", "image_grid_pinpoints: None / "),
        ("gemma3", "internvl", "mm_tokens_per_image: 16 / None"),
        ("pixtral", "mistral3", "spatial_merge_size: None / 2"),
    ],
)
def test_check_pixels__other_family_other_layout__refused(student: str, teacher: str, shown: str) -> None:
    (ours, _), (theirs, _) = build(student), build(teacher)
    with pytest.raises(ValueError, match=rf"the student is of family .* and the teacher of .*{shown}"):
        check_pixels(family_of(ours), ours.config, family_of(theirs), theirs.config)


def test_check_pixels__other_image_token__refused() -> None:
    (ours, _), (theirs, _) = build("qwen2_vl"), build("qwen2_5_vl")
    theirs.config.image_token_id += 1
    with pytest.raises(ValueError, match=r"image token id: (\d+) / \d+"):
        check_pixels(family_of(ours), ours.config, family_of(theirs), theirs.config)
