"""Test the accuracy study: questions and answers, the kept teacher, plain KL, and rows that resume."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import pair
from benchmarks.accuracy.data import KeptTeacher, Text, batch_of, score
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.photos import CLASSES, Photos, load, pack
from benchmarks.accuracy.pool import make_all
from benchmarks.accuracy.rows import Store, answers_of, scored
from benchmarks.accuracy.scenes import NUMBERS, PLURALS, TYPES, Album, compose, draw, sentences
from benchmarks.accuracy.served import questions_of
from benchmarks.accuracy.study import SIZES, Row, group_of_rows
from benchmarks.accuracy.table import write_table
from benchmarks.accuracy.work import Work
from examples.bundled_demo.plain import PlainObjective
from grace_plugin.export.verify import load as load_checkpoint
from grace_plugin.objective import GraceObjective

CPU = torch.device("cpu")
QUESTIONS, ANSWERS = sentences()


def coloured(count: int) -> Photos:
    """Photographs whose first pixel is their class."""
    labels = np.arange(count) % 10
    pixels = np.random.default_rng(0).integers(0, 255, (count, 32, 32, 3)).astype(np.uint8)
    pixels[:, 0, 0] = labels[:, None]
    return pixels, labels


def expected(question: str, cells: list[str], grid: int) -> str:
    """The answer, read from the words."""
    words = question.rstrip("?").replace(",", "").split()
    if words[0] == "What":
        return cells[(int(words[4]) - 1) * grid + int(words[6]) - 1]
    if words[0] == "Where":
        (at,) = [number for number, name in enumerate(cells) if name == words[3]]
        return f"row {at // grid + 1}, column {at % grid + 1}"
    if words[0] == "How":
        return NUMBERS[cells.count(CLASSES[PLURALS.index(words[2])])]
    if words[0] == "Are":
        first, second = (cells.count(CLASSES[PLURALS.index(word)]) for word in (words[3], words[5]))
        return "neither" if first == second else words[3] if first > second else words[5]
    line, number = words[5], int(words[6]) - 1
    return "yes" if words[3] in (cells[number * grid :][:grid] if line == "row" else cells[number::grid]) else "no"


def test_draw__every_type__answer_of_the_scene() -> None:
    rows = draw(3, 2000, coloured(500), augment=False)
    for number in range(len(rows)):
        grid = int(rows.grid[number])
        cells = [CLASSES[c] for c in rows.classes[number][: grid * grid]]
        assert ANSWERS[rows.answer[number]] == expected(QUESTIONS[rows.question[number]], cells, grid)
    yes = rows.answer[rows.type == TYPES.index("existence")] == ANSWERS.index("yes")
    assert 0.4 < yes.mean() < 0.6


def test_compose__cells__their_photographs() -> None:
    photos = coloured(100)
    rows = draw(4, 50, photos, augment=False)
    pixels = compose(Album(photos, CPU), rows)
    large = rows.grid == 3
    first = ((pixels[:, 0, ::32, ::32] + 1) * 127.5).round().long().flatten(1)  # the first pixel of each of nine cells
    assert torch.equal(first[large], torch.from_numpy(rows.classes[large]))
    assert pixels.shape == (50, 3, 96, 96) and 0 < large.sum() < 50
    whole = compose(Album(photos, CPU, whole=True), rows)
    asked = questions_of(rows, Album(photos, CPU))
    seen = torch.stack([torch.from_numpy(np.array(one["images"][0])) for one in asked]).permute(0, 3, 1, 2)
    assert torch.equal(whole, seen / 127.5 - 1) and (whole - pixels).abs().max() <= 0.5 / 127.5 + 1e-6
    assert asked[3]["messages"][0]["content"][1]["text"] == QUESTIONS[rows.question[3]]


def test_sequences__processor__same_ids() -> None:
    text, processor = Text(), pair.processor()
    for question, answer in ((0, 3), (12, 29), (150, 27)):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[question]}]},
            {"role": "assistant", "content": [{"type": "text", "text": ANSWERS[answer]}]},
        ]
        prompt = processor.apply_chat_template(turns, tokenize=False).replace("<image>", "<image>" * pair.VISUAL)
        ids = text.ids[question * len(ANSWERS) + answer]
        assert processor.tokenizer(prompt, add_special_tokens=False)["input_ids"] == ids[ids != pair.PAD].tolist()


def small(seed: int) -> pair.LlavaForConditionalGeneration:
    return pair.build(pair.Shape(128, 2, 128), seed)


def test_kept_teacher__states_and_plain_kl__those_of_the_teacher() -> None:
    photos, text = coloured(60), Text()
    rows, album = draw(5, 12, photos, augment=True), Album(photos, CPU)
    student, teacher, numbers = small(0), small(1).eval(), np.array([7, 2, 11])
    batch, host = batch_of(rows.take(numbers), text, album, keys=numbers)
    losses = []
    for source in (teacher, KeptTeacher(teacher, rows, text, album)):
        for kind in (GraceObjective, PlainObjective):
            distill, relational, controller = METHODS["grace" if kind is GraceObjective else "kl"].blocks()
            objective = kind(distill, relational, controller)
            objective.prepare(student, source, vocabulary=pair.VOCABULARY, total_steps=10)
            objective.begin_step([batch], [host])
            losses.append(objective.compute_loss(student, batch).item())
    assert losses[:2] == pytest.approx(losses[2:], rel=1e-5)
    inputs = {"input_ids": batch["input_ids"], "pixel_values": batch["pixel_values"]}
    labels = batch["labels"][:, 1:]
    logits, taught = (m(**inputs).logits[:, :-1][labels != -100].double() for m in (student, teacher))
    p, q = (torch.log_softmax(part / 2, -1) for part in (taught, logits))
    kl = (p.exp() * (p - q)).sum(-1).mean() * 4
    ce = -torch.log_softmax(logits, -1).gather(1, labels[labels != -100][:, None]).mean()
    assert losses[1] == pytest.approx(float(ce + kl), rel=1e-5)


@pytest.mark.slow
def test_score__generated_answers__same() -> None:
    photos, text, model = coloured(60), Text(), small(2).eval()
    rows, album = draw(6, 20, photos, augment=False), Album(photos, CPU)
    for parameter in model.model.vision_tower.parameters():  # an answer that does not depend on the image
        parameter.data.zero_()
    batch, _ = batch_of(rows, text, album)
    at = text.first[text.index(rows)]
    found = score(model, rows, text, album, batch_size=7)
    for number in range(len(rows)):
        prompt = batch["input_ids"][number : number + 1, : at[number]]
        wanted = [i for i in batch["input_ids"][number, at[number] :].tolist() if i != pair.PAD]
        out = model.generate(
            input_ids=prompt,
            pixel_values=batch["pixel_values"][number : number + 1],
            max_new_tokens=len(wanted),
            do_sample=False,
            pad_token_id=pair.PAD,
            eos_token_id=pair.EOS,
        )
        assert found[number] == (out[0, at[number] :].tolist() == wanted)


def test_row_parse__names__read_or_refused() -> None:
    for group_name in ("main", "post", "ablation"):
        for row in (*group_of_rows(group_name, SIZES["gpu"]), Row("bf16", "kl", 0, 6e-4)):
            assert Row.parse(row.name) == row
    assert Row.parse("w4g128/grace+gptq/3").base == Row("bf16", "grace", 3)
    for wrong in ("bf16/rtn/0", "bf16/kl+rtn/0", "w2g128/none/0", "student", "w5/ce/0"):
        with pytest.raises(ValueError, match="no row"):
            Row.parse(wrong)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images in one sub-folder for each class."""
    made = tmp_path_factory.mktemp("photos")
    pixels, labels = coloured(900)
    for number, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        file = made / CLASSES[label] / f"{number:04}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(image).save(file)
    return made


@pytest.mark.slow
def test_study__tiny__runs_resumes_and_lists_failures(folder: Path, tmp_path: Path) -> None:
    size, store, packed = SIZES["tiny"], Store(tmp_path / "rows"), tmp_path / "photos.npz"
    pack(load(str(folder)), size.photos, packed)
    arguments = (size, store, tmp_path, str(packed))
    work = Work(*arguments)
    asked = [Row.parse(n) for n in ("w2g128/grace/0", "bf16/kl/0", "w4g128/rtn/0", "w2row/gptq/0", "w4g128/grace/0")]

    def make(row: Row) -> None:
        for need in row.needs(size):
            make(need)
        if not store.done(row):
            work.make(row)

    for row in asked:
        make(row)
        record = store.read(row)
        assert record is not None and "failed" not in record, record
        assert (
            answers_of(record).mean() == pytest.approx(record["accuracy"]) and record["questions"] == size.test_samples
        )
    before = {file: file.stat().st_mtime_ns for file in store.folder.rglob("*.json")}
    assert make_all(asked, arguments, workers=1, until=0.0) == []  # nothing is left, nothing is made again
    assert before == {file: file.stat().st_mtime_ns for file in store.folder.rglob("*.json")}
    further = ("grace-scales", "grace-rows1024", "grace-gptq", "torchao", "modelopt")
    for name in ("w4g128/kl+rtn/0", "w3g128/grace-mixed-damage/0", *(f"w2g128/{method}/0" for method in further)):
        make(Row.parse(name))
        assert "failed" not in (store.read(Row.parse(name)) or {"failed"}), store.read(Row.parse(name))
    shipped = load_checkpoint(work.checkpoint(asked[-1]))
    layer = shipped.model.language_model.layers[0].self_attn.q_proj
    assert layer.weight_packed.dtype == torch.int32 and layer.weight_scale.dtype == torch.bfloat16
    store.write(Row.parse("w2g128/awq/0"), failed="Traceback\nValueError: on purpose", seconds=0.0)
    text = write_table(store, tmp_path, pages=False)
    assert "ValueError: on purpose" in text and "QAT + GRACE" in text and (tmp_path / "accuracy.svg").is_file()
    grace = json.loads(store.file(asked[0]).read_text())
    assert set(grace["search"]) == {"0.001", "0.002", "w30"} and re.fullmatch(r"[\w.-]+", grace["revision"])
    types = work.samples["test"].type
    assert grace["trace"][0]["gdkd"] > 0 and scored(answers_of(grace), types)["by_type"] == grace["by_type"]
