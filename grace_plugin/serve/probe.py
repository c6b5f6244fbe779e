"""Tokens and log-probabilities of checkpoints in vLLM, offline: a script for the serving interpreter, and its caller.

    answers, log = probe(python, [Job("out/model", [{"messages": ..., "images": [...]}])])

The caller writes the questions to a temporary folder and runs this file with the serving interpreter, which answers for one
checkpoint after the other: importing vLLM takes about 10 s, each small checkpoint 5 s on a CPU. Decoding is greedy. Two kernels
round differently, so compare with transformers on log-probabilities as well as on tokens: near-ties flip.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy


class ProbeError(RuntimeError):
    """The serving interpreter failed; the message ends with the tail of its output."""


@dataclass(frozen=True)
class Job:
    """Questions to one checkpoint.

    questions: {"messages": [...], "images": [PIL, ...]} each, or "videos" in place of images: (frames uint8 [T, H, W, 3],
    metadata) each, as vLLM takes them. top: alternatives per token. engine: arguments of vLLM's `LLM`, over those set here.
    """

    checkpoint: str | Path
    questions: Sequence[Mapping[str, Any]]
    max_tokens: int = 8
    top: int = 5
    max_model_len: int = 512
    engine: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """A greedy answer of vLLM.

    prompt_ids: the prompt, with one id per image token. token_ids: the generated tokens, with the end token where vLLM reports
    it. logprobs: of each of these, in nats. top: per token, {token id: nats}.
    """

    text: str
    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]] = field(default_factory=list)


def probe(python: str | Path, jobs: Sequence[Job], *, timeout: float = 600.0) -> tuple[list[list[Answer]], str]:
    """Run every job in one process of the interpreter `python`.

    Returns:
        The answers, by job and question, and vLLM's log.

    Raises:
        ProbeError: that process fails or takes longer than `timeout` seconds.
    """
    from grace_plugin.serve.launch import serving_environment

    with tempfile.TemporaryDirectory(prefix="grace-probe-") as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps([_written(job, folder, k) for k, job in enumerate(jobs)]))
        line = [str(python), str(Path(__file__).resolve()), str(folder / "jobs.json"), str(folder / "answers.json")]
        # In one process, or vLLM's own engine process outlives a timeout.
        environment = serving_environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        try:
            done = subprocess.run(
                line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, timeout=timeout
            )
        except subprocess.TimeoutExpired as error:
            raise ProbeError(f"vLLM took longer than {timeout:.0f} s") from error
        if done.returncode:
            raise ProbeError("vLLM failed:\n" + "\n".join(done.stdout.splitlines()[-25:]))
        return [[_answer(one) for one in job] for job in json.loads((folder / "answers.json").read_text())], done.stdout


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


def _answer(one: dict[str, Any]) -> Answer:
    return Answer(**one | {"top": [{int(token): value for token, value in step.items()} for step in one["top"]]})


def _main(jobs: str, answers: str) -> None:  # pragma: no cover - runs in the serving interpreter
    out = [_run(job) for job in json.loads(Path(jobs).read_text())]
    Path(answers).write_text(json.dumps(out))


def _run(job: dict[str, Any]) -> list[dict[str, Any]]:  # pragma: no cover - runs in the serving interpreter
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    most = {kind: max((len(q[f"{kind}s"]) for q in job["questions"]), default=0) for kind in ("image", "video")}
    defaults = {
        "max_model_len": job["max_model_len"],
        "max_num_seqs": 8,
        "enforce_eager": True,
        "skip_mm_profiling": True,
        "limit_mm_per_prompt": {kind: number for kind, number in most.items() if number or kind == "image"},
    }
    engine = LLM(model=job["checkpoint"], max_logprobs=max(job["top"], 1), **defaults | job["engine"])
    greedy = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], logprobs=job["top"])
    chats = [_chat(question) for question in job["questions"] if not question["videos"]]
    # not through `chat`, which takes no frames of a video, only its file
    prompts = [_with_videos(question, engine.get_tokenizer()) for question in job["questions"] if question["videos"]]
    of_chats = iter(engine.chat(chats, greedy, use_tqdm=False) if chats else [])
    of_videos = iter(engine.generate(prompts, greedy, use_tqdm=False) if prompts else [])
    answers = []
    for one in [next(of_videos if question["videos"] else of_chats) for question in job["questions"]]:
        said = one.outputs[0]
        top = [{token: value.logprob for token, value in step.items()} for step in said.logprobs]
        ids = list(said.token_ids)
        logprobs = [step[token] for step, token in zip(top, ids, strict=True)]
        answer = Answer(said.text, list(one.prompt_token_ids), ids, logprobs, top)
        answers.append(asdict(answer))
    # or the next engine of this process finds the memory of this one taken
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


def _with_videos(question: dict[str, Any], tokenizer: Any) -> dict[str, Any]:  # pragma: no cover - serving interpreter
    text = tokenizer.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
    videos = [(numpy.load(path), metadata) for path, metadata in question["videos"]]
    return {"prompt": text, "multi_modal_data": {"video": videos}}


if __name__ == "__main__":  # pragma: no cover - runs in the serving interpreter
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    _main(sys.argv[1], sys.argv[2])
