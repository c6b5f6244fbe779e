"""A cache built by the command, a student trained from it by the command with the teacher out of reach, and the proof."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import grace_plugin
from tests.pairs import Pair, mixed_samples, pair, recipe_text
from tests.teacher.caches import everything

GRACE = [sys.executable, "-c", "from grace_plugin.cli.register_grace import main; main()"]


def grace(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GRACE, *arguments], capture_output=True, text=True, timeout=300, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip


def written(folder: Path, dataset: list[dict[str, Any]]) -> str:
    """Samples as JSON lines with their pictures beside them."""
    lines = []
    for number, sample in enumerate(dataset):
        names = [f"{number}-{place}.png" for place in range(len(sample["images"]))]
        for name, image in zip(names, sample["images"], strict=True):
            image.save(folder / name)
        lines.append(json.dumps({**sample, "id": f"sample-{number}", "images": names}))
    (folder / "samples.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "samples.jsonl")


def recipes(made: Pair, folder: Path) -> tuple[str, str]:
    """Paths of a recipe with the teacher resident, and of one that reads the cache."""
    resident = yaml.safe_load(recipe_text(made.teacher))
    (folder / "resident.yaml").write_text(yaml.safe_dump(resident))
    block = resident["grace_stage"]["grace_modifiers"]["GraceModifier"]["teacher"]
    block |= {"kind": "cached", "cache": str(folder / "cache")}
    (folder / "cached.yaml").write_text(yaml.safe_dump(resident))
    return str(folder / "resident.yaml"), str(folder / "cached.yaml")


def train(recipe: str, made: Pair, data: str, out: Path) -> subprocess.CompletedProcess[str]:
    settings = {
        "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 1e-3,
        "use_cpu": True, "disable_tqdm": True, "dataloader_num_workers": 1,
    }  # fmt: skip
    options = [part for name, value in settings.items() for part in ("--set", f"{name}={str(value).lower()}")]
    return grace("train", recipe, "--model", str(made.student), "--dataset", data, "--output_dir", str(out), *options)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_build_train_and_verify_by_the_commands(family: str, tmp_path: Path) -> None:
    made, data = pair(family, tmp_path), written(tmp_path, mixed_samples(10))
    resident, cached = recipes(made, tmp_path)
    build = [
        "--model",
        str(made.student),
        "--dataset",
        data,
        "--output_dir",
        str(tmp_path / "cache"),
        "--batch_size",
        "1",
    ]
    early = train(cached, made, data, tmp_path / "early")
    assert early.returncode == 2 and f"no teacher cache at {tmp_path / 'cache'}; write it with `grace" in early.stderr
    done = grace("teacher", "cache", cached, *build)
    assert done.returncode == 0, done.stderr
    size, seconds, total = (
        done.stdout.find(said) for said in ("predicted size: ", "predicted time from here: ", "10 samples in 1 f")
    )
    assert 0 <= size < seconds < total, done.stdout
    of_teacher = train(resident, made, data, tmp_path / "a")
    assert of_teacher.returncode == 0, of_teacher.stderr
    of_cache = train(cached, made, data, tmp_path / "b")
    assert of_cache.returncode == 0, of_cache.stderr
    assert grace("verify", str(tmp_path / "b"), "--source", str(made.student)).returncode == 0
    assert grace_plugin.verify(tmp_path / "b")["verified"]
    left, right = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b"))
    assert left == right, "each sample was run alone on both sides: the same bytes"


def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    """Killed once its first files stand; the rest is run, the files are kept, and the whole is what it would have been."""
    made, data = pair("llava", tmp_path), written(tmp_path, mixed_samples(64))
    recipe, _ = recipes(made, tmp_path)
    options = ["--model", str(made.student), "--dataset", data, "--batch_size", "1", "--shard_bytes", "100000"]
    command = [*GRACE, "teacher", "cache", recipe, *options, "--output_dir", str(tmp_path / "cache"), "--workers", "0"]
    started = subprocess.Popen(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 200
    while len(list((tmp_path / "cache").glob("*.safetensors"))) < 2 and started.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    started.send_signal(signal.SIGKILL)
    assert started.wait() == -signal.SIGKILL, "it was killed before its end"
    kept = {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    done = grace("teacher", "cache", recipe, *options, "--output_dir", str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    stored = int(re.findall(r"; (\d+) samples are there", done.stdout)[0])
    assert len(kept) >= 2 and len(kept) <= stored < 64
    assert kept <= {path.name for path in (tmp_path / "cache").glob("*.safetensors")}
    whole = grace("teacher", "cache", recipe, *options, "--output_dir", str(tmp_path / "whole"))
    assert whole.returncode == 0, whole.stderr
    left, right = (everything(tmp_path / name) for name in ("cache", "whole"))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_two_processes_read_one_cache(tmp_path: Path) -> None:
    """Two ranks of one sample each and one rank of two micro-batches of one sample end with the same loss."""
    made, data = pair("llava", tmp_path), written(tmp_path, mixed_samples(8))
    resident, cached = recipes(made, tmp_path)
    build = [
        "--model",
        str(made.student),
        "--dataset",
        data,
        "--output_dir",
        str(tmp_path / "cache"),
        "--batch_size",
        "1",
    ]
    assert grace("teacher", "cache", cached, *build).returncode == 0
    losses = []
    for ranks, recipe in ((2, cached), (1, resident)):
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            str(ranks),
            "--no_python",
        ]
        settings = ["ddp_backend=gloo", "max_steps=3", "per_device_train_batch_size=1", "learning_rate=1e-3", "use_cpu=true",
                    "disable_tqdm=true", "logging_steps=1", f"gradient_accumulation_steps={2 // ranks}"]  # fmt: skip
        options = [part for setting in settings for part in ("--set", setting)]
        given = ["--model", str(made.student), "--dataset", data, "--output_dir", str(tmp_path / f"out-{ranks}")]
        done = subprocess.run(
            [*command, *GRACE, "train", recipe, *given, *options],
            capture_output=True, text=True, timeout=300, check=False,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([float(loss) for loss in re.findall(r"'loss': '?([0-9.e+-]+)", done.stdout)])
    assert len(losses[0]) == len(losses[1]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
