"""Labels on the templates of the families' releases: marks and turns apart agree, and prompts are those that are served."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from PIL import Image

from grace_plugin.data import ConversationCollator, prepare
from tests.published_templates import ENDS, PUBLISHED, marked, plain
from tests.tiny import build, make_samples
from tests.tiny_text import CHAT

END = {**dict.fromkeys(PUBLISHED, CHAT["eos_token"]), "mistral3": "</s>", **ENDS}
ANSWERS = ("a red square", "assistant: blue, left")


def processor_of(name: str, template: str) -> Any:
    """The tiny family's processor with another template; what ends a turn is a special token there, as in the release."""
    _, processor = build(name)
    processor.chat_template = template
    processor.tokenizer.add_tokens([END[name], "<start_of_turn>", "[INST]", "[/INST]"], special_tokens=True)
    return processor


def talk(images: int, system: bool) -> dict[str, Any]:
    asked = [{"type": "image"}] * images + [{"type": "text", "text": "what is the shape?"}]
    turns = [asked, ANSWERS[0], "and which colour stands left?", ANSWERS[1]]
    messages = [
        {
            "role": "assistant" if n % 2 else "user",
            "content": turn if isinstance(turn, list) else [{"type": "text", "text": turn}],
        }
        for n, turn in enumerate(turns)
    ]
    first = [{"role": "system", "content": [{"type": "text", "text": "be brief"}]}] if system else []
    return {"messages": first + messages, "images": [sample["images"][0] for sample in make_samples(images, seed=2)]}


@pytest.mark.slow
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("images", [0, 1, 2])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_template__blocks_and_single_turns__agree_and_prompts_are_served_ones(
    name: str, images: int, system: bool
) -> None:
    sample = talk(images, system)
    processor = processor_of(name, plain(PUBLISHED[name]))
    collator = ConversationCollator(processor)
    assert not collator.segmenter.has_marks
    batch = collator([sample])
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    supervised = processor.tokenizer.decode([label for label in labels if label != -100])
    space = (
        " " if name in ("smolvlm", "idefics3") else ""
    )  # their prompt ends with "Assistant:", the space is generated
    assert supervised == "".join(space + answer + END[name] for answer in ANSWERS)
    for turn in (1, 3):
        prompt = sample["messages"][: turn + system]
        text = processor.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        media = {"images": [sample["images"]]} if images else {}
        served = processor(text=[text], add_special_tokens=False, return_tensors="pt", **media)
        served = served["input_ids"][0].tolist()
        assert ids[: len(served)] == served
        assert labels[len(served) - 1] == -100
        assert labels[len(served)] != -100
    by_marks = ConversationCollator(processor_of(name, marked(PUBLISHED[name])))
    assert by_marks.segmenter.has_marks
    other = by_marks([sample])
    assert all(torch.equal(other[key], batch[key]) for key in ("input_ids", "labels"))


def test_video__refused_by_the_processor__not_called_unreadable() -> None:
    """A template that writes videos, of a processor that takes no decoded frames beside the text."""
    template = plain(PUBLISHED["smolvlm"]).replace(
        "{{ '<image>' }}", "{{ '<image>' }}{% elif line['type'] == 'video' %}{{ '<video>' }}"
    )
    collator = ConversationCollator(processor_of("smolvlm", template))
    assert collator.segmenter.placeholders["video"] == "<video>"
    found = prepare([video()], collator, max_bad_samples=1.0, allow_empty=True).entries[0]
    assert found.reason == "video_unsupported"
    assert "sample 0: the model's processor refuses its video: " in found.message


def video() -> dict[str, Any]:
    """A sample with a video of four frames."""
    frames = [Image.new("RGB", (64, 64), (n * 50, 0, 0)) for n in range(4)]
    asked = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "q"}]}
    return {"messages": [asked, {"role": "assistant", "content": "red"}], "videos": [frames]}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_template__video__used_or_unsupported(name: str) -> None:
    """SmolVLM's processor swaps the template for one that writes videos; that sample must not be called a broken file."""
    collator = ConversationCollator(processor_of(name, plain(PUBLISHED[name])))
    found = prepare([video()], collator, max_bad_samples=1.0, allow_empty=True)
    takes = name.startswith(("qwen", "internvl"))
    assert found.entries[0].reason == ("" if takes else "video_unsupported")
