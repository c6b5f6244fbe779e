"""Chat templates, mixes and tokenizers from anywhere: bounded in time and size, refused in one sentence."""

from __future__ import annotations

import json
import random
import re
import resource
import sys
import time
from pathlib import Path

import pytest

from grace_plugin.data import ConversationCollator, load_samples, prepare
from grace_plugin.data.special import SpecialStrings
from grace_plugin.data.time_limit import TimeLimitError, time_limit
from tests.data.test_bad_input import talk
from tests.data.test_check import check
from tests.tiny import build, make_samples

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


# Chat templates


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])  # with generation marks and without
def test_chat_template_that_never_ends__refused_in_one_sentence_after_two_seconds(family: str) -> None:
    processor = build(family)[1]
    processor.chat_template = ENDLESS + processor.chat_template
    started = time.monotonic()
    with pytest.raises(
        ValueError, match="takes more than 2 seconds for one turn; give the processor a chat template that ends"
    ):
        prepare(make_samples(1), ConversationCollator(processor))
    assert time.monotonic() - started < 10


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
@pytest.mark.parametrize("text", ["{{ 'x' * 10**10 }}", "{{ '%9000000000d' % 1 }}"])
def test_chat_template_that_writes_gigabytes__refused_in_one_sentence(text: str) -> None:
    processor = build("llava")[1]
    processor.chat_template = text + processor.chat_template
    limits = resource.getrlimit(resource.RLIMIT_AS)
    with pytest.raises(ValueError, match="takes more than 1073 MB for one turn; give the processor a chat template"):
        prepare(make_samples(1), ConversationCollator(processor))
    assert resource.getrlimit(resource.RLIMIT_AS) == limits


@pytest.mark.slow
def test_chat_template_that_never_ends_for_some_samples__counted_and_then_not_tried_again() -> None:
    processor = build("llava")[1]
    processor.chat_template = (
        "{% if messages[0].content[0].text == 'slow' %}" + ENDLESS + "{% endif %}" + processor.chat_template
    )
    collator = ConversationCollator(processor)
    slow, quick = {"messages": talk("slow")}, {"messages": talk("quick")}
    started = time.monotonic()
    found = prepare([quick, slow, *[quick] * 3], collator, max_bad_samples=1.0)
    assert found.report["rejected"] == {"template": 1}
    assert "sample 1: the chat template takes more than 2 seconds to render it" in found.rejected[0]["message"]
    collator.segmenter._stopped = 5
    found = prepare([slow] * 500, collator, max_bad_samples=1.0, allow_empty=True)
    assert found.report["rejected"] == {"template": 500}
    assert "did not end for 5 samples" in found.rejected[0]["message"]
    assert time.monotonic() - started < 10


def test_time_limit__in_another_thread_and_inside_of_another__the_outer_one_counts() -> None:
    with pytest.raises(TimeLimitError), time_limit(0.05):
        time.sleep(5)
    with time_limit(60), time_limit(0.01):
        time.sleep(0.05)
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # nothing is left of it


# Tokenizers


def test_special_strings__any_set_and_text__as_a_regular_expression_finds_them() -> None:
    draw = random.Random(0)
    for _ in range(300):
        strings = {"".join(draw.choices("ab<>", k=draw.randint(1, 4))) for _ in range(draw.randint(0, 12))}
        pattern = re.compile("|".join(map(re.escape, sorted(strings, key=len, reverse=True))) or r"(?!)")
        found = SpecialStrings([*strings, ""])
        for _ in range(20):
            text = "".join(draw.choices("ab<>c", k=draw.randint(0, 20)))
            assert found.replace(text, lambda part: f"[{part}]") == pattern.sub(lambda m: f"[{m.group()}]", text)
            assert found.within(text) == (pattern.search(text) is not None)
            assert found.ending(text) == max((s for s in strings if text.endswith(s)), key=len, default="")


def test_tokenizer_with_300_000_added_tokens__a_sample_is_cut_in_milliseconds() -> None:
    """The strings alone: adding so many to a real tokenizer takes a minute here."""
    strings = [f"<|extra_{number}|>" for number in range(300_000)]
    started = time.process_time()
    found = SpecialStrings(strings)
    text = "what <b> is <|extra_77|> this < | <|extra_x|> " * 500
    assert found.replace(text, lambda _part: "").count("extra_77") == 0
    assert found.within(text) and not found.within(text.replace("77", "x"))
    assert found.ending("this<|extra_299999|>") == "<|extra_299999|>"
    assert time.process_time() - started < 3


# Mixes


def written(tmp_path: Path, **files: str) -> Path:
    for name, text in files.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "samples.jsonl").write_text('{"messages": []}')
    return tmp_path / "mix.yaml"


def bomb() -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    return "\n".join([*lines, "sets: *a11"])


MIXES: dict[str, tuple[dict[str, str], str]] = {
    "names itself": ({"mix": "sets: [{path: mix.yaml}]"}, r"names itself \(mix\.yaml -> mix\.yaml\); take it out"),
    "names itself through another": (
        {"mix": "sets: [{path: samples.jsonl}, {path: b.yaml}]", "b": "sets: [{path: ./mix.yaml}]"},
        r"names itself \(mix\.yaml -> b\.yaml -> mix\.yaml\)",
    ),
    "of many levels": (
        {"mix": "sets: [{path: m1.yaml}]", **{f"m{n}": f"sets: [{{path: m{n + 1}.yaml}}]" for n in range(1, 20)}},
        "in more than 8 mixes",
    ),
    "aliases of aliases": (
        {"mix": bomb()},
        r"mix\.yaml is no mix: line 5, column 5: aliases that stand for more than 100,000 values",
    ),
    "an alias of itself": (
        {"mix": "sets: &a [*a]"},
        r"mix\.yaml is no mix: line 1, column 7: an alias contains itself",
    ),
    "a key twice": (
        {"mix": "sets: [{path: samples.jsonl, path: b.jsonl}]"},
        r"mix\.yaml is no mix: line 1, column 30: the key 'path' is given twice; keep one of them",
    ),
    "a number without digits": (
        {"mix": "sets: !!int ''"},
        r"mix\.yaml is no mix: a value that cannot be read: string index out of range",
    ),
    "nested too deeply": (
        {"mix": "sets: " + "[" * 5000 + "]" * 5000},
        r"mix\.yaml is no mix: line 1: nested deeper than 32 levels",
    ),
    "too large": ({"mix": "# " + "x" * 1_000_001}, "it has 1,000,003 bytes and a mix has at most 1,000,000"),
    "sets of text": (
        {"mix": "sets: [samples.jsonl]"},
        r"set 0: 'samples\.jsonl' is no set; give an object with a path",
    ),
    "sets as an object": ({"mix": "sets: {path: samples.jsonl}"}, "is no mix; give `sets:`"),
    "an unknown key": (
        {"mix": "sets: [{path: samples.jsonl, wieght: 1}]"},
        "set 0: wieght: Extra inputs are not permitted$",
    ),
    "a weight without end": (
        {"mix": "sets: [{path: samples.jsonl, weight: 1.0e+12}]"},
        "weight: .* less than or equal to 1000$",
    ),
    "a day that is none": ({"mix": "sets: [{path: samples.jsonl, seed: 2026-13-45}]"}, "mix"),
    "an object of Python": (
        {"mix": "sets: !!python/object/apply:os.getpid []"},
        "line 1, column 7: the tag .*os.getpid'; a mix holds mappings, lists, words and numbers alone",
    ),
}


@pytest.mark.parametrize("name", MIXES)
def test_mix_that_cannot_be_used__refused_in_one_sentence_at_once(tmp_path: Path, name: str) -> None:
    files, message = MIXES[name]
    path, started = written(tmp_path, **files), time.monotonic()
    with pytest.raises(ValueError, match=message) as caught:
        load_samples(str(path))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)
    assert time.monotonic() - started < 5


def test_mix_of_mixes_and_aliases__read(tmp_path: Path) -> None:
    """The same mix in two places is no loop, and an alias means what it names."""
    files = {"mix": "sets: [{path: b.yaml}, {path: b.yaml}]", "b": "sets: [&a {path: samples.jsonl}, *a]"}
    assert len(load_samples(str(written(tmp_path, **files)))) == 4


def test_images_of_a_mix__refused_since_each_set_names_its_own(tmp_path: Path) -> None:
    path = written(tmp_path, mix="sets: [{path: samples.jsonl}]")
    with pytest.raises(ValueError, match="is a mix, whose sets name their own image folders"):
        load_samples(str(path), images=str(tmp_path))


# What the terminal and the page show


def test_markup_in_paths_and_samples__shown_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, model = tmp_path / "[", tmp_path / "model[red]"
    folder.mkdir()
    build("llava")[1].save_pretrained(model)
    odd = {"id": "[/x]<script>alert(1)</script>", "messages": talk("[/b]<img src=x onerror=alert(1)>")}
    lines = [
        odd,
        {**odd, "messages": talk("other")},
        {"id": "[/y]", "messages": []},
        {"id": 1, "fied[/z]": 1, "messages": talk()},
    ]
    source = folder / "x].jsonl"
    source.write_text("\n".join(map(json.dumps, lines)))
    out = folder / "x]"
    given = [str(source), "--model", str(model), "--output_dir", str(out), "--workers", "0", "--max_bad_samples", "1"]
    assert check(*given) == 0
    printed = capsys.readouterr().out
    assert "[/x]" in printed
    page = (out / "page.html").read_text()
    assert "<script>" not in page and "<img src=x" not in page
    assert "&lt;script&gt;" in page
