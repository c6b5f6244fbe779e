"""A mixed dataset on disk: LLaVA JSON, messages, text only, videos as frames and files, and broken samples of many kinds.

Every broken sample is written together with the reason it must be counted under, so a report can be held to the sample.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny import make_samples
from tests.videos import write_video

__all__ = ["Mixed", "write_mixed"]

ANSWER = {"from": "gpt", "value": "a red square"}


class Mixed(NamedTuple):
    """mix: the file to load. samples: samples in all. reasons: broken samples by reason. videos: samples with a video."""

    mix: Path
    samples: int
    reasons: Counter[str]
    videos: int


def _broken(number: int) -> tuple[str, dict[str, Any]]:
    """The number-th broken LLaVA sample and its reason."""
    ask = {"from": "human", "value": "<image>\nwhat is it?"}
    good = {"id": f"broken-{number}", "image": "pictures/0.png", "conversations": [ask, ANSWER]}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("missing_file", {**good, "image": "pictures/none.png"}),
        ("placeholder_mismatch", {**good, "image": ["pictures/0.png", "pictures/1.png"]}),
        ("empty_conversation", {**good, "conversations": []}),
        ("roles_out_of_order", {**good, "conversations": [ANSWER, ask]}),
        ("unreadable_image", {**good, "image": "pictures/truncated.png"}),
        (
            "unreadable_video",
            {
                "id": good["id"],
                "video": "pictures/cut.mp4",
                "conversations": [{**ask, "value": "<video>\nwhat?"}, ANSWER],
            },
        ),
        ("unknown_role", {**good, "conversations": [{**ask, "from": "narrator"}, ANSWER]}),
    ]
    return kinds[number % len(kinds)]


def _pictures(folder: Path, seed: int) -> int:
    """Write 40 pictures, two frames of each, a truncated file, a clip of two seconds and a cut one; returns 40."""
    (folder / "pictures").mkdir(parents=True)
    pictures = [sample["images"][0] for sample in make_samples(40, seed=seed)]
    for number, picture in enumerate(pictures):
        picture.save(folder / "pictures" / f"{number}.png")
        for frame in range(2):
            picture.resize((64, 64)).rotate(90 * frame).save(folder / "pictures" / f"{number}-{frame}.png")
    whole = (folder / "pictures" / "0.png").read_bytes()
    (folder / "pictures" / "truncated.png").write_bytes(whole[: len(whole) * 2 // 3])
    write_video(folder / "pictures" / "clip.mp4", size=(64, 64))
    whole = (folder / "pictures" / "clip.mp4").read_bytes()
    (folder / "pictures" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    return len(pictures)


def _llava(count: int, bad: int, draw: random.Random, pictures: int) -> tuple[list[dict[str, Any]], Counter[str]]:
    """LLaVA samples, the first `bad` of them broken, shuffled; one or two pictures, one or two turns."""

    def place() -> str:
        return f"pictures/{draw.randrange(pictures)}.png"

    found: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for number in range(count):
        if number < bad:
            reason, sample = _broken(number)
            reasons[reason] += 1
            found.append(sample)
            continue
        several = number % 5 == 0
        ask = "<image>\n<image>\nsay which colour stands left" if several else "<image>\nwhat is the shape?"
        talk = [{"from": "human", "value": ask}, ANSWER, {"from": "human", "value": "and one?"}, ANSWER]
        image = [place(), place()] if several else place()
        found.append({"id": f"l{number}", "image": image, "conversations": talk[: 2 + 2 * (number % 2)]})
    draw.shuffle(found)
    return found, reasons


def write_mixed(folder: Path, count: int, *, broken: float = 0.05, videos: int = 40, seed: int = 0) -> Mixed:
    """Write `count` samples under `folder`: the broken share among the LLaVA samples, a quarter text, `videos` with a video."""
    draw = random.Random(seed)
    pictures = _pictures(folder, seed)
    text = count // 4
    llava = (count - text - videos) // 2
    first, reasons = _llava(llava, round(count * broken), draw, pictures)
    (folder / "llava.json").write_text(json.dumps(first))
    content = [{"type": "image"}, {"type": "text", "text": "what is its colour?"}]
    sets: dict[str, list[dict[str, Any]]] = {}
    sets["messages.jsonl"] = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "blue " * (1 + n % 7)}],
         "images": [f"pictures/{draw.randrange(pictures)}.png"]}
        for n in range(count - text - videos - llava)
    ]  # fmt: skip
    sets["text.jsonl"] = [
        {"id": n, "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "one two"}]}
        for n in range(text)
    ]
    ask = {"from": "human", "value": "<video>\nwhat turns?"}
    turns = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what turns?"}]},
             {"role": "assistant", "content": "a red square"}]  # fmt: skip
    kinds: list[dict[str, Any]] = [
        {"video": "pictures/clip.mp4", "conversations": [ask, ANSWER]},
        {"videos": ["pictures/clip.mp4"], "messages": turns},
    ]
    sets["video.jsonl"] = [
        {"id": f"v{n}", "fps": 1.0, **(
            kinds[n // 2 % 2] if n % 2
            else {"video": [f"pictures/{n % pictures}-{k}.png" for k in range(2)], "conversations": [ask, ANSWER]}
        )}
        for n in range(videos)
    ]  # fmt: skip
    names = ["llava.json"]
    for name, made in sets.items():
        if made:
            (folder / name).write_text("\n".join(map(json.dumps, made)))
            names.append(name)
    (folder / "mix.yaml").write_text("sets:\n" + "".join(f"  - {{path: {name}}}\n" for name in names))
    return Mixed(folder / "mix.yaml", count, reasons, videos)
