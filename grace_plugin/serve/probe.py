"""Tokens and log-probabilities of checkpoints in vLLM, offline: a script for the serving interpreter and its caller.

    answers = probe(python, [Job("out/model", [{"messages": ..., "images": [...]}])])

The caller writes the questions (pictures as PNG files) into a temporary folder and runs this file with the serving
interpreter; that process loads one checkpoint after the other in one vLLM import, which is most of the time: about 10 s
for the import and 5 s for each small checkpoint on CPU. Decoding is greedy. Compare with transformers on
log-probabilities as well as on tokens: two kernels round differently, and where the best two tokens are nearly equal
the choice may differ.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy


class ProbeError(RuntimeError):
    """The serving interpreter failed; the message ends with the tail of its output."""


@dataclass(frozen=True)
class Job:
    """Questions to one checkpoint: {"messages": [...], "images": [PIL, ...]} each. top: alternatives per token.

    engine: arguments of vLLM's `LLM`, over those set here.
    A question may hold "videos" in place of images: (frames uint8 [T, H, W, 3], metadata) each, as vLLM takes them.
    """

    checkpoint: str | Path
    questions: Sequence[Mapping[str, Any]]
    max_tokens: int = 8
    top: int = 5
    max_model_len: int = 512
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Probed:
    """What vLLM said. prompt_ids: image places unfolded. logprobs: of each generated token, in nats. top: {id: nats}."""

    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]] = field(default_factory=list)


def probe(python: str | Path, jobs: Sequence[Job], *, timeout: float = 600.0) -> tuple[list[list[Probed]], str]:
    """Run every job in one process of the interpreter `python`: ([per job [per question]], vLLM's log).

    Raises ProbeError when that process fails or takes longer than `timeout` seconds.
    """
    from grace_plugin.serve.launch import serving_environment

    with tempfile.TemporaryDirectory(prefix="grace-probe-") as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps([_written(job, folder, k) for k, job in enumerate(jobs)]))
        line = [str(python), str(Path(__file__).resolve()), str(folder / "jobs.json"), str(folder / "answers.json")]
        environment = serving_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        try:
            done = subprocess.run(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(f"vLLM took longer than {timeout:.0f} s") from error
        if done.returncode:
            raise ProbeError("vLLM failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))
        return [[_probed(one) for one in job] for job in json.loads((folder / "answers.json").read_text())], done.stdout


def _written(job: Job, folder: Path, number: int) -> dict[str, Any]:
    questions = []
    for k, question in enumerate(job.questions):
        paths = []
        for i, image in enumerate(question.get("images", ())):
            paths.append(str(folder / f"{number}-{k}-{i}.png"))
            image.convert("RGB").save(paths[-1])
        videos = []
        for i, (frames, metadata) in enumerate(question.get("videos", ())):
            path = str(folder / f"{number}-{k}-{i}.npy")
            numpy.save(path, frames)
            videos.append([path, dict(metadata)])
        questions.append({"messages": question["messages"], "images": paths, "videos": videos})
    return {
        "checkpoint": str(Path(job.checkpoint).resolve()),
        "questions": questions,
        "max_tokens": job.max_tokens,
        "top": job.top,
        "max_model_len": job.max_model_len,
        "engine": dict(job.engine),
    }


def _probed(one: dict[str, Any]) -> Probed:
    return Probed(**one | {"top": [{int(token): value for token, value in step.items()} for step in one["top"]]})


def _main(jobs: str, answers: str) -> None:  # pragma: no cover - runs in the serving interpreter
    out = [_run(job) for job in json.loads(Path(jobs).read_text())]
    Path(answers).write_text(json.dumps(out))


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:  # pragma: no cover - runs in the serving interpreter
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    most = {kind: max((len(q[f"{kind}s"]) for q in job["questions"]), default=0) for kind in ("image", "video")}
    defaults = {
        "max_model_len": job["max_model_len"], "max_num_seqs": 8, "enforce_eager": True, "skip_mm_profiling": True,
        "limit_mm_per_prompt": {kind: number for kind, number in most.items() if number or kind == "image"},
    }  # fmt: skip
    engine = LLM(model=job["checkpoint"], max_logprobs=max(job["top"], 1), **defaults | job["engine"])
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], logprobs=job["top"])
    pictured = [question for question in job["questions"] if not question["videos"]]
    filmed = [_filmed(question, engine.get_tokenizer()) for question in job["questions"] if question["videos"]]
    done = engine.chat([_chat(question) for question in pictured], greedy, use_tqdm=False) if pictured else []
    films = iter(engine.generate(filmed, greedy, use_tqdm=False) if filmed else [])
    shots = iter(done)
    answers = []
    for one in [next(films if question["videos"] else shots) for question in job["questions"]]:
        said = one.outputs[0]
        top = [{token: value.logprob for token, value in step.items()} for step in said.logprobs]
        ids = list(said.token_ids)
        answers.append({
            "text": said.text, "prompt_ids": list(one.prompt_token_ids), "token_ids": ids,
            "logprobs": [step[token] for step, token in zip(top, ids, strict=True)], "top": top,
        })  # fmt: skip
    del engine
    cleanup_dist_env_and_memory()
    return answers


def _chat(question: dict[str, Any]) -> list[dict[str, Any]]:  # pragma: no cover - runs in the serving interpreter
    from PIL import Image

    images = iter(question["images"])

    def part(one: dict[str, Any]) -> dict[str, Any]:
        return {"type": "image_pil", "image_pil": Image.open(next(images))} if one.get("type") == "image" else one

    return [
        turn if isinstance(turn["content"], str) else turn | {"content": [part(one) for one in turn["content"]]}
        for turn in question["messages"]
    ]


def _filmed(question: dict[str, Any], tokenizer: Any) -> dict[str, Any]:  # pragma: no cover - serving interpreter
    text = tokenizer.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
    videos = [(numpy.load(path), metadata) for path, metadata in question["videos"]]
    return {"prompt": text, "multi_modal_data": {"video": videos}}


if __name__ == "__main__":  # pragma: no cover - runs in the serving interpreter
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    _main(sys.argv[1], sys.argv[2])
