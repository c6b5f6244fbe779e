"""The family table: every family trained, saved, verified, reloaded, and served by vLLM with images, token by token.

    python -m integration.families [FAMILY ...] [--serve-python PYTHON] [--json build/families.json] [--work FOLDER]

For each family a tiny student and a wider, deeper teacher are built from config; GRACE trains 40 steps on samples with one, two
and no images (and a video, where the family takes one); `train` saves and verifies (codes, scales, weights and logits bit for
bit); `verify` reads the checkpoint again from disk; vLLM answers the same samples' questions; transformers, reloaded from disk,
judges each token. The questions are the trained ones, so that the answers are learned: an untrained answer of a tiny random
model has no margin between its first two tokens, and the engines' rounding would choose. A family passes when every proof
holds, every prompt has the same tokens on both sides, and every token is the one transformers would take, but for near-ties.

vLLM's log says which kernels multiplied by INT4 weights; the table ends with their names. On a CPU for which vLLM has none,
they are those of the serving environment's plugin (`integration/env/dense_int4.py`), and everything else is vLLM's own.
Cost on two cores: about 20 s of training and 8 s of vLLM for each family.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import grace_plugin
from grace_plugin.serve.probe import Answer, Job, ProbeError, probe
from grace_plugin.vlm import family_of
from integration.parity import judge, prompts, without_colour
from tests.pairs import pair, recipe_text, run
from tests.tiny import EVERY, build, make_samples
from tests.videos import video_samples

MEAN, MOST, NEAR_TIE = 0.01, 0.08, 0.05  # nats: measured differences are a third of these, other images ten times
STEPS, RATE = 40, 5e-3
CAUSAL_ON_CPU = ("gemma3",)
"""Families whose image tokens see each other, which the CPU attention of vLLM 0.32 leaves out: it masks them causally."""
KERNEL = re.compile(r"Using (\w+) for CompressedTensorsWNA16|Using (dense INT4 experts|'?\w+'? WNA16 MoE backend)")
SERVE_PYTHON = Path(__file__).parents[1] / ".venv/serve/bin/python"
COLUMNS = (
    "family", "train", "rcka", "codes_differing", "verified", "prompts_differing", "tokens", "tokens_differing",
    "least_margin", "mean", "most", "grey", "video", "against", "served", "passed",
)  # fmt: skip


@dataclass
class FamilyResult:
    """One family. train: seconds. rcka: 1 - CKA of the last logged step. mean, most: nats between the two engines; grey:
    the mean over questions with images, when transformers is shown them in grey, which the comparison must notice; one_way,
    two_way: where vLLM's CPU attention masks image tokens causally, the mean over `greyed` questions when transformers does
    too, and when they see each other as the model asks.

    tokens_differing: tokens transformers would not have taken; margin: how far ahead its own choice was at most, nats.
    least_margin: nats from transformers' first choice to its second, the smallest of all served tokens.
    video: questions with a video asked, None for a family without. error: why a stage did not end.
    against: how transformers ran where it judged: "the model", or with what it was made to leave out, as vLLM does.
    served: "tokens equal" where every token is the one transformers would take, "N near-ties" where N of them are not but
    nearly so (see `equal`), or "failed".
    """

    family: str
    train: float = 0.0
    rcka: float | None = None
    codes: int = 0
    codes_differing: int | None = None
    verified: bool = False
    prompts_differing: int | None = None
    tokens: int = 0
    tokens_differing: int | None = None
    margin: float = 0.0
    least_margin: float | None = None
    mean: float | None = None
    most: float | None = None
    grey: float | None = None
    one_way: float | None = None
    two_way: float | None = None
    video: int | None = None
    against: str = "the model"
    seconds: float = 0.0
    served: str = "failed"
    passed: bool = False
    error: str = ""


def lessons(name: str) -> list[dict[str, Any]]:
    """Rows to train on and to ask: six single, three pairs (single where pairs cannot be served), two without, two videos."""
    family = family_of(model := build(name)[0])
    several = make_samples(3, seed=22, images=2) if family.served_images is None else make_samples(3, seed=24)
    given = make_samples(6, seed=21) + several + make_samples(2, seed=23, images=0)
    if family.takes_videos(model.config):
        answers = [
            make_samples(1, seed=60 + number)[0]["messages"][-1] for number in range(2)
        ]  # of a video's first image
        given += [
            {**video, "messages": [*video["messages"], said]}
            for video, said in zip(video_samples(2), answers, strict=True)
        ]
    return given


def questions(name: str) -> list[dict[str, Any]]:
    """Return the samples of `lessons` without their answers."""
    return prompts(lessons(name))


def greyed(name: str) -> list[dict[str, Any]]:
    """Trained questions with their images in grey: of these answers a model is unsure, and a mask shows in probabilities."""
    return (
        without_colour(prompts(make_samples(6, seed=21)))
        if name in CAUSAL_ON_CPU and not torch.cuda.is_available()
        else []
    )


def taught(name: str) -> list[dict[str, Any]]:
    """Return the samples of `lessons` as `train` takes them, videos as frames; with pairs of images in any case."""
    given = [{**one, "videos": [frames for frames, _ in one.get("videos", [])]} for one in lessons(name)]
    return given if any(len(one["images"]) > 1 for one in given) else given + make_samples(3, seed=22, images=2)


def train(result: FamilyResult, folder: Path) -> Path:
    """Train, save, verify twice (in memory, and from disk alone); fills the result and returns the checkpoint."""
    started = time.monotonic()
    made = pair(result.family, folder)
    dataset = taught(result.family)
    options = {"max_steps": STEPS, "learning_rate": RATE, "logging_steps": 1, "recipe": recipe_text(made.teacher)}
    done = run(made, folder / "out", dataset, per_device_train_batch_size=len(dataset), **options)
    result.train = round(time.monotonic() - started, 1)
    result.rcka = round([log["loss_rcka"] for log in done.history if log.get("images")][-1], 3)
    result.codes = done.verification["codes"]
    again = grace_plugin.verify(done.checkpoint)
    result.codes_differing = done.verification["codes_differing"]
    result.verified = done.verification["verified"] and again["verified"] and again["logits_equal"]
    return done.checkpoint


def serve(python: Path, jobs: dict[str, Job], kernels: set[str]) -> dict[str, list[Answer] | str]:
    """Answers of each family from one vLLM process; when that fails, one process each, and a message where it fails.

    kernels: takes the names of those that multiplied by INT4 weights.
    """
    if not jobs:
        return {}
    try:
        answers, log = probe(python, list(jobs.values()), timeout=900.0)
    except ProbeError as error:
        if len(jobs) == 1:
            return {next(iter(jobs)): str(error)}
        return {name: said for name, job in jobs.items() for name, said in serve(python, {name: job}, kernels).items()}
    kernels.update(linear or moe for linear, moe in KERNEL.findall(log))
    return dict(zip(jobs, answers, strict=True))


def compare(result: FamilyResult, checkpoint: Path, asked: list[dict[str, Any]], answers: list[Answer]) -> None:
    """Judge vLLM's tokens by transformers, reloaded from disk; fills the result."""
    more = greyed(result.family)
    causal, answers, unsure = bool(more), answers[: len(asked)], answers[len(asked) :]
    parity = judge(checkpoint, asked, answers, causal=causal)
    if causal:
        result.one_way, result.two_way = (
            round(judge(checkpoint, more, unsure, causal=c).mean, 4) for c in (True, False)
        )
    result.prompts_differing, result.tokens = parity.prompts_differing, parity.tokens
    result.tokens_differing = len(parity.margins)
    result.mean, result.most = round(parity.mean, 4), round(max(parity.differences, default=0.0), 4)
    result.margin, result.least_margin = round(max(parity.margins, default=0.0), 4), round(min(parity.leads), 4)
    seen = [i for i, question in enumerate(asked) if question["images"] or question.get("videos")]
    blind = judge(checkpoint, without_colour([asked[i] for i in seen]), [answers[i] for i in seen], causal=causal)
    result.grey = round(blind.mean, 4)
    result.video = sum(bool(question.get("videos")) for question in asked) or None
    result.passed = proved(result) and equal(result)
    if causal:
        result.against = f"causal image tokens (grey images: mean {result.one_way}, two-way {result.two_way})"
    result.served = served(result)


def proved(result: FamilyResult) -> bool:
    """Trained, saved and verified, from memory and from disk."""
    return result.verified and result.codes_differing == 0


def served(result: FamilyResult) -> str:
    """What the table says of vLLM's answers."""
    if not equal(result):
        return "failed"
    return f"{result.tokens_differing} near-ties" if result.tokens_differing else "tokens equal"


def equal(result: FamilyResult) -> bool:
    """vLLM's answers are transformers', but for near-ties, and the comparison would have noticed other images."""
    return (
        result.prompts_differing == 0 and result.tokens > 0 and result.mean is not None and result.grey is not None
        and result.mean < MEAN < result.grey and (result.most or 0.0) < MOST
        and result.margin < NEAR_TIE and (result.tokens_differing or 0) <= result.tokens // 50
    )  # fmt: skip


def table(names: list[str], python: Path, work: Path) -> tuple[list[FamilyResult], list[str]]:
    """Rows of every family named, and the kernels that vLLM named; a family that fails does not stop the others."""
    found = {name: FamilyResult(name) for name in names}
    checkpoints, asked = {}, {}
    for name, result in found.items():
        started = time.monotonic()
        try:
            checkpoints[name], asked[name] = train(result, work / name), questions(name)
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"
        result.seconds = time.monotonic() - started
        print(f"{name}: trained in {result.train} s {result.error[:200]}", flush=True)
    started = time.monotonic()
    kernels: set[str] = set()
    jobs = {name: Job(path, asked[name] + greyed(name), max_tokens=12) for name, path in checkpoints.items()}
    said = serve(python, jobs, kernels)
    shared = (time.monotonic() - started) / max(len(said), 1)
    for name, answers in said.items():
        result, started = found[name], time.monotonic()
        try:
            if isinstance(answers, str):
                raise ProbeError(answers)
            compare(result, checkpoints[name], asked[name], answers)
        except Exception as error:
            result.error = f"{type(error).__name__}: {error}"
        result.seconds = round(result.seconds + shared + time.monotonic() - started, 1)
    return list(found.values()), sorted(kernels)


def show(found: list[FamilyResult]) -> str:
    """The table as text; what failed is said below it."""
    cells = [COLUMNS, *(tuple(str(getattr(result, column)) for column in COLUMNS) for result in found)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(COLUMNS))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in cells]
    return "\n".join([*lines, *(f"{result.family}: {result.error}" for result in found if result.error)])


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description="The family table")
    parser.add_argument("families", nargs="*", choices=[*EVERY, []], default=[])
    parser.add_argument("--serve-python", type=Path, default=SERVE_PYTHON)
    parser.add_argument("--json", type=Path, default=Path("build/families.json"))
    parser.add_argument("--work", type=Path, help="keep checkpoints here")
    given = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="grace-families-") as folder:
        found, kernels = table(given.families or list(EVERY), given.serve_python, given.work or Path(folder))
    print(show(found))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    seconds = round(time.monotonic() - started, 1)
    written = {"seconds": seconds, "kernels": kernels, "families": [asdict(result) for result in found]}
    given.json.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{sum(result.passed for result in found)} of {len(found)} families passed in {seconds} s; {given.json}")
    print(f"vLLM multiplied by INT4 weights with: {', '.join(kernels) or 'no kernel it named'}")
    return 0 if all(result.passed for result in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
