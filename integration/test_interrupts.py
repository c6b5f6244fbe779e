"""A signal to the real command: what is kept, the exit status, and the command that goes on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from grace_plugin.run import resume
from tests.pairs import Pair, pair, recipe_text
from tests.tiny import make_samples

ROOT = Path(__file__).parents[1]
MAIN = "from grace_plugin.cli.register_grace import main; main()"
STEPS = 12
LIMIT = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair, its recipe and its samples."""
    place = tmp_path_factory.mktemp("signals")
    made: Pair = pair("llava", place / "pair")
    (place / "recipe.yaml").write_text(recipe_text(made.teacher))
    lines = []
    for number, sample in enumerate(make_samples(6, seed=3)):
        sample["images"][0].save(place / f"{number}.png")
        lines.append(json.dumps(sample | {"images": [f"{number}.png"]}))
    (place / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return place


def command(folder: Path, out: Path, *further: str) -> list[str]:
    asked = {"max_steps": STEPS, "use_cpu": "true", "logging_steps": 1, "disable_tqdm": "true"}
    given = [part for name, value in asked.items() for part in ("--set", f"{name}={value}")]
    return [
        sys.executable, "-c", MAIN, "train", str(folder / "recipe.yaml"), "--model", str(folder / "pair" / "student"),
        "--dataset", str(folder / "samples.jsonl"), "--output_dir", str(out), *given, *further,
    ]  # fmt: skip


def begun(words: list[str], **further: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | further
    return subprocess.Popen(words, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for_steps(out: Path, count: int) -> None:
    """Wait until a run has logged so many steps."""
    log, end = out.with_name(f"{out.name}.run") / "metrics.jsonl", time.monotonic() + LIMIT
    while not log.is_file() or len(log.read_text().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_sigterm__one_process__state_kept_and_printed_command_continues(folder: Path) -> None:
    out = folder / "out"
    process = begun(command(folder, out))
    wait_for_steps(out, 2)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGTERM)  # as a launcher does, which signals the group and the process
    said = process.communicate(timeout=LIMIT)[1]
    assert process.returncode == 143, said
    (line,) = [line for line in said.splitlines() if line.startswith("stopped by")]
    (state,) = resume.states(folder / "out.run")
    assert resume.damage(state) == "" and f"of {STEPS}; {state} is kept; go on with: grace train " in line
    assert "Traceback" not in said and not out.exists()
    again = shlex.split(line.partition("go on with: grace ")[2])
    ended = begun([sys.executable, "-c", MAIN, *again])
    assert ended.wait(LIMIT) == 0, ended.communicate()
    assert json.loads((out / "grace/record.json").read_text())["run"]["steps"] == STEPS


def test_sigterm__to_one_of_two_ranks__both_end_after_the_same_step(folder: Path) -> None:
    out = folder / "ranks"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    words = command(folder, out, "--set", "ddp_backend=gloo")
    ranks = [begun(words, RANK=rank, LOCAL_RANK=rank, **together) for rank in ("0", "1")]
    wait_for_steps(out, 2)
    ranks[1].send_signal(signal.SIGTERM)
    said = [rank.communicate(timeout=LIMIT)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [143, 143], said
    (line,) = [line for line in said[0].splitlines() if line.startswith("stopped by SIGTERM")]
    (state,) = resume.states(folder / "ranks.run")
    assert resume.damage(state) == "" and f"{state} is kept" in line and not out.exists()
    assert sorted(path.name for path in state.glob("rng_state*")) == ["rng_state_0.pth", "rng_state_1.pth"]
    words.append("--resume_from_checkpoint")
    ranks = [begun(words, RANK=rank, LOCAL_RANK=rank, **together) for rank in ("0", "1")]
    printed = [rank.communicate(timeout=LIMIT)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert json.loads((out / "grace/record.json").read_text())["run"]["steps"] == STEPS
    said = ('"verified": true', "GRACE: 2 processes", "serve it: vllm serve")
    assert [[line in text for line in said] for text in printed] == [[True] * 3, [False] * 3], "one rank speaks"
