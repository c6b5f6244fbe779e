"""What the models take of a sample: ids that both have, tokens of the context, special tokens, and no pad token."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

import grace_plugin
from grace_plugin.data import BadSamplesError, ConversationCollator, SampleError, prepare, sample_key
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.vlm import context_length
from tests.pairs import Pair, recipe_text, run
from tests.tiny import build, make_samples

BOX = "<|vision_start|>"  # stands for the marks of a grounding model's boxes


def talk(asked: str, answer: str = "red") -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def grown(family: str = "qwen2_vl", *words: str) -> Any:
    """A processor whose tokenizer has words that the model does not."""
    processor = build(family)[1]
    processor.tokenizer.add_tokens(list(words or ("[rect]",)))
    return processor


@pytest.mark.parametrize("sample", [talk("say [rect]"), talk("say", "a [rect]")], ids=["prompt", "answer"])
def test_prepare__token_outside_the_vocabulary__is_counted_with_its_name(sample: dict[str, Any]) -> None:
    processor = grown()
    limit = processor.tokenizer.convert_tokens_to_ids("[rect]")
    collator = ConversationCollator(processor, vocabulary=limit)
    found = prepare([talk("say"), sample], collator, max_bad_samples=0.5)
    assert found.numbers.tolist() == [0]
    assert found.report["rejected"] == {"outside_vocabulary": 1}
    message = rf"has the token '\[rect\]' with id {limit}; .* end at {limit - 1}"
    with pytest.raises(SampleError, match=message):
        collator([sample])
    again = ConversationCollator(processor, vocabulary=limit + 1)
    assert prepare([talk("say"), sample], again).report["usable"] == 2


def test_collate__pad_token_outside_the_vocabulary__pads_with_an_id_that_both_models_have() -> None:
    processor = grown("qwen2_vl", "[pad]")
    processor.tokenizer.pad_token = "[pad]"
    limit = processor.tokenizer.pad_token_id
    batch = ConversationCollator(processor, vocabulary=limit)([talk("say"), talk("say which colour stands left")])
    assert int(batch["input_ids"].max()) < limit
    assert batch["attention_mask"][0, -1] == 0


@pytest.mark.slow
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_train__token_that_a_model_does_not_have__is_refused_before_the_first_step(
    which: str, llava: Pair, tmp_path: Path
) -> None:
    """The teacher has no such token; or the student's embedding has no such sample."""
    processor = grown("llava")
    extra = processor.tokenizer.convert_tokens_to_ids("[rect]")
    student: Any = str(llava.student)
    if which == "teacher":
        model = build("llava", vocab_rows=extra + 64)[0]
        model.name_or_path = str(llava.student)
        student = model
    dataset = [*make_samples(2), talk("say [rect]")]
    with pytest.raises(BadSamplesError, match=r"1 outside_vocabulary.*has the token '\[rect\]'"):
        run(llava, tmp_path / "out", dataset, model=student, processor=processor)
    # a tokenizer that is larger than the student's embedding is refused by oneshot even before the samples
    with pytest.raises(ValueError, match=r"1 outside_vocabulary|1 tokens beyond the 383 rows"):
        grace_plugin.oneshot(
            student,
            recipe=recipe_text(llava.teacher),
            dataset=dataset,
            output_dir=tmp_path / "out",
            processor=processor,
        )
    assert not (tmp_path / "out").exists()


def test_train__sample_longer_than_the_context__is_counted_and_named(llava: Pair, tmp_path: Path) -> None:
    long = talk("one two three four " * 600)
    with pytest.raises(BadSamplesError, match=r"1 too_long.*the model's context is 2048 \(max_position_embeddings\)"):
        run(llava, tmp_path / "out", [talk("say"), long])
    assert ConversationCollator(build("llava")[1])([long])["input_ids"].shape[1] > 2048


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 1000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1000}, 4000),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 250}, 1000),
        ({"rope_type": "linear", "factor": 2.0}, 2000),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 125}, 1000),
        (
            {"full_attention": {"rope_type": "linear", "factor": 8.0}, "sliding_attention": {"rope_type": "default"}},
            8000,
        ),
        (None, 1000),
    ],
)
def test_context_length__rope_settings__stretch_it_where_they_say_so(rope: Any, expected: int) -> None:
    text = SimpleNamespace(max_position_embeddings=1000, rope_parameters=rope)
    assert context_length(SimpleNamespace(get_text_config=lambda: text)) == expected
    assert context_length(PreTrainedConfig()) is None


def test_special_tokens__allowed__become_tokens_and_others_stay_text() -> None:
    processor = build("qwen2_vl")[1]
    sample = talk("find", f"{BOX}red{BOX} <|vision_end|>")
    plain, allowed = ConversationCollator(processor), ConversationCollator(processor, special_tokens=[BOX])
    token, other = (processor.tokenizer.convert_tokens_to_ids(text) for text in (BOX, "<|vision_end|>"))
    supervised = {}
    for name, collator in (("plain", plain), ("allowed", allowed)):
        labels = collator([sample])["labels"]
        supervised[name] = labels[labels != IGNORE_INDEX].tolist()
        assert processor.tokenizer.decode(supervised[name]) == f"{BOX}red{BOX} <|vision_end|><|im_end|>"
    assert (supervised["plain"].count(token), supervised["allowed"].count(token)) == (0, 2)
    assert other not in supervised["allowed"]
    reports = [prepare([sample, talk("q")], collator).report for collator in (plain, allowed)]
    assert reports[0]["spelled_special_tokens"] == {BOX: 2, "<|vision_end|>": 1}
    assert reports[1]["spelled_special_tokens"] == {"<|vision_end|>": 1}


def test_special_tokens__in_a_key__only_those_that_the_sample_writes() -> None:
    written, other = talk("find", f"{BOX}red"), talk("find")
    assert sample_key(written, special_tokens=[BOX]) != sample_key(written)
    assert sample_key(other, special_tokens=[BOX]) == sample_key(other)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (["<box>"], "special_tokens: '<box>' is no special token of the model's tokenizer"),
        (["<|image_pad|>"], r"'<\|image_pad\|>' stands for an image or a video; give an image part"),
        (7, "special_tokens is 7; give a list of texts"),
    ],
)
def test_special_tokens__unknown_or_visual__are_refused(tokens: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConversationCollator(build("qwen2_vl")[1], special_tokens=tokens)


@pytest.mark.parametrize("family", ["pixtral", "qwen2_vl", "llava"])
def test_collate__tokenizer_without_a_pad_token__gives_the_batch_of_one_with_it(family: str) -> None:
    samples = [*make_samples(2, images=1), *make_samples(1, seed=1, images=2), *make_samples(1, images=0)]
    expected = ConversationCollator(build(family)[1])(samples)
    processor = build(family)[1]
    processor.tokenizer.pad_token = None
    found = ConversationCollator(processor)(samples)
    assert processor.tokenizer.pad_token is None
    assert found.keys() == expected.keys()
    real = expected["attention_mask"].bool()
    for key, value in expected.items():
        if key == "input_ids":
            assert torch.equal(found[key][real], value[real])
        else:
            assert torch.equal(found[key], value)


@pytest.mark.slow
def test_train__pixtral_without_a_pad_token__ends_in_a_checkpoint(pair_of: Any, tmp_path: Path) -> None:
    pair = pair_of("pixtral")
    processor = build("pixtral")[1]
    processor.tokenizer.pad_token = None
    result = run(pair, tmp_path / "out", make_samples(2) + make_samples(2, images=2), max_steps=1, processor=processor)
    assert (result.checkpoint / "config.json").is_file()
    assert json.loads((tmp_path / "out.run" / "data_report.json").read_text())["usable"] == 4
