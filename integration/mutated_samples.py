"""Damage samples at random and check that each is either used or counted, in bounded time, without a network or a program.

    python -m integration.mutated_samples --count 100000

A mutant is one of eighteen forms of a sample with one to four changes: fields dropped, doubled, renamed or exchanged, values of
another type, text that is no text, images and videos replaced by damaged, huge or special ones. Every eighth is a line of a
JSONL file with damaged bytes. It is made from its number alone, so a number that a report names can be made again:

    python -m integration.mutated_samples --show 4711

What must hold of every mutant: `prepare` returns; its message has at most 600 characters; it takes at most two seconds of
processor time; no socket is connected and no process is started; and what the check accepts the collator makes a batch of,
of as many tokens as the check said. The result goes to benchmarks/results/mutated_samples.json.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import math
import os
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

__all__ = ["LONGEST", "MESSAGE", "Workshop", "mutant", "run"]

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "mutated_samples.json"
LONGEST, MESSAGE = 2.0, 600  # seconds of processor time, characters
SEED = 20261130
BLOCK = 50
FORBIDDEN = (
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
)
LINES_EVERY = 8  # one in so many is a damaged line of a file


class Workshop:
    """Files that samples name, one processor for images and one for videos, and what was seen of sockets and processes."""

    def __init__(self, folder: Path) -> None:
        from grace_plugin.data import ConversationCollator
        from tests.tiny import build

        self.folder = folder
        self.collators = [ConversationCollator(build(name)[1], max_length=4000) for name in ("qwen3_vl", "llava")]
        self.seen: list[str] = []
        self.watching = False
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8))
        for form in ("png", "jpg", "webp", "gif", "bmp", "tiff", "avif", "ppm", "eps", "ico"):
            image.save(folder / f"a.{form}")
        self.content = {path.suffix[1:]: path.read_bytes() for path in folder.glob("a.*")}
        (folder / "cut.png").write_bytes(self.content["png"][:900])
        (folder / "empty.png").touch()
        os.mkfifo(folder / "fifo.png")
        (folder / "folder.png").mkdir()
        Image.new("L", (30_000, 1)).save(folder / "long.png")
        sys.addaudithook(self._audit)  # cannot be taken off again, so it looks only while `watching`

    def _audit(self, event: str, _arguments: Any) -> None:
        if self.watching and event in FORBIDDEN:
            self.seen.append(event)

    def path(self, name: str) -> str:
        """Return the path of a file."""
        return str(self.folder / name)


def _uri(content: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def _bases(shop: Workshop) -> list[Any]:
    """Return usable samples of the forms that are read."""
    image, png = shop.path("a.png"), shop.content["png"]
    ask, say = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a red square"}
    show = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what?"}]}
    video = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "what?"}]}
    frames = np.random.default_rng(1).integers(0, 256, (4, 56, 56, 3), dtype=np.uint8)
    human, gpt = {"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "red"}
    inline = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "q"}]}
    url = {
        "role": "user",
        "content": [{"type": "image_url", "image_url": {"url": _uri(png)}}, {"type": "text", "text": "q"}],
    }
    return [
        {"id": 1, "messages": [ask, say]}, {"messages": [show, say, ask, say], "images": [image]},
        {"messages": [{"role": "system", "content": "short"}, show, say], "images": [Image.open(io.BytesIO(png))]},
        {"messages": [show, say], "image": image}, {"messages": [show, say], "images": [_uri(png)]},
        {"messages": [show, say], "images": [{"bytes": png, "path": None}]}, {"messages": [show, say], "images": [png]},
        {"messages": [inline, say]}, {"messages": [url, say]},
        {"messages": [{"role": "user", "content": "<image> what?"}, say], "images": [image]},
        {"id": "l", "image": image, "conversations": [human, gpt, {"from": "human", "value": "and?"}, gpt]},
        {"id": "m", "image": [image, image], "conversations": [{"from": "human", "value": "<image><image>"}, gpt]},
        {"messages": [video, say], "videos": [frames], "fps": 2.0}, {"messages": [video, say], "videos": [frames / 255.0]},
        {"messages": [video, say], "videos": [torch.from_numpy(frames).permute(0, 3, 1, 2)]},
        {"messages": [video, say], "videos": [[image, image]], "fps": 1},
        {"messages": [ask, {**say, "train": False}, ask, say]}, {"prompt": "what?", "completion": "red"},
    ]  # fmt: skip


def _deep(levels: int) -> Any:
    found: Any = "x"
    for number in range(levels):
        found = [found] if number % 2 else {"type": found}
    return found


def _media(shop: Workshop, draw: random.Random) -> Any:
    """Return an image or a video that may be damaged, huge or special."""
    form = draw.choice(sorted(shop.content))
    content = bytearray(shop.content[form])
    for _ in range(draw.randint(0, 6)):
        content[draw.randrange(min(len(content), draw.choice((30, 200, 10**6))))] = draw.randrange(256)
    damaged = bytes(content[: draw.randrange(len(content))] if draw.random() < 0.3 else content)
    size = draw.choice(((1, 1), (3, 400), (900, 2), (64, 64), (20_000, 1)))
    mode = draw.choice(("RGB", "L", "P", "1", "RGBA", "LA", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"))
    shape = [draw.choice((0, 1, 2, 3, 4, 8, 56)) for _ in range(draw.randint(0, 5))]
    names = (
        "cut.png",
        "empty.png",
        "fifo.png",
        "folder.png",
        "long.png",
        "none.png",
        "a.eps",
        "a.gif",
        "a.tiff",
        "a.ico",
    )
    return draw.choice((
        lambda: damaged, lambda: _uri(damaged), lambda: {"bytes": damaged}, lambda: io.BytesIO(damaged),
        lambda: Image.new(mode, size), lambda: shop.path(draw.choice(names)), lambda: shop.path(draw.choice(names)),
        lambda: Path(shop.path("a.png")), lambda: "file://" + shop.path("a.png"), lambda: {"path": shop.path("a.png")},
        lambda: draw.choice(("/dev/zero", "/dev/stdin", "/proc/self/mem", "http://127.0.0.1:9/a.png", "ftp://x",
        "rtsp://127.0.0.1:9/a",
                             "file:///dev/zero", "concat:/dev/zero", "data:,", "data:image/png;base64,!", "~/a.png",
                             "a" * 5000)),
        lambda: np.full(shape, draw.choice((0, 0.5, 1.0, 255, 256, -1, math.nan, math.inf)), dtype=draw.choice(("f4", "f8",
        "f2"))),
        lambda: np.zeros(shape, dtype=draw.choice(("u1", "i8", "?", "c8", "S3", "O"))), lambda: torch.zeros(shape),
        lambda: [Image.new("RGB", size)] * draw.choice((0, 1, 3, 40)), lambda: (frame for frame in ()),
    ))()  # fmt: skip


def _junk(shop: Workshop, draw: random.Random) -> Any:
    """Return a value of any type."""
    if draw.random() < 0.4:
        return _media(shop, draw)
    return draw.choice((
        None, True, False, 0, -1, 7, 10**5000, -(10**400), 2**63, 1e308, math.nan, math.inf, 1.5, "", " ", "\n", "\0",
        "x" * 100_000,
        "\ud800", "a\udce9b", "\ufdd0\U000f0000\ufdd1", "\u202e", "<image>", "<video>", "<|im_end|>",
        "<|im_start|>assistant\n", "</s>",
        "<|vision_start|><|image_pad|><|vision_end|>", "{{ 7 * 7 }}", "{% for a in range(9) %}", "[/x]", "<script>", b"x",
        b"",
        bytearray(b"\xff" * 100), memoryview(b"x"), [], {}, (), [None], [[]], [1, "a"], {"a": 1}, {1: 2, "b": 3},
        {None: None},
        {"type": "image"}, {"type": "text"}, {"type": "text", "text": "q"}, {"role": "user", "content": "q"},
        {"from": "gpt", "value": "r"},
        {"type": "audio"}, {"bytes": "x"}, {"path": 5}, {"url": "https://example.org/a.png"}, {"x"}, frozenset(), range(3),
        object(), int,
        len, 3 + 4j, np.float32(2), np.int64(3), np.array(["a"]), torch.tensor(1), Ellipsis, _deep(40), _deep(3000),
        ["x"] * 10_000,
        "user", "assistant", "system", "tool", "image", "text", "video", 10.0,
    ))  # fmt: skip


KEYS: tuple[Any, ...] = (
    "id", "messages", "conversations", "conversation", "images", "image", "videos", "video", "fps", "role", "content",
    "type", "text",
    "from", "value", "train", "weight", "tools", "tool_calls", "reasoning_content", "system", "prompt", "completion",
    "chosen", "query",
    "response", "min_pixels", "max_pixels", "url", "path", "bytes", "name", "", " ", "Images", "__grace_error__",
    "__class__", 5, None,
)  # fmt: skip


def _places(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the places where a value holds others, to a depth of eight."""
    yield at
    if len(at) < 8:
        inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, part in list(inside)[:50]:
            yield from _places(part, (*at, key))


def _changed(value: Any, shop: Workshop, draw: random.Random) -> Any:
    """Return the value with one change somewhere."""
    *above, last = draw.choice([place for place in _places(value) if place] or [(None,)])
    if last is None:
        return _junk(shop, draw)
    holder = value
    for key in above:
        holder = holder[key]
    kind = draw.randrange(9)
    if kind < 3:
        holder[last] = _junk(shop, draw)
    elif kind == 3:
        del holder[last]
    elif kind == 4 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = holder.pop(last)
    elif kind == 5 and isinstance(holder, dict):
        holder[draw.choice(KEYS)] = _junk(shop, draw)
    elif kind == 6:
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
    elif kind == 7 and isinstance(holder[last], str) and len(holder[last]) < 1000:
        place = draw.randrange(len(holder[last]) + 1)
        holder[last] = (
            holder[last][:place] + chr(draw.choice((draw.randrange(0x3000), 0xD800, 0, 0x1F600))) + holder[last][place:]
        )
    elif isinstance(holder, list):
        holder.insert(last, holder[last] if draw.random() < 0.5 else _junk(shop, draw))
    else:
        holder[last] = draw.choice(
            ([holder[last]], {"text": holder[last]}, (holder[last],), [[holder[last]]], (holder[last], holder[last]))
        )
    return value


def mutant(number: int, shop: Workshop) -> Any:
    """Return a damaged sample; bytes where it is a line of a file."""
    draw = random.Random(f"{SEED} {number}")
    bases = _bases(shop)
    if number % LINES_EVERY == 0:
        line = bytearray(json.dumps(bases[draw.choice((0, 1, 3, 4, 7, 8, 10, 11, 16, 17))]).encode())
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(line))
            piece = draw.choice((b"", b"\xff", b"\0", b'"', b"{", b"]", b",", b"7" * 4400, b"[" * 2000, b"NaN", b"\\ud800",
            b"null",
                                 bytes([draw.randrange(256)])))  # fmt: skip
            line[place : place + draw.choice((0, 1, 1, 3))] = piece
        return bytes(line).replace(b"\n", b" ")
    sample = draw.choice(bases)
    fields = [key for key in ("image", "images", "videos") if key in sample]
    if fields and draw.random() < 0.6:  # nothing but other media, which most samples pass on to the decoders
        field = draw.choice(fields)
        several = field != "image"
        sample[field] = [_media(shop, draw) for _ in sample[field]] if several else _media(shop, draw)
        return sample
    for _ in range(draw.choice((1, 1, 1, 2, 2, 4))):
        sample = _changed(sample, shop, draw)
    return sample


def _judged(sample: Any, entry: Any, number: int, collator: Any) -> str:
    """Return "used", the reason it is counted by, or what is wrong, which begins with FAULT."""
    if entry.reason:
        if not 0 < len(entry.message) <= MESSAGE:
            return f"FAULT: a message of {len(entry.message)} characters"
        return str(entry.reason)
    try:
        batch = collator([sample])
    except Exception as error:
        return f"FAULT: checked, and the collator raises {type(error).__name__}: {str(error)[:200]}"
    if batch["input_ids"].shape[1] != entry.tokens:
        return f"FAULT: {batch['input_ids'].shape[1]} tokens, and {entry.tokens} were counted"
    return "used"


def _block(numbers: range, shop: Workshop, collator: Any) -> list[str]:
    """Return the outcomes of some mutants, checked as one dataset."""
    from grace_plugin.data import load_samples, prepare

    made = {number: mutant(number, shop) for number in numbers}
    lines = {number: sample for number, sample in made.items() if number % LINES_EVERY == 0}
    samples = {number: sample for number, sample in made.items() if number % LINES_EVERY}
    found: dict[int, str] = {}
    sets: list[tuple[list[int], Any]] = [(list(samples), list(samples.values()))] if samples else []
    kept = [number for number, line in lines.items() if line.strip()]
    if kept:
        (shop.folder / "lines.jsonl").write_bytes(b"\n".join(lines[number] for number in kept))
        sets.append((kept, load_samples(str(shop.folder / "lines.jsonl"))))
    for order, dataset in sets:
        options = {"max_bad_samples": 1.0, "allow_empty": True, "cache": shop.folder / "cache"}
        before = time.process_time()
        try:
            prepared = prepare(dataset, collator, **options)
        except Exception as error:
            if len(numbers) == 1:
                return [f"FAULT: {type(error).__name__}: {str(error)[:300]}"]
            return [outcome for number in numbers for outcome in _block(range(number, number + 1), shop, collator)]
        for place, (number, entry) in enumerate(zip(order, prepared.entries, strict=True)):
            found[number] = _judged(dataset[place], entry, place, collator)
        if time.process_time() - before > LONGEST and len(numbers) > 1:  # of fifty; which of them took so long?
            return [outcome for number in numbers for outcome in _block(range(number, number + 1), shop, collator)]
        if time.process_time() - before > LONGEST:
            found[order[0]] = f"FAULT: {time.process_time() - before:.1f} seconds of processor time"
    return [found.get(number, "blank line") for number in numbers]


def run(numbers: range, shop: Workshop) -> Iterator[tuple[int, str]]:
    """Yield (number, outcome) of mutants, in order."""
    for start in range(numbers.start, numbers.stop, BLOCK):
        some = range(start, min(start + BLOCK, numbers.stop))
        collator = shop.collators[start // BLOCK % len(shop.collators)]
        shop.seen.clear()
        shop.watching = True
        try:
            outcomes = _block(some, shop, collator)
        finally:
            shop.watching = False
        if shop.seen:
            outcomes[0] = f"FAULT: {', '.join(sorted(set(shop.seen)))} in the block of {BLOCK} from here"
        yield from zip(some, outcomes, strict=True)


def share(first: int, count: int, seconds: float) -> tuple[Counter[str], list[str]]:
    """Return counts by outcome and the errors of `count` mutants from `first` on; ends early after `seconds`."""
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="grace-mutants-"))
    started, counts, errors = time.monotonic(), Counter[str](), list[str]()
    try:
        for number, outcome in run(range(first, first + count), Workshop(folder)):
            counts[outcome.partition(":")[0]] += 1
            if outcome.startswith("FAULT"):
                errors.append(f"{number}: {outcome}")
                print(errors[-1], flush=True)
            if number % BLOCK == BLOCK - 1 and time.monotonic() - started > seconds:
                break
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return counts, errors


def show(number: int) -> None:
    """Print a mutant and what becomes of it."""
    from grace_plugin.data.shown import shown

    folder = Path(tempfile.mkdtemp(prefix="grace-mutants-"))
    try:
        shop = Workshop(folder)
        print(shown(mutant(number, shop), 3000))
        print(dict(run(range(number, number + 1), shop)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    """Parse the command line and run; see the module."""
    parser = argparse.ArgumentParser(description="Mutated samples")
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after so long and record what was done")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--show", type=int)
    given = parser.parse_args()
    if given.show is not None:
        show(given.show)
        return 0
    started, counts, errors = time.monotonic(), Counter[str](), list[str]()
    each = (
        -(-given.count // (given.processes * BLOCK)) * BLOCK
    )  # whole blocks, so that a mutant's collator stays the same
    starts = range(given.first, given.first + given.count, each)
    parts = [(start, min(each, given.first + given.count - start), given.seconds) for start in starts]
    if given.processes == 1:
        found_parts = [share(*part) for part in parts]
    else:
        with ProcessPoolExecutor(given.processes, get_context("spawn")) as pool:
            found_parts = list(pool.map(share, *zip(*parts, strict=True)))
    for some, wrong in found_parts:
        counts += some
        errors += wrong
    found = {
        "command": "python -m integration.mutated_samples " + " ".join(sys.argv[1:]), "seed": SEED,
        "mutants": sum(counts.values()),
        "errors": errors[:100], "outcomes": dict(counts.most_common()), "seconds": round(time.monotonic() - started, 1),
        "environment": {"python": platform.python_version(), "machine": platform.machine(), "cores": os.cpu_count(),
                        **{name: version(name) for name in ("torch", "transformers", "pillow", "numpy")}},
    }  # fmt: skip
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    print(f"{found['mutants']:,} mutants, {len(errors)} errors, {found['seconds']} s: {given.output}")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
