"""A mixed dataset on disk: LLaVA JSON, messages, text only, videos as frames, and broken rows of many kinds.

Every broken row is written together with the reason it must be counted under, so a report can be held to the row.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.tiny import rows

__all__ = ["Mixed", "write_mixed"]

ANSWER = {"from": "gpt", "value": "a red square"}


class Mixed(NamedTuple):
    """mix: the file to load. rows: rows in all. reasons: broken rows by reason. videos: rows with a video."""

    mix: Path
    rows: int
    reasons: Counter[str]
    videos: int


def _broken(number: int, folder: Path) -> tuple[str, dict[str, Any]]:
    """The number-th broken LLaVA row and its reason."""
    ask = {"from": "human", "value": "<image>\nwhat is it?"}
    good = {"id": f"broken-{number}", "image": "pictures/0.png", "conversations": [ask, ANSWER]}
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("missing_file", {**good, "image": "pictures/none.png"}),
        ("placeholder_mismatch", {**good, "image": ["pictures/0.png", "pictures/1.png"]}),
        ("empty_conversation", {**good, "conversations": []}),
        ("roles_out_of_order", {**good, "conversations": [ANSWER, ask]}),
        ("unreadable_image", {**good, "image": "pictures/truncated.png"}),
        ("unknown_role", {**good, "conversations": [{**ask, "from": "narrator"}, ANSWER]}),
    ]
    return kinds[number % len(kinds)]


def write_mixed(folder: Path, count: int, *, broken: float = 0.05, videos: int = 40, seed: int = 0) -> Mixed:
    """Write `count` rows under `folder`: the broken share among the LLaVA rows, a quarter text, `videos` with a video."""
    draw = random.Random(seed)
    (folder / "pictures").mkdir(parents=True)
    pictures = [row["images"][0] for row in rows(40, seed=seed)]
    for number, picture in enumerate(pictures):
        picture.save(folder / "pictures" / f"{number}.png")
        for frame in range(2):
            picture.resize((64, 64)).rotate(90 * frame).save(folder / "pictures" / f"{number}-{frame}.png")
    whole = (folder / "pictures" / "0.png").read_bytes()
    (folder / "pictures" / "truncated.png").write_bytes(whole[: len(whole) * 2 // 3])
    bad = round(count * broken)
    text = count // 4
    llava = (count - text - videos) // 2
    messages = count - text - videos - llava

    def place() -> str:
        return f"pictures/{draw.randrange(len(pictures))}.png"

    first: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    for number in range(llava):
        if number < bad:
            reason, row = _broken(number, folder)
            reasons[reason] += 1
            first.append(row)
            continue
        several = number % 5 == 0
        ask = "<image>\n<image>\nsay which colour stands left" if several else "<image>\nwhat is the shape?"
        talk = [{"from": "human", "value": ask}, ANSWER, {"from": "human", "value": "and one?"}, ANSWER]
        first.append({"id": f"l{number}", "image": [place(), place()] if several else place(),
                      "conversations": talk[: 2 + 2 * (number % 2)]})  # fmt: skip
    draw.shuffle(first)
    (folder / "llava.json").write_text(json.dumps(first))
    content = [{"type": "image"}, {"type": "text", "text": "what is its colour?"}]
    second = [
        {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "blue " * (1 + n % 7)}],
         "images": [place()]}
        for n in range(messages)
    ]  # fmt: skip
    (folder / "messages.jsonl").write_text("\n".join(map(json.dumps, second)))
    third = [{"id": n, "messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "one two"}]}
             for n in range(text)]  # fmt: skip
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, third)))
    fourth = [
        {"id": f"v{n}", "video": [f"pictures/{n % 40}-{frame}.png" for frame in range(2)], "fps": 1.0,
         "conversations": [{"from": "human", "value": "<video>\nwhat turns?"}, ANSWER]}
        for n in range(videos)
    ]  # fmt: skip
    (folder / "video.jsonl").write_text("\n".join(map(json.dumps, fourth)))
    names = ["llava.json", "messages.jsonl", "text.jsonl", *(["video.jsonl"] if videos else [])]
    (folder / "mix.yaml").write_text("sets:\n" + "".join(f"  - {{path: {name}}}\n" for name in names))
    return Mixed(folder / "mix.yaml", count, reasons, videos)
