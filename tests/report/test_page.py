"""The pages: valid HTML, nothing from outside, text of samples only as text; charts and the log that they are made of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.report import compare_checkpoints, training
from grace_plugin.report.charts import bar_chart, line_chart
from grace_plugin.report.html import label, write_report
from grace_plugin.report.samples import SampleComparison
from grace_plugin.report.summary import paired_difference, set_types, type_of
from tests.conftest import Finished
from tests.pairs import Pair
from tests.tiny import make_samples

HOSTILE = "<script>alert('row')</script>\"><img src=x onerror=y> {{ 7 * 7 }} & \ufdd0"
VOID = {"meta", "img", "br"}


class Checker(HTMLParser):
    """Every element is closed in order; what it refers to is noted."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not [name for name, _ in attrs if name.startswith("on")]
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def checked(path: Path) -> Checker:
    text = path.read_text(encoding="utf-8")
    found = Checker(text)
    assert "script" not in found.tags
    # a chart's markers refer to definitions in the same page
    assert all(reference.startswith(("data:image/jpeg;base64,", "#")) for reference in found.references)
    assert not re.search(r"https?://|url\((?!#)|@import", text)
    assert "prefers-color-scheme:dark" in text
    return found


@pytest.mark.slow
def test_comparison_page__hostile_sample__escaped_and_self_contained(llava: Pair, int4: Path, tmp_path: Path) -> None:
    sample = make_samples(1, seed=31)[0]
    sample |= {"id": HOSTILE, "type": HOSTILE, "accept": [HOSTILE]}
    sample["messages"][0]["content"].append({"type": "text", "text": HOSTILE})
    sample["messages"][1]["content"][0]["text"] += HOSTILE
    samples = [sample, *make_samples(2, seed=32), *make_samples(1, images=0)]
    compare_checkpoints(llava.student, int4, samples, output_dir=tmp_path / "r")
    page = checked(tmp_path / "r" / "page.html")
    assert page.tags.count("img") == 3 and page.tags.count("article") == 4
    assert page.words.count("<script>alert('row')</script>") >= 3
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|49", page.words) and "{{ 7 * 7 }}" in page.words
    assert page.tags.count("svg") == 8  # decoder layers, and seven kinds of linears
    assert json.loads((tmp_path / "r" / "report.json").read_text())["worst"][0]["images"] is not None


def test_write_report__template_or_json_fails__nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="steps"):
        write_report(tmp_path / "r", "training.html.j2", {}, title="t", charts=[])
    with pytest.raises(TypeError):
        write_report(
            tmp_path / "r",
            "training.html.j2",
            {
                "steps": 1,
                "epoch": None,
                "finished": False,
                "log": "l",
                "entries": [],
                "warnings": [],
                "values": [],
                "x": set(),
            },
            title="t",
            charts=[],
        )
    assert list(tmp_path.iterdir()) == []


def test_training_page__finished_run__shows_every_logged_metric(finished: Finished, tmp_path: Path) -> None:
    found = training(finished.folder, output_dir=tmp_path / "r")
    page = checked(tmp_path / "r" / "page.html")
    assert (found["steps"], found["finished"]) == (8, True)
    assert found["warnings"] == []
    logged = [entry for entry in finished.result.history if "loss_ce" in entry]
    assert [entry["loss_ce"] for entry in found["entries"] if "loss_ce" in entry] == [e["loss_ce"] for e in logged]
    for title in ("Cross-entropy", "Weight of distillation", "Gates", "Clipped weights", "Relation of visual tokens"):
        assert title in page.words
    ce = next(one for one in found["values"] if one["name"] == "Cross-entropy: CE")
    assert (ce["first"], ce["last"]) == (logged[0]["loss_ce"], logged[-1]["loss_ce"])
    assert ce["least"] == min(entry["loss_ce"] for entry in logged)


def log(folder: Path, entries: list[dict[str, Any]], torn: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries) + torn)
    return folder


def test_training__running__read_up_to_the_last_complete_line(tmp_path: Path) -> None:
    entries = [{"step": n, "loss_ce": 2.0 / n, "share_at_bound": 0.3, "nonfinite_steps": 2} for n in (1, 2)]
    log(tmp_path / "out.run", [*entries, {"step": 3, "loss_ce": None}], '{"step": 4, "lo')
    found = training(tmp_path / "out")
    assert (found["steps"], found["finished"]) == (3, False)
    assert [one["not_finite"] for one in found["values"] if one["name"].startswith("Cross")] == [1]
    assert len(found["warnings"]) == 1 and "2 steps had a loss" in found["warnings"][0]
    assert training(tmp_path / "out.run" / "metrics.jsonl")["steps"] == 3


def test_training__no_metrics_file__trainer_state_is_read(tmp_path: Path) -> None:
    for step in (5, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        history = [{"step": n, "loss": 1.0, "epoch": 0.5} for n in range(1, step + 1)]
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert training(tmp_path)["steps"] == 10
    assert training(tmp_path / "checkpoint-5")["steps"] == 5


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        (None, "", r"no log of a training at .*neither metrics.jsonl nor a resume state's trainer_state.json"),
        ("metrics.jsonl", "", "holds no logged step yet"),
        ("metrics.jsonl", "nonsense\n", "is not the log of a training"),
        ("trainer_state.json", "[]", "is not the log of a training"),
    ],
)
def test_training__no_log__refused_in_one_sentence(tmp_path: Path, name: str | None, text: str, sentence: str) -> None:
    if name is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        training(tmp_path)


def test_bar_chart__values_and_gaps__heights_in_proportion() -> None:
    svg = bar_chart(["0", "1"], {"a": [0.1, 0.2], "b": [None, 0.4]})
    bars = re.findall(r'<path d="([^"]*)" clip-path', svg)
    corners = [[float(y) for y in re.findall(r"[ML] \S+ (\S+)", bar)] for bar in bars]
    heights = [max(ys) - min(ys) for ys in corners if len(ys) >= 4]
    assert heights[1] == pytest.approx(2 * heights[0], rel=1e-3) and heights[2] == pytest.approx(
        4 * heights[0], rel=1e-3
    )
    assert bar_chart(["0", "1"], {"a": [0.1, 0.2], "b": [None, 0.4]}) == svg


def test_line_chart__missing_value__line_is_broken() -> None:
    svg = line_chart({"metric": [(1, 0.0), (2, 1.0), (3, None), (4, 0.5), (5, 1.0)]})
    (line,) = [
        path for path in re.findall(r'<path d="([^"]*)" clip-path[^>]*stroke: #3f7fc1', svg) if path.count("L") > 1
    ]
    assert re.findall("[ML]", line) == ["M", "L", "M", "L"]


def test_charts__text__stays_text() -> None:
    svg = line_chart({"one <metric>": [(10, 1.0), (20, 2.0)], "other": [(10, 1.5)]})
    words = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert "one &lt;metric&gt;" in words and "other" in words and "20" in words


def test_training_page__no_matplotlib__tables_and_how_to_install(tmp_path: Path) -> None:
    """An interpreter in which matplotlib cannot be found, as without the extra `report`."""
    log(tmp_path / "out.run", [{"step": n, "loss_ce": 2.0 / n} for n in (1, 2)])
    script = f"""
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = classmethod(
    lambda cls, name, *rest: None if name == "matplotlib" else find(name, *rest)
)
from grace_plugin.report import training
training({str(tmp_path / "out")!r}, output_dir={str(tmp_path / "r")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    page = checked(tmp_path / "r" / "page.html")
    assert "svg" not in page.tags and 'pip install "grace-plugin[report]"' in page.words
    assert "Cross-entropy: CE" in page.words


def test_training__metric_of_a_term_from_outside__has_a_chart(tmp_path: Path) -> None:
    log(tmp_path / "out.run", [{"step": n, "loss_custom": 3.0 / n, "train_runtime": 1.0} for n in (1, 2)])
    assert [one["name"] for one in training(tmp_path / "out")["values"]] == ["Loss term custom: loss_custom"]


def test_label__small_and_large_numbers__three_digits() -> None:
    assert [label(v) for v in (None, 0.0, 1234.5, 0.012345, 2e-6)] == ["-", "0", "1,234", "0.0123", "2.0e-06"]


def test_type_of__every_source_of_a_type__in_order() -> None:
    assert type_of({"type": "count", "source": "vqa"}) == ("type", "count")
    assert type_of({"source": "vqa", "id": "x-1"}) == ("source", "vqa")
    assert type_of({"id": "x-1"}, "set-a") == ("set", "set-a")
    assert type_of({"id": "heldout-20-17"}) == ("id", "heldout") and type_of({"id": "0017"}) == ("", "")
    records = [SampleComparison(n, 1, True, 0.0, 1, 1, 1, 0.0, 0.0, 1) for n in range(70)]
    set_types(records, {n: ("id", f"name{n}x") for n in range(70)})
    assert {one.group for one in records} == {""}


def test_paired_difference__floats__mean_and_interval_by_hand() -> None:
    mean, low, high = paired_difference([1.0, 2.0, 3.0], [0.5, 1.0, 3.0])
    assert mean == pytest.approx(0.5) and high - mean == pytest.approx(mean - low) == pytest.approx(
        1.959964 * 0.5 / 3**0.5
    )
