"""Train, verify, score and serve the bundled models and print one table (`grace demo`, `make demo`).

The models of all methods are made and scored in worker processes. As soon as the GRACE checkpoint exists, vLLM serves it at
the same time in its own environment and answers held-out questions over the OpenAI API. Everything printed is also in
`summary.json`.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from examples.bundled_demo.jobs import SHARED, Job, Result, count_all, jobs_of, prepare_worker, run_job
from examples.bundled_demo.table import print_summary, summarise

__all__ = ["QUESTIONS", "SERVED", "demo"]

QUESTIONS, SERVED = 8000, 300
SERVING, SCENES = "vllm serve", "scenes of training and test"
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo_llava_w4a16.yaml"


def demo(
    output_dir: Path,
    *,
    serve_python: str | None = None,
    questions: int | None = None,
    low_bits: Sequence[int] = (2,),
    recipe: Path = RECIPE,
) -> dict[str, Any]:
    """Run the demo and return its summary (also written to `output_dir/summary.json`).

    Args:
        output_dir: folder of all output; an earlier demo there is replaced.
        serve_python: interpreter with vLLM; None skips serving, which the output says.
        questions: held-out questions to score (default QUESTIONS).
        low_bits: numbers of bits of GRACE and round-to-nearest in addition to 4.
        recipe: the GRACE recipe of the run.

    Raises:
        ValueError: the recipe or the serving interpreter does not exist (nothing was written), or two of training, test and
            the models' training share a composition.
        VerificationError: the checkpoint is not what was trained.
    """
    if not recipe.is_file():
        raise ValueError(f"no recipe at {recipe}; run the demo from a clone of the repository")
    if serve_python is not None and not Path(serve_python).exists():
        raise ValueError(f"no serving interpreter at {serve_python}; `make env` builds one")
    start = time.monotonic()
    console = Console(markup=False)
    if not console.is_terminal:  # a log file has no width; the table needs some
        console = Console(width=120, markup=False)
    jobs = jobs_of(low_bits)
    for made in (*(job.name.replace(" ", "-") for job in jobs), "logs", SHARED):
        for folder in (output_dir / made, output_dir / f"{made}.run"):
            shutil.rmtree(folder, ignore_errors=True)
    (output_dir / "logs").mkdir(parents=True)
    python = Path(serve_python) if serve_python is not None else None
    try:
        results, served, shown = _run_jobs(jobs, output_dir, questions or QUESTIONS, recipe, python, console)
    finally:
        shutil.rmtree(output_dir / SHARED, ignore_errors=True)
    seconds = {"serving": served["seconds"] if served else 0.0, "total": time.monotonic() - start}
    summary = summarise(results, served, seconds) | {"compositions_shown": shown}
    (output_dir / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print_summary(summary, console)
    console.print(f"summary: {output_dir / 'summary.json'}")
    return summary


def _bars(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description:24}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _run_jobs(
    jobs: Sequence[Job], output_dir: Path, questions: int, recipe: Path, python: Path | None, console: Console
) -> tuple[dict[str, Result], dict[str, Any] | None, dict[str, int]]:
    """Return all results by name, vLLM's answers, and the numbers of compositions; a job that fails ends the demo."""
    import torch

    workers = 1 if torch.cuda.is_available() else max(1, min(len(jobs), os.cpu_count() or 1))
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    # Forked workers need not import torch again. CUDA does not survive a fork, so with a GPU they are spawned.
    forked = sys.platform == "linux" and not torch.cuda.is_available()
    context = multiprocessing.get_context("fork" if forked else "spawn")
    with context.Manager() as manager:
        board = manager.dict()
        setup = (str(output_dir / "logs"), questions, int(threads), board)
        with (
            ProcessPoolExecutor(workers, context, prepare_worker, setup) as pool,
            ThreadPoolExecutor(1) as server,
        ):
            with _environment(OMP_NUM_THREADS=threads):  # of the workers, which start here, before any thread
                futures = {job.name: pool.submit(run_job, job, str(output_dir), str(recipe)) for job in jobs}
                counted = pool.submit(count_all, questions)
            waited: dict[str, Future[Any]] = {**futures, SCENES: counted}
            if python is not None:
                waited[SERVING] = server.submit(_serve, output_dir, futures["GRACE INT4"], python, board)
            try:
                with _bars(console) as bars:
                    _follow(waited, board, bars)
                results = {name: future.result() for name, future in futures.items()}
                served = waited[SERVING].result() if python is not None else None
                return results, served, counted.result()
            finally:
                pool.shutdown(cancel_futures=True)


def _follow(futures: dict[str, Future[Any]], board: Any, bars: Progress) -> None:
    """Show the progress of each job until all are done or one has failed."""
    tasks: dict[str, Any] = {}
    while True:
        posted = dict(board)
        for name, future in futures.items():
            if name in posted and name not in tasks:
                tasks[name] = bars.add_task(name, total=1.0)
            if name in tasks:
                done, total = posted[name]
                bars.update(tasks[name], completed=1.0 if future.done() else min(0.99, done / total))
                if future.done():
                    bars.stop_task(tasks[name])
        if all(f.done() for f in futures.values()) or any(f.done() and f.exception() for f in futures.values()):
            return
        time.sleep(0.2)


def _serve(output_dir: Path, made: Future[Result], python: Path, board: Any) -> dict[str, Any]:
    """Wait for the checkpoint, ask it the first SERVED held-out questions, and inspect every answer that differs.

    transformers answers them too, in the dtype that vLLM computes in. board: receives the progress.
    """
    from transformers import AutoProcessor

    from examples.bundled_demo.methods import scored_model, serving_dtype
    from examples.bundled_demo.scenes import heldout_samples
    from examples.bundled_demo.score import LONGEST_ANSWER, answer_margins, encode_questions, greedy_answers, is_right
    from grace_plugin.serve.ask import ask_all
    from grace_plugin.serve.launch import serve

    grace = made.result()
    board[SERVING] = (0, 1)
    begun = time.monotonic()
    samples = list(heldout_samples(min(SERVED, len(grace.answers))))
    checkpoint = output_dir / grace.job.name.replace(" ", "-")
    asked = [{"messages": sample["messages"][:-1], "images": sample["images"]} for sample in samples]
    dtype = serving_dtype()
    answered = itertools.count(1)

    def on_answer() -> None:
        board[SERVING] = (next(answered) + len(asked), 2 * len(asked))  # starting takes about as long as answering

    with serve(checkpoint, python, log=output_dir / "logs" / "vllm.log", arguments=("--dtype", dtype)) as server:
        started = time.monotonic()
        answers = ask_all(server.url, server.model, asked, max_tokens=LONGEST_ANSWER, workers=16, on_answer=on_answer)
        seconds = time.monotonic() - started
    texts = [answer.text.strip() for answer in answers]
    processor = AutoProcessor.from_pretrained(checkpoint)
    encoded = encode_questions(processor, samples)
    model = scored_model(checkpoint, encoded[0], wide=dtype == "float32")
    mine = greedy_answers(model, processor, encoded)
    differing = [i for i, text in enumerate(texts) if text != mine[i]]
    # in float32: bfloat16 knows a logit between 8 and 16 to 0.0625 nats, too coarse to tell a near-tie
    exact = scored_model(checkpoint, encoded[0], wide=True) if differing else model
    margins = [answer_margins(exact, encode_questions(processor, [samples[i]])[0].inputs)[0] for i in differing]
    return {
        "asked": len(samples),
        "equal": len(samples) - len(differing),
        "correct": sum(is_right(sample, text) for sample, text in zip(samples, texts, strict=True)),
        "correct_transformers": sum(is_right(sample, text) for sample, text in zip(samples, mine, strict=True)),
        "kernel": server.kernel,
        "dtype": dtype,
        "start_seconds": server.seconds,
        "ask_seconds": seconds,
        "seconds": time.monotonic() - begun,
        "differing": [
            {"id": samples[i]["id"], "vllm": texts[i], "transformers": mine[i], "margin_nats": margin}
            for i, margin in zip(differing, margins, strict=True)
        ],
    }
