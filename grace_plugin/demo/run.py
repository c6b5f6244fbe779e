"""`grace demo`: train, verify, score and serve the bundled pair, and print one table.

Rows are made and scored in worker processes; then the GRACE checkpoint is served by vLLM in its own environment and asked
held-out questions over the OpenAI API. Everything printed is also in `summary.json`.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from grace_plugin.demo.jobs import JOBS, Job, Result, prepare_worker, run_job
from grace_plugin.demo.table import print_summary, summarise

__all__ = ["QUESTIONS", "SERVED", "demo"]

QUESTIONS, SERVED = 8000, 300
RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "demo_llava_w4a16.yaml"


def demo(
    output_dir: Path, *, serve_python: str | None = None, questions: int | None = None, recipe: Path = RECIPE
) -> dict[str, Any]:
    """Run the demo and return its summary (also written to `output_dir/summary.json`).

    Args:
        output_dir: everything is written below it; an earlier demo there is replaced.
        serve_python: interpreter with vLLM; None leaves the serving part out and says so.
        questions: held-out questions to score (default QUESTIONS).
        recipe: the GRACE recipe of the run.

    Raises:
        ValueError: the recipe or the serving interpreter is not there; nothing was written.
        VerificationError: the checkpoint is not what was trained.
    """
    if not recipe.is_file():
        raise ValueError(f"no recipe at {recipe}; run the demo from a clone of the repository")
    if serve_python is not None and not Path(serve_python).exists():
        raise ValueError(f"no serving interpreter at {serve_python}; `make env` builds one")
    start = time.monotonic()
    console = Console()
    if not console.is_terminal:  # a log file has no width; the table needs some
        console = Console(width=120)
    for made in (*(job.name.replace(" ", "-") for job in JOBS), "logs"):
        for folder in (output_dir / made, output_dir / f"{made}.run"):
            shutil.rmtree(folder, ignore_errors=True)
    (output_dir / "logs").mkdir(parents=True)
    results = _run_jobs(output_dir, questions or QUESTIONS, recipe, console)
    trained = time.monotonic()
    served = _serve(output_dir, results["GRACE INT4"], Path(serve_python), console) if serve_python else None
    seconds = {"rows": trained - start, "serving": time.monotonic() - trained, "total": time.monotonic() - start}
    summary = summarise(results, served, seconds)
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


def _run_jobs(output_dir: Path, questions: int, recipe: Path, console: Console) -> dict[str, Result]:
    """All rows, by name; a job that fails ends the demo with its error."""
    import torch

    workers = 1 if torch.cuda.is_available() else max(1, min(len(JOBS), os.cpu_count() or 1))
    os.environ["OMP_NUM_THREADS"] = threads = str(max(1, (os.cpu_count() or 1) // workers))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        board = manager.dict()
        setup = (str(output_dir / "logs"), questions, int(threads), board)
        with ProcessPoolExecutor(workers, context, prepare_worker, setup) as pool, _bars(console) as bars:
            futures = {job: pool.submit(run_job, job, str(output_dir), str(recipe)) for job in JOBS}
            try:
                _follow(futures, board, bars)
                return {job.name: future.result() for job, future in futures.items()}
            finally:
                pool.shutdown(cancel_futures=True)


def _follow(futures: dict[Job, Future[Result]], board: Any, bars: Progress) -> None:
    """Show each job's progress until all are done or one has failed."""
    tasks: dict[str, Any] = {}
    while True:
        posted = dict(board)
        for job, future in futures.items():
            if job.name in posted and job.name not in tasks:
                tasks[job.name] = bars.add_task(job.name, total=1.0)
            if job.name in tasks:
                done, total = posted[job.name]
                bars.update(tasks[job.name], completed=1.0 if future.done() else min(0.99, done / total))
                if future.done():
                    bars.stop_task(tasks[job.name])
        if all(f.done() for f in futures.values()) or any(f.done() and f.exception() for f in futures.values()):
            return
        time.sleep(0.2)


def _serve(output_dir: Path, grace: Result, python: Path, console: Console) -> dict[str, Any]:
    """Ask the served checkpoint the first SERVED held-out questions, and look at every answer that differs.

    vLLM computes in the dtype that the rows were scored in: the stored one, or float32 where bfloat16 is slow.
    """
    from grace_plugin.demo.methods import multiplies_bfloat16, scored_model
    from grace_plugin.demo.scenes import heldout_rows
    from grace_plugin.demo.score import LONGEST_ANSWER, answer_margins, encode_questions, is_right
    from grace_plugin.serve.ask import ask_all
    from grace_plugin.serve.launch import serve

    os.environ.pop("OMP_NUM_THREADS", None)
    rows = list(heldout_rows(min(SERVED, len(grace.answers))))
    checkpoint = output_dir / grace.job.name.replace(" ", "-")
    asked = [{"messages": row["messages"][:-1], "images": row["images"]} for row in rows]
    dtype = "auto" if multiplies_bfloat16() else "float32"
    with (
        console.status("starting vllm serve"),
        serve(checkpoint, python, log=output_dir / "logs" / "vllm.log", arguments=("--dtype", dtype)) as server,
    ):
        begun = time.monotonic()
        answers = ask_all(server.url, server.model, asked, max_tokens=LONGEST_ANSWER, workers=16)
        seconds = time.monotonic() - begun
    texts = [answer.text.strip() for answer in answers]
    differing = [i for i, text in enumerate(texts) if text != grace.answers[i]]
    margins: list[float] = []
    if differing:
        from transformers import AutoProcessor

        processor = AutoProcessor.from_pretrained(checkpoint)
        encoded = [encode_questions(processor, [rows[number]])[0] for number in differing]
        model = scored_model(checkpoint, encoded[0])
        margins = [answer_margins(model, one.inputs)[0] for one in encoded]
    return {
        "asked": len(rows),
        "equal": len(rows) - len(differing),
        "correct": sum(is_right(row, text) for row, text in zip(rows, texts, strict=True)),
        "correct_transformers": sum(grace.right[: len(rows)]),
        "kernel": server.kernel,
        "dtype": dtype,
        "start_seconds": server.seconds,
        "ask_seconds": seconds,
        "differing": [
            {"id": rows[i]["id"], "vllm": texts[i], "transformers": grace.answers[i], "margin_nats": margin}
            for i, margin in zip(differing, margins, strict=True)
        ],
    }
