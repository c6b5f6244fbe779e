"""Tiny checkpoints served by vLLM on a GPU, token by token against transformers' answers recorded beforehand.

    python -m integration.serve_cuda make FOLDER [FAMILY ...]                    # training environment, CPU or GPU
    python -m integration.serve_cuda serve FOLDER --serve-python PYTHON [--serve-path SITE] --json OUT.json

`make` trains each family with GRACE as the family table does, keeps the verified checkpoint (some megabytes), the questions
(PNG and NPY files) and what transformers says to them in BF16: its greedy tokens, their log-probabilities and the 20 best at
each step.
`serve` runs in the training environment too and starts the serving interpreter once for each family (`--serve-path` is put on
its PYTHONPATH), so that a crash of one leaves the others. Compared are the prompts' ids, and the tokens up to and including the
first at which the engines part (behind it they read different text): |log p_vLLM - log p_transformers| of vLLM's tokens, and
how far ahead transformers' own choice was. Bounds are those of the family table (`integration/families.py`).
The exit status is 1 when a family fails; the JSON holds every family, with the message of one that did not end.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoProcessor

from grace_plugin.export.verify import load
from grace_plugin.serve.launch import kernel_of
from grace_plugin.serve.probe import Answer, Job, ProbeError, probe
from integration.families import MEAN, MOST, NEAR_TIE, FamilyResult, questions, train
from integration.parity import judge, without_colour
from tests.tiny import EVERY
from tests.videos import media_of

FAMILIES = ("qwen3_vl_moe", "gemma3", "llava", "qwen3_vl")
TOKENS, TOP = 12, 20
ENGINE = {"kernel_config": {"enable_flashinfer_autotune": False}, "gpu_memory_utilization": 0.15}
ENVIRONMENT = {"VLLM_USE_FLASHINFER_SAMPLER": "0", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def answer(model: Any, processor: Any, question: dict[str, Any]) -> dict[str, Any]:
    """Greedy answer of transformers: prompt_ids, token_ids, logprobs [nats], top ([{id: nats}] of the best 20)."""
    text = processor.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
    batch = dict(processor(text=[text], **media_of(question), return_tensors="pt").to(model.device))
    said: dict[str, Any] = {"prompt_ids": batch["input_ids"][0].tolist(), "token_ids": [], "logprobs": [], "top": []}
    stop = model.generation_config.eos_token_id
    head = model.get_output_embeddings()
    while len(said["token_ids"]) < TOKENS and (not said["token_ids"] or said["token_ids"][-1] != stop):
        states: list[torch.Tensor] = []
        with torch.no_grad(), head.register_forward_pre_hook(lambda _, args, kept=states: kept.append(args[0])):
            model(**batch)
            logp = functional.linear(states[0][0, -1].float(), head.weight.float()).log_softmax(-1)
        best = logp.topk(TOP)
        said["token_ids"].append(int(best.indices[0]))
        said["logprobs"].append(float(best.values[0]))
        said["top"].append(dict(zip(map(str, best.indices.tolist()), best.values.tolist(), strict=True)))
        batch["input_ids"] = torch.cat([batch["input_ids"], best.indices[:1][None]], 1)
        batch["attention_mask"] = torch.ones_like(batch["input_ids"])
        for key in {"mm_token_type_ids", "token_type_ids"} & batch.keys():
            batch[key] = torch.cat([batch[key], torch.zeros_like(batch[key][:, :1])], 1)
    return said


def keep(folder: Path, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write pictures and videos as files; returns the questions with their names in place."""
    folder.mkdir(parents=True, exist_ok=True)
    kept = []
    for k, question in enumerate(asked):
        images, videos = [], []
        for i, image in enumerate(question["images"]):
            image.convert("RGB").save(folder / f"{k}-{i}.png")
            images.append(f"{k}-{i}.png")
        for i, (frames, metadata) in enumerate(question.get("videos", ())):
            np.save(folder / f"{k}-{i}.npy", frames)
            videos.append([f"{k}-{i}.npy", metadata])
        kept.append({"messages": question["messages"], "images": images, "videos": videos})
    return kept


def opened(folder: Path, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The questions of `keep`, with pictures and frames read."""
    return [
        {
            "messages": question["messages"],
            "images": [Image.open(folder / name).convert("RGB") for name in question["images"]],
            "videos": [(np.load(folder / name), metadata) for name, metadata in question["videos"]],
        }
        for question in kept
    ]


def record(name: str, checkpoint: Path, folder: Path, proved: dict[str, Any]) -> float:
    """Move a checkpoint to `folder`/`name` and put beside it the family's questions and what transformers says to them.

    Returns the mean distance of log-probabilities with grey pictures, nats. proved: what verification said, kept beside.
    """
    (folder / name).mkdir(parents=True, exist_ok=True)
    checkpoint = checkpoint.rename(folder / name / "checkpoint")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load(checkpoint).to(device)
    processor = AutoProcessor.from_pretrained(checkpoint)
    asked = questions(name)
    said = [answer(model, processor, question) for question in asked]
    seen = [k for k, question in enumerate(asked) if question["images"] or question.get("videos")]
    recorded = [Answer("", one["prompt_ids"], one["token_ids"], one["logprobs"]) for one in said]
    blind = judge(checkpoint, without_colour([asked[k] for k in seen]), [recorded[k] for k in seen], device=device)
    found = {"questions": keep(folder / name / "media", asked), "answers": said, "grey": blind.mean, **proved}
    (folder / name / "recorded.json").write_text(json.dumps(found) + "\n")
    return blind.mean


def make(name: str, folder: Path, work: Path) -> None:
    """Train one family and record what transformers says of it under `folder`/`name`."""
    row = FamilyResult(name)
    checkpoint = train(row, work / name)
    proved = {"verified": row.verified, "codes": row.codes, "codes_differing": row.codes_differing}
    grey = record(name, checkpoint, folder, proved)
    print(f"{name}: {row.codes} codes, mean with grey pictures {grey:.3f} nats", flush=True)


def compare(said: list[dict[str, Any]], served: list[Answer]) -> dict[str, Any]:
    """Prompts and tokens of both engines side by side, as the module says; nats."""
    differences: list[float] = []
    margins: list[float] = []
    prompts, whole = 0, 0
    for mine, theirs in zip(said, served, strict=True):
        prompts += mine["prompt_ids"] != theirs.prompt_ids
        whole += mine["token_ids"] == theirs.token_ids
        for step, token in enumerate(theirs.token_ids[: len(mine["token_ids"])]):
            best = mine["top"][step]
            differences.append(abs(theirs.logprobs[step] - best.get(str(token), min(best.values()))))
            if token != mine["token_ids"][step]:
                margins.append(mine["logprobs"][step] - best.get(str(token), float("-inf")))
                break
    return {
        "prompts": len(said), "prompts_differing": prompts, "answers_equal": whole, "tokens": len(differences),
        "tokens_differing": len(margins), "margin": max(margins, default=0.0),
        "mean": sum(differences) / max(len(differences), 1), "most": max(differences, default=0.0),
    }  # fmt: skip


def serve(name: str, folder: Path, python: Path) -> dict[str, Any]:
    """One family in vLLM: its figures, the kernel lines of vLLM's log, and whether it passes."""
    recorded = json.loads((folder / name / "recorded.json").read_text())
    asked = opened(folder / name / "media", recorded["questions"])
    job = Job(folder / name / "checkpoint", asked, max_tokens=TOKENS, top=TOP, engine=ENGINE)
    try:
        (served,), log = probe(python, [job], timeout=540.0)
    except ProbeError as error:
        return {"family": name, "passed": False, "error": str(error)}
    found = {"family": name, **compare(recorded["answers"], served), "grey": recorded["grey"], "kernel": kernel_of(log)}
    found["log"] = [line for line in log.splitlines() if "WNA16" in line or "backend" in line.lower()][:12]
    found["passed"] = bool(
        recorded["verified"] and recorded["codes_differing"] == 0 and found["prompts_differing"] == 0
        and found["tokens"] > 0 and found["mean"] < MEAN < found["grey"] and found["most"] < MOST
        and found["margin"] < NEAR_TIE and found["tokens_differing"] <= max(1, found["tokens"] // 50)
    )  # fmt: skip
    return found


def main() -> int:
    """Command line; see the module."""
    parser = argparse.ArgumentParser(description="Tiny checkpoints in vLLM on a GPU")
    parser.add_argument("stage", choices=["make", "serve"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("families", nargs="*", choices=[*EVERY, []], default=[])
    parser.add_argument("--serve-python", type=Path)
    parser.add_argument("--serve-path", help="put on PYTHONPATH of the serving interpreter, in place of this one's")
    parser.add_argument("--json", type=Path, default=Path("build/serve_cuda.json"))
    given = parser.parse_args()
    names = given.families or [n for n in FAMILIES if given.stage == "make" or (given.folder / n).is_dir()]
    if given.stage == "make":
        import tempfile

        with tempfile.TemporaryDirectory(prefix="grace-serve-", dir=given.folder.parent) as work:
            for name in names:
                make(name, given.folder, Path(work))
        return 0
    if given.serve_python is None or not names:
        parser.error("serve needs --serve-python and a folder that `make` has filled")
    os.environ.update(ENVIRONMENT)
    if given.serve_path is not None:
        os.environ["PYTHONPATH"] = given.serve_path
    found = []
    for name in names:
        found.append(serve(name, given.folder, given.serve_python))
        print(json.dumps(found[-1], indent=1), flush=True)
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"families": found}, indent=1) + "\n")
    for row in found:
        print(f"{row['family']}: {'passed' if row['passed'] else 'FAILED'} {row.get('error', '')[-300:]}")
    return 0 if all(row["passed"] for row in found) else 1


if __name__ == "__main__":
    raise SystemExit(main())
