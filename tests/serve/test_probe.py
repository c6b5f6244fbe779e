"""The caller's part of the offline probe: the files it writes, the answers it reads, the errors it raises."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from PIL import Image

from grace_plugin.serve.probe import Answer, Job, ProbeError, probe
from tests.tiny import make_samples

ANSWERING = """
import json, os, sys
from PIL import Image
jobs = json.load(open(sys.argv[2]))
assert os.environ["VLLM_CPU_INT4_W4A8"] == "0" and os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
print("Using ThisLinearKernel for CompressedTensorsWNA16")
answer = lambda job, one: {
    "text": " ".join(Image.open(path).mode + str(Image.open(path).size) for path in one["images"]),
    "prompt_ids": [job["max_tokens"], job["max_model_len"]], "token_ids": [5], "logprobs": [-0.25], "top": [{"5": -0.25}],
}
json.dump([[answer(job, one) for one in job["questions"]] for job in jobs], open(sys.argv[3], "w"))
"""


def interpreter(tmp_path: Path, script: str) -> Path:
    """A program that stands for the serving interpreter: it runs `script` with the probe's arguments."""
    body = tmp_path / "body.py"
    body.write_text(script)
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{body}" "$@"\n')
    program.chmod(0o755)
    return program


def test_probe__two_jobs__questions_written_and_answers_read(tmp_path: Path) -> None:
    made = make_samples(1, seed=1, images=2) + make_samples(1, seed=2, images=0)
    questions = [{"messages": sample["messages"][:1], "images": sample["images"]} for sample in made]
    questions[0]["images"][1] = Image.new("RGBA", (8, 6))
    jobs = [Job(tmp_path, questions, max_tokens=3), Job(tmp_path, questions[:1], max_model_len=64)]
    (first, second), log = probe(interpreter(tmp_path, ANSWERING), jobs, timeout=60)
    width, height = made[0]["images"][0].size
    assert first[0] == Answer(f"RGB({width}, {height}) RGB(8, 6)", [3, 512], [5], [-0.25], [{5: -0.25}])
    assert first[1].text == ""
    assert [one.prompt_ids for one in second] == [[8, 64]]
    assert "ThisLinearKernel" in log


def test_probe__process_fails__error_with_its_last_lines(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match=r"vLLM failed:(.|\n)*no such kernel"):
        probe(interpreter(tmp_path, "raise SystemExit('no such kernel')"), [Job(tmp_path, [])], timeout=60)


def test_probe__timeout__error(tmp_path: Path) -> None:
    with pytest.raises(ProbeError, match="longer than 1 s"):
        probe(interpreter(tmp_path, "import time; time.sleep(60)"), [Job(tmp_path, [])], timeout=1)
