"""What a run says once: its shape before the first step, speed, memory, size and the line that serves it after the last."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import AutoProcessor, TrainerCallback

from grace_plugin.data import ConversationCollator
from grace_plugin.run.summary import count_tokens, folder_bytes, size
from grace_plugin.upstream import oneshot as upstream_oneshot
from tests.pairs import Pair, loaded, recipe_text, run
from tests.tiny import make_samples


class Watch(TrainerCallback):
    """Counts the parameters that train, and all."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.counts = [sum(p.numel() for p in model.parameters() if p.requires_grad or held) for held in (False, True)]


@pytest.mark.slow
def test_summary__run__shape_and_throughput_once(
    llava: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    watch = Watch()
    result = run(
        llava, tmp_path / "out", make_samples(6), max_steps=3, gradient_accumulation_steps=2, callbacks=[watch]
    )
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GRACE:")]
    assert len(said) == 3
    assert re.fullmatch(
        r"GRACE: 1 process on cpu, micro-batch 2 x accumulation 2 = global batch 4, 3 steps, 1\.50 epochs of 6 samples; trains "
        r"[\d,]+ of [\d,]+ parameters, weights \d+\.\d MB, teacher \d+\.\d MB",
        said[0],
    )
    trains, held = (int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:of|parameters)", said[0]))
    assert (trains, held) == tuple(watch.counts)
    assert re.fullmatch(
        r"GRACE: 3 steps in \d+\.\d s, [\d,]+ tokens/s, peak memory \d+\.\d [MG]B \(resident, rank 0\)", said[1]
    )
    bytes_ = size(folder_bytes(tmp_path / "out"))
    assert re.fullmatch(
        rf"GRACE: checkpoint of {bytes_} after \d+\.\d s; serve it: vllm serve {re.escape(str(tmp_path / 'out'))}",
        said[2],
    )
    found = result.throughput
    assert found["tokens"] == 10 * result.data["tokens"]["mean"]  # four samples, the two left over, and four
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["train_seconds"], rel=0.01)
    assert found["peak_memory_bytes"] > 10**8


@pytest.mark.slow
def test_header_line__loader_of_upstream__its_batch(llava: Pair, capsys: pytest.CaptureFixture[str]) -> None:
    processor = AutoProcessor.from_pretrained(llava.student)
    loader = DataLoader(make_samples(4), batch_size=2, collate_fn=ConversationCollator(processor))  # type: ignore[arg-type]
    upstream_oneshot(model=loaded(llava), recipe=recipe_text(llava.teacher), dataset=loader, pipeline="grace")
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("GRACE:")]
    assert ", micro-batch 2 x accumulation 1 = global batch 2, 2 steps, 1.00 epochs of 4 samples; " in said[0]


@pytest.mark.slow
def test_header__with_a_progress_bar__has_a_line_of_its_own(llava: Pair, tmp_path: Path) -> None:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        run(llava, tmp_path / "out", make_samples(1), max_steps=1, per_device_train_batch_size=1, disable_tqdm=False)
    header, speed, _ = (line for line in re.split("[\n\r]", said.getvalue()) if "GRACE: " in line)
    assert header.startswith("GRACE: 1 process on cpu") and ", 1 step, 1.00 epochs of 1 sample; trains" in header
    assert speed.startswith("GRACE: 1 step in ")
    assert said.getvalue().index(header) < said.getvalue().index("0/1 [")


@pytest.mark.slow
def test_say__log_level_warning__silent(llava: Pair, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(llava, tmp_path / "out", max_steps=1, log_level="warning")
    assert "GRACE:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (999, "999 bytes"), (1000, "1.0 kB"), (2.5e9, "2.5 GB"), (1e13, "10000.0 GB")]
)
def test_size__bytes__as_text(count: float, text: str) -> None:
    assert size(count) == text


def test_count_tokens__padded_batch__padding_excluded() -> None:
    ids = torch.ones(2, 3, dtype=torch.long)
    assert count_tokens({"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0]])}) == 4
    assert count_tokens({"input_ids": ids}) == 6
    assert count_tokens({}) == 0
