"""One rank of integration/test_data_order.py: a real run that writes down which rows it read, in order.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m integration.order_worker PAIR_FOLDER OUT_FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from tests.pairs import Pair, recipe_text, run
from tests.tiny import rows

STEPS, ROWS = 6, 16  # 16 rows, 4 a step: the fourth epoch would begin at step 12, the second begins at step 4
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Recorded(list):  # type: ignore[type-arg]
    """Rows that note who is asked for."""

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
    """Rows that this process read while it trained; one read ahead by the loader is cut off."""
    data = Recorded(rows(12, seed=61) + rows(4, seed=62, images=0))
    try:
        run(
            pair, out, data, recipe=recipe_text(pair.teacher), max_steps=STEPS, gradient_accumulation_steps=2 // WORLD,
            save_strategy="steps", save_steps=3, seed=11, callbacks=[Begin(data, stop)], **options,
        )  # fmt: skip
    except KeyboardInterrupt:
        pass
    return data.read


def main() -> None:
    folder, out = Path(sys.argv[1]), Path(sys.argv[2])
    pair = Pair("llava", folder / "student", folder / "teacher")
    read = order(pair, out / "run", ddp_backend="gloo", ddp_timeout=120)
    (out / f"{RANK}.json").write_text(json.dumps(read))


if __name__ == "__main__":
    main()
