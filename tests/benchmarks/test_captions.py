"""The study's second data set: what a caption is, parts without a caption in common, forced choice, a whole tiny pass."""

from __future__ import annotations

import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import pair
from benchmarks.accuracy.caption_work import CAPTION_SIZES, TOLD, CaptionWork, Choice, likelihood
from benchmarks.accuracy.captions import (
    PROMPT,
    CaptionRows,
    Easel,
    Pictures,
    caption_of,
    draw_captions,
    load_pictures,
    pack_pictures,
    split,
)
from benchmarks.accuracy.data import Text, batch_of, score
from benchmarks.accuracy.pool import make_all
from benchmarks.accuracy.rows import Store, answers_of
from benchmarks.accuracy.statistics import Group, compare
from benchmarks.accuracy.study import Row
from benchmarks.accuracy.table import write_table
from benchmarks.accuracy.train import from_scratch

CPU = torch.device("cpu")
COLOURS = {
    "red": (220, 30, 30),
    "green": (20, 160, 40),
    "blue": (30, 50, 210),
    "yellow": (240, 220, 30),
    "black": (5, 5, 5),
}
SHAPES = ("bar", "column", "square", "corner")


def painted(colour: str, shape: str) -> np.ndarray:
    """RGBA, transparent around the shape."""
    made = np.zeros((48, 48, 4), np.uint8)
    rows, columns = {"bar": (slice(16, 32), slice(48)), "column": (slice(48), slice(16, 32)), "square": (slice(8, 40),) * 2,
                     "corner": (slice(24), slice(24))}[shape]  # fmt: skip
    made[rows, columns] = (*COLOURS[colour], 255)
    return made


def put(folder: Path, name: str, picture: np.ndarray, text: str | None, data: str | None = None) -> None:
    """A picture and what lies beside it."""
    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(file)
    for ending, content in ((".txt", text), (".dat", data)):
        if content is not None:
            file.with_suffix(ending).write_text(content, "utf-8")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Pictures:
    """Twenty captions, two of them on a second picture in another case."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour, shape in product(COLOURS, SHAPES):
        put(folder / shape, colour, painted(colour, shape), f"A {colour} {shape}.\nde.utf8=Etwas.\n")
    for colour in ("red", "blue"):
        put(folder / "again", colour, painted(colour, "bar")[::-1], f"A {colour.upper()} bar.", "nomirror\n")
    return load_pictures(str(folder))


def test_captions_are_read_and_what_has_none_is_counted(tmp_path: Path) -> None:
    assert caption_of("\ufeff A  “Fuji”\tapple. \r\nfr.utf8=Une pomme.") == "A “Fuji” apple."
    assert caption_of("fr.utf8=Une pomme.") == caption_of("\nA late line.") == caption_of("") == ""
    wide, white = np.zeros((20, 40, 4), np.uint8), np.full((8, 8, 4), 255, np.uint8)
    wide[..., :] = (200, 0, 0, 255)
    put(tmp_path, "animals/birds/wide", wide, "A wide one.", "noflip\nnomirror")
    put(tmp_path, "food/half", wide // 2, "A pale one.")
    put(tmp_path, "food/none", wide, None)
    put(tmp_path, "food/foreign", wide, "de.utf8=Nur so.")
    put(tmp_path, "food/long", wide, "A caption that goes on and on, " * 5)
    put(tmp_path, "food/white", white, "Nothing at all.")
    (tmp_path / "food" / "vector.txt").write_text("A drawing.")
    found = load_pictures(str(tmp_path))
    assert found.captions == ["A wide one.", "A pale one."] and found.folders == ["animals", "food"]
    assert found.mirrored == [False, True]
    assert found.told == (
        f"2 pictures of {tmp_path.name}; left out: 1 white all over, 1 with a caption of more than 24 tokens, 1 without a PNG, "
        "2 without a caption"
    )
    first, second = found.pixels
    assert (first[:24] == 255).all() and (first[72:] == 255).all() and (first[24:72] == (200, 0, 0)).all()
    assert abs(int(second[48, 48, 0]) - (100 * 127 + 255 * 128) // 255) <= 1  # half of it transparent, on white
    pack_pictures(found, tmp_path / "packed.npz")
    again = load_pictures(str(tmp_path / "packed.npz"))
    assert (again.pixels == found.pixels).all()
    assert (again.captions, again.folders, again.mirrored, again.told) == (
        found.captions, found.folders, found.mirrored, found.told,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no pictures"):
        load_pictures("nowhere")


def test_parts_have_no_caption_in_common() -> None:
    captions = [f"{'The letter' if number % 3 else 'THE LETTER'} {number % 97}." for number in range(400)]
    parts = split(captions)
    texts = {part: {captions[number].casefold() for number in numbers} for part, numbers in parts.items()}
    assert sorted(np.concatenate(list(parts.values()))) == list(range(400))
    assert sum(map(len, texts.values())) == len(set.union(*texts.values())) == 97
    assert [len(texts[part]) for part in ("student", "validation", "test")] == [68, 10, 19]


def test_a_batch_is_what_the_processor_makes(pictures: Pictures) -> None:
    texts, processor = sorted(set(pictures.captions)), pair.processor()
    text, easel = Text(([PROMPT], texts)), Easel(pictures.pixels, CPU)
    picture, answer = np.array([3, 11]), np.array([texts.index(pictures.captions[3]), 7])
    batch, _ = batch_of(CaptionRows.plain(picture, answer), text, easel)
    for number in range(2):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
            {"role": "assistant", "content": [{"type": "text", "text": texts[answer[number]]}]},
        ]
        made = processor(
            images=[Image.fromarray(pictures.pixels[picture[number]])],
            text=processor.apply_chat_template(turns, tokenize=False), add_special_tokens=False, return_tensors="pt",
        )  # fmt: skip
        ids, labels = batch["input_ids"][number], batch["labels"][number]
        assert torch.equal(made["input_ids"][0], ids[ids != pair.PAD])
        assert processor.tokenizer.decode(labels[labels != -100]) == texts[answer[number]] + "</s>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        torch.testing.assert_close(made["pixel_values"][0], batch["pixel_values"][number], rtol=0, atol=1e-6)


def test_training_rows_are_augmented_pictures_with_their_captions(pictures: Pictures) -> None:
    answer, mirrored = np.arange(len(pictures.captions)), np.array(pictures.mirrored)
    chosen = split(pictures.captions)["student"]
    rows = draw_captions(5, 3 * len(chosen), chosen, answer, mirrored)
    assert (np.bincount(rows.picture)[chosen] == 3).all() and (rows.answer == rows.picture).all()
    assert rows.flip.any() and not rows.flip[~mirrored[rows.picture]].any() and np.abs(rows.shift).max() == 6
    seen = Easel(pictures.pixels, CPU).compose(rows)
    for number in range(len(rows)):
        dy, dx = rows.shift[number]
        whole = pictures.pixels[rows.picture[number]]
        whole = np.pad(whole[:, ::-1] if rows.flip[number] else whole, ((6, 6), (6, 6), (0, 0)), constant_values=255)
        dx = -dx if rows.flip[number] else dx
        cut = whole[6 + dy : 102 + dy, 6 + dx : 102 + dx]
        assert np.abs((seen[number].permute(1, 2, 0).numpy() + 1) * 127.5 - cut).max() < 1e-3, number


def test_questions_are_fair_and_judged_by_the_best_caption(pictures: Pictures) -> None:
    texts = sorted(set(pictures.captions))
    answer = np.array([texts.index(caption) for caption in pictures.captions])
    part = np.arange(len(answer))
    choice, again = (Choice(9, 100, part, answer, texts) for _ in range(2))
    assert (choice.others == again.others).all() and choice.each == 5 and choice.others.shape == (22, 5, 15)
    for picture in part:
        own = pictures.captions[picture].casefold()
        for others in choice.others[picture]:
            told = [texts[choice.captions[column]] for column in others]
            assert len(set(told)) == 15 and own not in [text.casefold() for text in told]
    mean = np.random.default_rng(1).normal(size=(22, len(texts)))
    right = choice.right(mean)
    for question, (picture, number) in enumerate(product(range(22), range(5))):
        rivals = [mean[picture, column] for column in choice.others[picture, number]]
        assert right[question] == all(mean[picture, choice.own[picture]] > rival for rival in rivals)
    assert not choice.right(np.zeros_like(mean)).any()  # undecided is wrong
    with pytest.raises(ValueError, match="nothing to choose"):
        Choice(9, 10, part[:1], answer, texts)


def test_a_model_that_learned_the_captions_chooses_them(pictures: Pictures) -> None:
    texts = sorted(set(pictures.captions))
    answer = np.array([texts.index(caption) for caption in pictures.captions])
    text, easel, model = Text(([PROMPT], texts)), Easel(pictures.pixels, CPU), pair.build(pair.Shape(128, 2, 128), 0)
    chosen = np.arange(2, 22, 3)  # the first two look as others do
    choice = Choice(9, 70, chosen, answer, texts)
    total, tokens = likelihood(model, choice.rows(), text, easel)
    batch, _ = batch_of(choice.rows().take(np.array([12])), text, easel)
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        each = torch.log_softmax(model(**batch).logits[0, :-1].double(), -1)[labels != -100]
    assert tokens[12] == len(each)
    assert total[12] == pytest.approx(float(each.gather(1, labels[labels != -100][:, None]).sum()), rel=1e-6)
    plain = CaptionRows.plain(chosen, answer[chosen])
    from_scratch(model, lambda step: plain, easel, text, steps=40, rate=3e-3, seed=0, naming_weight=0.0)
    total, tokens = likelihood(model, choice.rows(), text, easel)
    assert choice.right((total / tokens).reshape(7, -1)).all() and score(model, plain, text, easel).all()


def test_intervals_draw_pictures_with_all_their_questions() -> None:
    rng = np.random.default_rng(0)
    base, better = rng.random((3, 300)) < 0.4, rng.random((3, 300)) < 0.5
    alone = [Group("bf16", "a", (0, 1, 2), right, ({},) * 3) for right in (better, base)]
    several = [Group("bf16", "a", (0, 1, 2), right.repeat(20, 1), ({"cluster": 20},) * 3) for right in (better, base)]
    one, other = compare(*alone), compare(*several)
    assert (other.low, other.points, other.high) == pytest.approx((one.low, one.points, one.high), rel=1e-5)


def test_a_tiny_pass_gives_a_table(pictures: Pictures, tmp_path: Path) -> None:
    size, store, folder = CAPTION_SIZES["tiny"], Store(tmp_path / "rows", " --set captions"), tmp_path / "captions"
    pack_pictures(pictures, tmp_path / "pictures.npz")
    for name, shape, seed in (("teacher", size.teacher, 1), ("student-0", size.student, 2)):
        pair.save(pair.build(shape, seed), tmp_path / name)  # in the place of the scene study's
    asked = [Row.parse(n) for n in ("w2g128/grace/0", "bf16/ce/0", "w4g128/kl/0", "w2g128/rtn/0")]
    arguments = (size, store, folder, str(tmp_path / "pictures.npz"))
    assert make_all(asked, arguments, 1, time.time() + 600, CaptionWork) == []
    records = {record["row"]: record for record in store.all()}
    assert not [record["failed"] for record in records.values() if "failed" in record]
    assert {"teacher", "student/0", "w2g128/grace@0.001/0", *(row.name for row in asked)} <= set(records)
    one = records["w2g128/grace/0"]
    work = CaptionWork(*arguments)
    assert one["cluster"] == work.choices["test"].each and one["nats"] > 0 and one["trace"][0]["gdkd"] > 0
    assert answers_of(one).mean() == pytest.approx(one["accuracy"]) and one["questions"] >= size.test_rows
    assert one["photos"] == len(work.photos["student"]) and one["command"].endswith("--again --set captions")
    again = work.score(work.open(Row.parse("student/0")), "test")
    assert again["right"] == records["student/0"]["right"] and set(again["by_type"]) <= {*SHAPES, "again", "other"}
    text = write_table(store, tmp_path, readme=False, told=(TOLD,))
    assert "over pictures and seeds" in text and "nats per token" in text and pictures.told in text
    assert "QAT + plain KL" in text and "round-to-nearest" in text and TOLD in text
