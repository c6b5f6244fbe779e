"""One rank of integration/test_data_order.py: real runs, on a list and on a stream, that write down which samples they read.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m integration.order_worker PAIR_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from grace_plugin.run.inputs import load_processor
from tests.pairs import Pair, recipe_text, run
from tests.tiny import make_samples

STEPS, ROWS = 6, 16  # 16 samples, 4 a step: the fourth epoch would begin at step 12, the second begins at step 4
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Recorded(list):  # type: ignore[type-arg]
    """Samples that note who is asked for."""

    def __init__(self, given: list[dict[str, Any]]) -> None:
        super().__init__(given)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> Any:
        self.read.append(index)
        return super().__getitem__(index)


class Begin(TrainerCallback):
    """Forgets what was read before training, and stops a run after a step as a killed job would."""

    def __init__(self, data: Recorded, stop: int | None) -> None:
        self.data, self.stop = data, stop

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.data.read.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.stop is not None and state.global_step == self.stop:
            raise KeyboardInterrupt


def order(pair: Pair, out: Path, *, stop: int | None = None, **options: Any) -> list[int]:
    """Samples that this process read while it trained; one read ahead by the loader is cut off."""
    data = Recorded(make_samples(12, seed=61) + make_samples(4, seed=62, images=0))
    try:
        run(
            pair, out, data, recipe=recipe_text(pair.teacher), max_steps=STEPS, gradient_accumulation_steps=2 // WORLD,
            save_strategy="steps", save_steps=3, seed=11, callbacks=[Begin(data, stop)], **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        pass
    return data.read


class Stream:
    """Ten samples an epoch, answered by their number; those in `broken` cannot be used."""

    def __init__(self, broken: tuple[int, ...] = (3, 5, 7)) -> None:
        self.broken = broken

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number, sample in enumerate(make_samples(8, seed=63) + make_samples(2, seed=64, images=0)):
            answer = {"role": "assistant", "content": [{"type": "text", "text": f"say {number}"}]}
            yield sample | {"messages": sample["messages"][:1] + ([] if number in self.broken else [answer])}


class Learned(TrainerCallback):
    """Numbers of the samples in each step's forward passes, read off the token ids the model was given."""

    def __init__(self, tokenizer: Any, stop: int | None) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.steps: list[list[int]] = [[]]

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        def look(_: Any, __: Any, given: dict[str, Any]) -> None:
            texts = [self.tokenizer.decode(ids) for ids in given["input_ids"]]
            self.steps[-1] += [int(number) for text in texts for number in re.findall(r"say (\d+)", text)]

        model.register_forward_pre_hook(look, with_kwargs=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.steps.append([])
        if self.stop is not None and state.global_step == self.stop:
            raise KeyboardInterrupt


def streamed(pair: Pair, out: Path, given: Stream, *, stop: int | None = None, **options: Any) -> dict[str, Any]:
    """Samples of each step of a run on a stream, as this process saw them, its losses and its report."""
    learned = Learned(load_processor(str(pair.student)).tokenizer, stop)
    try:
        done = run(
            pair, out, given, recipe=recipe_text(pair.teacher), max_steps=STEPS, gradient_accumulation_steps=2 // WORLD,
            seed=11, callbacks=[learned], max_bad_samples=0.4, logging_steps=1,
            **({"save_strategy": "steps", "save_steps": 3} | options),
        )  # fmt: skip
    except KeyboardInterrupt:
        return {"steps": learned.steps[:-1]}
    losses = [[log["loss_ce"], log["loss_gdkd"], log["loss_rcka"]] for log in done.history if "loss_ce" in log]
    counts = [[log["images"], log["samples_without_images"]] for log in done.history if "loss_ce" in log]
    return {"steps": learned.steps[:-1], "losses": losses, "counts": counts, "report": done.data,
            "verified": done.verification["verified"]}  # fmt: skip


class Torn(Stream):
    """A stream that cannot be read on behind the samples looked at before the run, on the last rank alone."""

    passes = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        Torn.passes += 1
        for number, sample in enumerate(super().__iter__()):
            if Torn.passes > 1 and number == 5 and RANK == WORLD - 1:
                raise OSError("the wire was cut")
            yield sample


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    pair = Pair("llava", folder / "student", folder / "teacher")
    together = {"ddp_backend": "gloo", "ddp_timeout": 120}
    if sys.argv[3:] == ["torn"]:
        streamed(pair, out / "torn", Torn(()), **together)
    if sys.argv[3:] == ["stream"]:
        found: Any = {
            "whole": streamed(pair, out / "whole", Stream(()), **together),
            "broken": streamed(pair, out / "broken", Stream(), **together),
        }
    else:
        found = order(pair, out / "run", **together)
    (out / f"{RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
