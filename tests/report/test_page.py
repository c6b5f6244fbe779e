"""The pages: whole HTML, nothing from outside, text of rows only as text; charts that say what the numbers say."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from grace_plugin.report import damage, training
from grace_plugin.report.charts import bars, label, lines, ticks
from grace_plugin.report.intervals import paired_difference
from grace_plugin.report.measure import RowDamage
from grace_plugin.report.page import write_folder
from grace_plugin.report.summary import set_types, type_of
from tests.conftest import Finished
from tests.pairs import Pair
from tests.tiny import make_samples

HOSTILE = "<script>alert('row')</script>\"><img src=x onerror=y> {{ 7 * 7 }} & \ufdd0"
VOID = {"meta", "img", "br", "line", "rect", "path", "circle"}


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

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def checked(path: Path) -> Checker:
    text = path.read_text(encoding="utf-8")
    found = Checker(text)
    assert "script" not in found.tags
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in found.references)
    assert not re.search(r"https?://|url\(|@import", text)
    assert "prefers-color-scheme:dark" in text
    return found


def test_the_damage_page_holds_pictures_and_text_but_no_markup_of_rows(llava: Pair, int4: Path, tmp_path: Path) -> None:
    row = make_samples(1, seed=31)[0]
    row |= {"id": HOSTILE, "type": HOSTILE, "accept": [HOSTILE]}
    row["messages"][0]["content"].append({"type": "text", "text": HOSTILE})
    row["messages"][1]["content"][0]["text"] += HOSTILE
    damage(llava.student, int4, [row, *make_samples(2, seed=32), *make_samples(1, images=0)], output_dir=tmp_path / "r")
    page = checked(tmp_path / "r" / "page.html")
    assert page.tags.count("img") == 3 and page.tags.count("article") == 4
    assert page.words.count("<script>alert('row')</script>") >= 3
    assert "49" not in re.findall(r"\{\{ 7 \* 7 \}\}|49", page.words) and "{{ 7 * 7 }}" in page.words
    assert page.tags.count("svg") == 8  # decoder layers, and seven kinds of linears
    assert json.loads((tmp_path / "r" / "report.json").read_text())["worst"][0]["pictures"] is not None


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="steps"):
        write_folder(tmp_path / "r", "training.html.j2", {}, title="t", charts=[])
    with pytest.raises(TypeError):
        write_folder(
            tmp_path / "r", "training.html.j2",
            {"steps": 1, "epoch": None, "finished": False, "log": "l", "entries": [], "warnings": [], "values": [], "x": set()},
            title="t", charts=[],
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


def test_the_training_page_shows_what_was_logged(finished: Finished, tmp_path: Path) -> None:
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


def test_a_running_training_is_read_up_to_its_last_whole_line(tmp_path: Path) -> None:
    entries = [{"step": n, "loss_ce": 2.0 / n, "share_at_bound": 0.3, "nonfinite_steps": 2} for n in (1, 2)]
    log(tmp_path / "out.run", [*entries, {"step": 3, "loss_ce": None}], '{"step": 4, "lo')
    found = training(tmp_path / "out")
    assert (found["steps"], found["finished"]) == (3, False)
    assert [one["not_finite"] for one in found["values"] if one["name"].startswith("Cross")] == [1]
    assert len(found["warnings"]) == 1 and "2 steps had a loss" in found["warnings"][0]
    assert training(tmp_path / "out.run" / "metrics.jsonl")["steps"] == 3


def test_trainers_own_state_is_read_where_there_is_no_log(tmp_path: Path) -> None:
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
        (None, "", r"no log of a training at .*neither metrics.jsonl nor a checkpoint's trainer_state.json"),
        ("metrics.jsonl", "", "holds no logged step yet"),
        ("metrics.jsonl", "nonsense\n", "is not the log of a training"),
        ("trainer_state.json", "[]", "is not the log of a training"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, name: str | None, text: str, sentence: str) -> None:
    if name is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=sentence):
        training(tmp_path)


def test_bars_are_as_high_as_their_values() -> None:
    chart = bars("t", ["0", "1"], {"a": [0.1, 0.2], "b": [None, 0.4]})
    assert [bar["class"] for bar in chart["bars"]] == ["s0", "s0", "s1"]
    heights = [bar["height"] for bar in chart["bars"]]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.02) and heights[2] == pytest.approx(
        4 * heights[0], abs=0.03
    )
    assert all(bar["y"] + bar["height"] == pytest.approx(chart["bottom"], abs=0.02) for bar in chart["bars"])


def test_lines_break_where_a_value_is_missing() -> None:
    chart = lines("t", {"a": [(1, 0.0), (2, 1.0), (3, None), (4, 0.5), (5, 1.0)]})
    (line,) = chart["lines"]
    assert re.findall("[ML]", line["path"]) == ["M", "L", "M", "L"]
    assert len(line["dots"]) == 4
    assert lines("one", {"a": [(7, 2.0)]})["lines"][0]["dots"]


def test_ticks_enclose_and_labels_are_short() -> None:
    assert ticks(0.0, 0.37) == [0.0, 0.1, 0.2, 0.3, 0.4]
    assert ticks(3.0, 3.0)[0] <= 3.0 <= ticks(3.0, 3.0)[-1] and ticks(0.0, 0.0) == [0.0, 0.5, 1.0]
    assert [label(v) for v in (None, 0.0, 1234.5, 0.012345, 2e-6)] == ["-", "0", "1,234", "0.0123", "2.0e-06"]


def test_a_type_is_found_where_a_row_says_it() -> None:
    assert type_of({"type": "count", "source": "vqa"}) == ("type", "count")
    assert type_of({"source": "vqa", "id": "x-1"}) == ("source", "vqa")
    assert type_of({"id": "x-1"}, "set-a") == ("set", "set-a")
    assert type_of({"id": "heldout-20-17"}) == ("id", "heldout") and type_of({"id": "0017"}) == ("", "")
    records = [RowDamage(n, 1, True, 0.0, 1, 1, 1, 0.0, 0.0, 1) for n in range(70)]
    set_types(records, {n: ("id", f"name{n}x") for n in range(70)})
    assert {one.group for one in records} == {""}


def test_a_paired_difference_takes_numbers() -> None:
    mean, low, high = paired_difference([1.0, 2.0, 3.0], [0.5, 1.0, 3.0])
    assert mean == pytest.approx(0.5) and high - mean == pytest.approx(mean - low) == pytest.approx(
        1.959964 * 0.5 / 3**0.5
    )
