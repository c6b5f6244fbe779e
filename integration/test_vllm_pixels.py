"""Both environments make the same pixels of the same image.

vLLM prepares images with the checkpoint's own processor, built by transformers in ITS environment. transformers chooses the
backend by what is installed: torchvision where it is (both environments have it), else PIL for LLaVA, whose bicubic differs.
So equality rests on three things: torchvision on both sides, equal torch and transformers versions, and PNG on the way. The
backends' difference is shown too, or the first test would prove nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from tests.tiny import FAMILIES, build, make_samples, save

pytestmark = pytest.mark.vllm

SCRIPT = """
import hashlib, json, sys
import torch, transformers
from PIL import Image
out = {}
for family, folder in json.loads(sys.argv[1]).items():
    processor = transformers.AutoProcessor.from_pretrained(folder).image_processor
    images = [Image.open(path) for path in sys.argv[2:]]
    pixels = [processor(images=[image], return_tensors="pt")["pixel_values"] for image in images]
    digest = [hashlib.sha256(p.float().contiguous().numpy().tobytes()).hexdigest() for p in pixels]
    out[family] = {"class": type(processor).__name__, "backend": getattr(processor, "backend", None), "digest": digest}
print(json.dumps(out))
"""


def pixels_by(python: str | Path, folders: dict[str, str], images: list[str]) -> dict[str, Any]:
    """What an interpreter's processors make of the images: class, backend and a digest of the pixel values."""
    line = [str(python), "-c", SCRIPT, json.dumps(folders), *images]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_pixels__training_and_serving_environment__equal(serve_python: Path, tmp_path: Path) -> None:
    folders = {family: str(save(*build(family), tmp_path / family)) for family in FAMILIES}
    images = []
    for number, sample in enumerate(make_samples(5, seed=41)):
        images.append(str(tmp_path / f"{number}.png"))
        sample["images"][0].save(images[-1])
    here, there = (pixels_by(python, folders, images) for python in (sys.executable, serve_python))
    assert here == there
    assert len({digest for family in here.values() for digest in family["digest"]}) == len(FAMILIES) * len(images)


def test_pixels__torchvision_and_pil__differ(tmp_path: Path) -> None:
    folder = save(*build("llava"), tmp_path)
    images = make_samples(1, seed=42)[0]["images"]
    made = [
        AutoProcessor.from_pretrained(folder, backend=backend).image_processor(images=images, return_tensors="pt")
        for backend in ("torchvision", "pil")
    ]
    first, second = (torch.as_tensor(one["pixel_values"]) for one in made)
    assert first.shape == second.shape
    assert 0 < (first - second).abs().max() < 1
