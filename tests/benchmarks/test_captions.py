"""Test the study's second data set: captions, the held-out split, views, the held-out choice, and a tiny study."""

from __future__ import annotations

import time
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.accuracy import pair
from benchmarks.accuracy.caption_work import CAPTION_SIZES, TOLD, CaptionWork, choice_accuracy, likelihood
from benchmarks.accuracy.captions import (
    PROMPT,
    CaptionedImages,
    CaptionSamples,
    Easel,
    caption_of,
    draw,
    load_images,
    pack_images,
    split,
)
from benchmarks.accuracy.data import Text, batch_of, score
from benchmarks.accuracy.pool import make_all
from benchmarks.accuracy.rows import Store, answers_of
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
    samples, columns = {
        "bar": (slice(16, 32), slice(48)),
        "column": (slice(48), slice(16, 32)),
        "square": (slice(8, 40),) * 2,
        "corner": (slice(24), slice(24)),
    }[shape]
    made[samples, columns] = (*COLOURS[colour], 255)
    return made


def put(folder: Path, name: str, image: np.ndarray, text: str | None, data: str | None = None) -> None:
    """An image and what lies next to it."""
    file = folder / f"{name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
    for ending, content in ((".txt", text), (".dat", data)):
        if content is not None:
            file.with_suffix(ending).write_text(content, "utf-8")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CaptionedImages:
    """Twenty captions, two of them on a second image in another case."""
    folder = tmp_path_factory.mktemp("pictures")
    for colour, shape in product(COLOURS, SHAPES):
        put(folder / shape, colour, painted(colour, shape), f"A {colour} {shape}.\nde.utf8=Etwas.\n")
    for colour in ("red", "blue"):
        put(folder / "again", colour, painted(colour, "bar")[::-1], f"A {colour.upper()} bar.", "nomirror\n")
    return load_images(str(folder))


def test_load_images__folder__captions_read_and_omissions_counted(tmp_path: Path) -> None:
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
    found = load_images(str(tmp_path))
    assert found.captions == ["A wide one.", "A pale one."] and found.folders == ["animals", "food"]
    assert found.mirrored == [False, True]
    assert found.told == (
        f"2 pictures of {tmp_path.name}; left out: 1 white all over, 1 with a caption of more than 24 tokens, 1 without a PNG, "
        "2 without a caption"
    )
    first, second = found.pixels
    assert (first[:24] == 255).all() and (first[72:] == 255).all() and (first[24:72] == (200, 0, 0)).all()
    assert abs(int(second[48, 48, 0]) - (100 * 127 + 255 * 128) // 255) <= 1  # half of it transparent, on white
    pack_images(found, tmp_path / "packed.npz")
    again = load_images(str(tmp_path / "packed.npz"))
    assert (again.pixels == found.pixels).all()
    assert (again.captions, again.folders, again.mirrored, again.told) == (
        found.captions,
        found.folders,
        found.mirrored,
        found.told,
    )
    with pytest.raises(ValueError, match="no pictures"):
        load_images("nowhere")


def test_split__captions__disjoint() -> None:
    captions = [f"{'The letter' if number % 3 else 'THE LETTER'} {number % 97}." for number in range(400)]
    parts = split(captions)
    known, held_out = ({captions[number].casefold() for number in part} for part in parts)
    assert sorted(np.concatenate(parts)) == list(range(400))
    assert not known & held_out and (len(known), len(held_out)) == (78, 19)


def test_batch_of__captions__those_of_the_processor(images: CaptionedImages) -> None:
    texts, processor = images.texts, pair.processor()
    text, easel = Text(([PROMPT], texts)), Easel(images.pixels, CPU)
    image, answer = np.array([3, 11]), np.array([texts.index(images.captions[3]), 7])
    assert [texts[number] for number in images.answer] == images.captions
    batch, _ = batch_of(CaptionSamples.plain(image, answer), text, easel)
    for number in range(2):
        turns = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]},
            {"role": "assistant", "content": [{"type": "text", "text": texts[answer[number]]}]},
        ]
        made = processor(
            images=[Image.fromarray(images.pixels[image[number]])],
            text=processor.apply_chat_template(turns, tokenize=False),
            add_special_tokens=False,
            return_tensors="pt",
        )
        ids, labels = batch["input_ids"][number], batch["labels"][number]
        assert torch.equal(made["input_ids"][0], ids[ids != pair.PAD])
        assert processor.tokenizer.decode(labels[labels != -100]) == texts[answer[number]] + "</s>"
        assert torch.equal(labels[labels != -100], ids[labels != -100])
        torch.testing.assert_close(made["pixel_values"][0], batch["pixel_values"][number], rtol=0, atol=1e-6)


def seen(pixels: np.ndarray, samples: CaptionSamples, number: int) -> np.ndarray:
    """What a row shows, float64 [96, 96, 3] in 0 to 255: the image on a large white sheet, cut out, lit and covered."""
    down, right = samples.shift[number]
    sheet = np.full((196, 196, 3), 255.0)
    sheet[50:146, 50:146] = pixels[samples.image[number]]
    cut = sheet[50 + down : 146 + down]
    cut = cut[:, 50 + right : 146 + right][:, ::-1] if samples.flip[number] else cut[:, 50 + right : 146 + right]
    contrast, brightness = samples.light[number].astype(float)
    lit = np.clip(127.5 + (cut - 127.5) * contrast + 127.5 * brightness, 0, 255)
    y, x = samples.patch[number]
    lit[y : y + 32, x : x + 32] = 127.5
    return lit


@pytest.mark.parametrize("view", [False, True])
def test_easel__sample__pixels_of_its_numbers(images: CaptionedImages, view: bool) -> None:
    mirrored = np.array(images.mirrored)
    samples = draw(5, np.arange(len(mirrored)).repeat(5), images, view=view)
    assert samples.flip.any() and not samples.flip[~mirrored[samples.image]].any()
    assert (samples.answer == images.answer[samples.image]).all()
    shown = Easel(images.pixels, CPU).compose(samples).permute(0, 2, 3, 1).numpy()
    for number in range(len(samples)):
        assert np.abs((shown[number] + 1) * 127.5 - seen(images.pixels, samples, number)).max() < 1e-3, number


def test_draw__views__differ_from_training(images: CaptionedImages) -> None:
    image = np.zeros(2000, np.int64)
    trained, views, others = draw(1, image, images), *(draw(seed, image, images, view=True) for seed in (2, 3))
    assert np.abs(trained.shift).max() == 6 and (trained.light == (1, 0)).all() and (trained.patch == 96).all()
    assert set(views.shift.flatten()) == set(range(-14, 15)) and set(views.patch.flatten()) == set(range(65))
    low, high = views.light.min(0), views.light.max(0)
    assert ((0.6, -0.3) <= low).all() and (low < (0.61, -0.29)).all()
    assert ((1.39, 0.29) < high).all() and (high <= (1.4, 0.3)).all()
    assert not (views.light == others.light).any() and not (views.light == trained.light).all(1).any()


def test_choice_accuracy__all_draws__their_mean() -> None:
    rng = np.random.default_rng(3)
    mean, own, unlike = rng.integers(0, 6, (9, 8)).astype(float), rng.integers(0, 8, 9), rng.random((9, 8)) < 0.8
    unlike[np.arange(9), own] = False
    drawn = [
        np.mean([all(line[one] > line[list(chosen)]) for chosen in combinations(np.flatnonzero(others), 3)])
        for line, one, others in zip(mean, own, unlike)
    ]
    assert 0 < np.mean(drawn) < 1 and choice_accuracy(mean, own, unlike, 3) == pytest.approx(np.mean(drawn), rel=1e-12)
    alike = np.zeros((4, 4))
    assert choice_accuracy(alike, np.arange(4), ~np.eye(4, dtype=bool), 2) == 0.0  # undecided is wrong
    assert choice_accuracy(alike + np.eye(4), np.arange(4), ~np.eye(4, dtype=bool), 2) == 1.0


@pytest.mark.slow
def test_score__trained_model__captions_generated_and_chosen(images: CaptionedImages) -> None:
    text, easel, model = (
        Text(([PROMPT], images.texts)),
        Easel(images.pixels, CPU),
        pair.build(pair.Shape(128, 2, 128), 0),
    )
    chosen = np.arange(2, 22, 5)  # the first two look as others do
    captions, own = np.unique(images.answer[chosen], return_inverse=True)
    every = CaptionSamples.plain(chosen.repeat(4), np.tile(captions, 4))
    total, tokens = likelihood(model, every, text, easel)
    batch, _ = batch_of(every.take(np.array([6])), text, easel)
    labels = batch.pop("labels")[0, 1:]
    with torch.no_grad():
        each = torch.log_softmax(model(**batch).logits[0, :-1].double(), -1)[labels != -100]
    assert tokens[6] == len(each)
    assert total[6] == pytest.approx(float(each.gather(1, labels[labels != -100][:, None]).sum()), rel=1e-6)
    plain = CaptionSamples.plain(chosen, images.answer[chosen])
    assert not score(model, plain, text, easel).any()
    from_scratch(model, lambda step: plain, easel, text, steps=40, rate=3e-3, seed=0, naming_weight=0.0)
    total, tokens = likelihood(model, every, text, easel)
    assert choice_accuracy((total / tokens).reshape(4, 4), own, captions != captions[own][:, None], 3) == 1.0
    assert score(model, plain, text, easel).all()


@pytest.mark.slow
def test_captions_study__tiny__table(images: CaptionedImages, tmp_path: Path) -> None:
    size, store, folder = CAPTION_SIZES["tiny"], Store(tmp_path / "rows", " --set captions"), tmp_path / "captions"
    pack_images(images, tmp_path / "pictures.npz")
    for name, shape, seed in (("teacher", size.teacher, 1), ("student-0", size.student, 2)):
        pair.save(pair.build(shape, seed), tmp_path / name)  # in the place of the scene study's
    asked = [Row.parse(n) for n in ("w2g128/grace/0", "bf16/ce/0", "w2g128/rtn/0")]
    arguments = (size, store, folder, str(tmp_path / "pictures.npz"))
    assert make_all(asked, arguments, 1, time.time() + 600, CaptionWork) == []
    records = {record["row"]: record for record in store.all()}
    assert not [record["failed"] for record in records.values() if "failed" in record]
    assert {"teacher", "student/0", "w2g128/grace@0.001/0", *(row.name for row in asked)} <= set(records)
    one = records["w2g128/grace/0"]
    work = CaptionWork(*arguments)
    test, searched = work.samples["test"], records["w2g128/grace@0.001/0"]
    assert (test.image.reshape(-1, one["cluster"]) == work.known[:, None]).all() and one["cluster"] > 1
    assert one["questions"] == len(test) >= size.test_samples and searched["questions"] == len(
        work.samples["validation"]
    )
    assert answers_of(one).mean() == pytest.approx(one["accuracy"]) and one["trace"][0]["gdkd"] > 0
    assert (
        one["held_out"]["choices"] == len(work.held_out) and one["held_out"]["nats"] > 0 and "held_out" not in searched
    )
    assert one["photos"] == len(work.known) and one["command"].endswith("--again --set captions")
    again = work.score(work.open(Row.parse("student/0")), "test")
    assert again["right"] == records["student/0"]["right"] and again["held_out"] == records["student/0"]["held_out"]
    assert set(again["by_type"]) <= {*SHAPES, "again"}
    text = write_table(store, tmp_path, pages=False, told=(TOLD,))
    assert "t-intervals over the seeds" in text and "held-out choice" in text and images.told in text
    assert "QAT + GRACE" in text and "round-to-nearest" in text and TOLD in text
