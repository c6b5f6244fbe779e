"""The forms of samples in `sample_forms.yaml`: each gives the supervised tokens written there, or is counted under its reason.

The oracle uses no chat template: the supervised text is each supervised answer and the family's end-of-turn mark.
Every form is read by a family whose template marks what is supervised and by one whose template does not.
"""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from grace_plugin.data import ConversationCollator, SampleError, check_sample, read_sample
from grace_plugin.data.collate import IGNORE_INDEX
from grace_plugin.data.measure import Measure
from grace_plugin.data.sources import resolve
from tests.tiny import build

FORMS = yaml.safe_load(Path(__file__).with_name("sample_forms.yaml").read_text())
COLOURS = {"red": (220, 40, 30), "blue": (40, 60, 220), "green": (40, 190, 50)}
ENDS = {"llava": (" ", "</s>"), "qwen2_vl": ("", "<|im_end|>"), "tools": ("", "<|im_end|>")}
TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}{{ ' ' + m['name'] if m['name'] else '' }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}"
    "{% endif %}{% for call in m['tool_calls'] or [] %}<call>{{ call['function']['name'] }}"
    "{{ call['function']['arguments'] | tojson }}</call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache
def collator(family: str) -> ConversationCollator:
    processor = build("qwen2_vl" if family == "tools" else family)[1]
    if family == "tools":
        processor.chat_template = TOOLS
    return ConversationCollator(processor)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(made / f"{name}.png")
    return made


def given(value: Any, folder: Path) -> Any:
    """A form's value with its images in place."""
    if isinstance(value, dict):
        return {key: given(part, folder) for key, part in value.items()}
    if isinstance(value, list):
        return [given(part, folder) for part in value]
    kind, colon, name = value.partition(":") if isinstance(value, str) else ("", "", "")
    if not colon or kind not in ("PIL", "BYTES", "DATA", "BASE64", "FILE"):
        return value
    content = (folder / name).read_bytes()
    text = base64.b64encode(content).decode()
    forms = {
        "PIL": Image.open(io.BytesIO(content)),
        "BYTES": content,
        "DATA": f"data:image/png;base64,{text}",
        "BASE64": text,
        "FILE": (folder / name).as_uri(),
    }
    return forms[kind]


def sample_of(form: dict[str, Any], folder: Path) -> Any:
    sample = given(form["sample"], folder)
    return resolve(sample, folder) if isinstance(sample, dict) else sample


def said(messages: Any, role: str) -> list[str]:
    return [
        "".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in message["content"])
        for message in messages
        if message["role"] == role
    ]


FAMILY_FORMS = [
    pytest.param(form, family, id=f"{form['name']}-{family}")
    for form in FORMS
    for family in ([form["template"]] if "template" in form else ["llava", "qwen2_vl"])
]


@pytest.mark.parametrize(("form", "family"), FAMILY_FORMS)
def test_sample_form__read__gives_its_supervised_text_or_its_reason(
    form: dict[str, Any], family: str, folder: Path
) -> None:
    sample, collate = sample_of(form, folder), collator(family)
    entry = Measure(collate)(sample, 0)
    assert entry.reason == form.get("refused", ""), entry.message
    if "refused" in form:
        with pytest.raises(SampleError) as caught:
            collate([sample])
        assert caught.value.reason == form["refused"]
        assert len(str(caught.value)) < 900
        return
    batch = collate([sample])
    labels = batch["labels"][0]
    before, end = ENDS[family]
    expected = "".join(f"{before}{text}{end}" for text in form["learn"])
    assert collate.processor.tokenizer.decode(labels[labels != IGNORE_INDEX]) == expected
    assert (entry.tokens, entry.supervised) == (len(labels), int((labels != IGNORE_INDEX).sum()))
    read = read_sample(sample)
    assert said(read.messages, "system") == ([form["system"]] if "system" in form else [])
    assert " / ".join(said(read.messages, "user")) == form.get("asked", " / ".join(said(read.messages, "user")))
    if "files" in form:
        colours = [COLOURS[name.removesuffix(".png")] for name in form["files"]]
        assert [image.getpixel((9, 9)) for image in read.images] == colours
    assert list(check_sample(sample).unused) == form.get("unused", list(check_sample(sample).unused))


@pytest.mark.parametrize("form", [form for form in FORMS if "refused" not in form], ids=lambda form: form["name"])
def test_sample_form__normal_form_read_again__gives_the_same_batch(form: dict[str, Any], folder: Path) -> None:
    """What a stream hands on has to train as the sample itself."""
    sample, collate = sample_of(form, folder), collator(form.get("template", "qwen2_vl"))
    batch, again = collate([sample]), collate([read_sample(sample).as_sample()])
    assert batch.keys() == again.keys()
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_sample_forms__at_least_200_and_named_once() -> None:
    assert len(FORMS) >= 200
    assert len({form["name"] for form in FORMS}) == len(FORMS)
