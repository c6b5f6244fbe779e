"""`grace data check`: tables on the terminal, a report, and a page that shows what training would learn."""

from __future__ import annotations

import json
import re
from argparse import ArgumentParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from grace_plugin.cli import commands
from grace_plugin.cli.register_grace import DATA_COMMANDS
from grace_plugin.data import ConversationCollator, load_samples, prepare
from grace_plugin.data.page import write_page
from tests.mixed_files import Mixed, write_mixed
from tests.tiny import build, make_samples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a processor and no weights."""
    folder = tmp_path_factory.mktemp("model")
    build("qwen2_vl")[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    return write_mixed(tmp_path_factory.mktemp("mixed") / "set", 120, videos=6)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRACE_CACHE", str(tmp_path / "cache"))


def check(*arguments: str) -> int:
    """Exit status of `grace data check` for these arguments."""
    name, _help, declare = DATA_COMMANDS[0]
    parser = ArgumentParser()
    declare(parser)
    return commands.run(f"data {name}", parser.parse_args(arguments))


class Page(HTMLParser):
    """Text, marked text, images and outside references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.inside: list[str] = []
        self.marked: list[str] = []
        self.literal: list[str] = []
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        if tag in ("mark", "span"):
            self.inside.append("literal" if given.get("class") == "literal" else tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        if tag in ("mark", "span"):
            self.inside.pop()

    def handle_data(self, data: str) -> None:
        if "mark" in self.inside:
            self.marked.append(data)
        if "literal" in self.inside:
            self.literal.append(data)


def test_data_check__mixed_set__report_and_page(
    mixed: Mixed, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    given = [str(mixed.mix), "--model", str(model), "--output_dir", str(out), "--workers", "0", "--samples", "120"]
    assert check(*given) == 0
    printed = capsys.readouterr().out
    bad = sum(mixed.reasons.values())
    assert f"{120 - bad} of 120 samples can be used" in printed
    for reason, count in mixed.reasons.items():
        assert re.search(rf"{reason}\W+{count}\b", printed)
    report = json.loads((out / "data_report.json").read_text())
    assert report["rejected"] == dict(mixed.reasons)
    page = Page((out / "page.html").read_text())
    assert page.sources
    assert all(source.startswith("data:image/jpeg;base64,") for source in page.sources)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert sum("a red square<|im_end|>" in text for text in page.marked) > 10
    assert not any("what is" in text for text in page.marked[1:])  # the first mark is the legend's
    assert check(*given, "--max_bad_samples", "0.01") == 2
    assert "above --max_bad_samples 1.0%" in capsys.readouterr().err


def test_train__after_a_check__uses_its_index(mixed: Mixed, model: Path, tmp_path: Path) -> None:
    """One index serves both: the run's own inspect the samples, with its own collator, begins no other."""
    given = [str(mixed.mix), "--model", str(model), "--output_dir", str(tmp_path / "out"), "--workers", "0"]
    assert check(*given, "--max_length", "4000") == 0
    (index,) = (tmp_path / "cache").glob("*.jsonl")
    before = index.read_bytes()
    collator = ConversationCollator(AutoProcessor.from_pretrained(model), max_length=40)
    found = prepare(load_samples(str(mixed.mix)), collator, max_bad_samples=1.0)
    assert found.report["index"] == str(index)
    assert found.report["rejected"]["too_long"] > 0
    assert [path.read_bytes() for path in (tmp_path / "cache").glob("*.jsonl")] == [before]


def test_data_check__nothing_usable__page_and_status_2(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"messages": []}\n[1]\n')
    given = [
        str(tmp_path / "bad.jsonl"),
        "--model",
        str(model),
        "--output_dir",
        str(tmp_path / "out"),
        "--workers",
        "0",
    ]
    assert check(*given) == commands.BAD_INPUT
    shown = capsys.readouterr()
    assert "no sample can be used; the first: sample 0 has no messages" in shown.err
    printed = shown.out
    assert "0 of 2 samples can be used" in printed
    assert "the relational term would be absent" in printed
    assert "empty_conversation" in (tmp_path / "out" / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.jsonl", "--model", "MODEL"], "no dataset file at none.jsonl"),
        (["none.jsonl", "--model", "nowhere/at-all"], "cannot read a processor from 'nowhere/at-all'"),
    ],
)
def test_data_check__bad_arguments__one_sentence(
    arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(*[str(model) if part == "MODEL" else part for part in arguments]) == commands.BAD_INPUT
    assert message in capsys.readouterr().err


def test_page__markup_in_a_sample__escaped(tmp_path: Path) -> None:
    """Markup in a sample is escaped, and a spelled special token is shown as such."""
    evil = "<script>alert(1)</script> & <|im_end|>"
    sample: dict[str, Any] = {
        "messages": [{"role": "user", "content": evil}, {"role": "assistant", "content": "<b>red</b>"}]
    }
    collator = ConversationCollator(build("qwen2_vl")[1])
    found = prepare([sample, *make_samples(2)], collator)
    path = write_page(tmp_path / "p.html", found, collator, title="<i>t</i>", model="m")
    page = Page(path.read_text())
    assert not {"script", "b", "i"} & page.tags
    assert "<|im_end|>" in page.literal
    assert "<b>red</b><|im_end|>" in page.marked
