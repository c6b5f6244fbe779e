"""Rebuild the bundled teacher and student in about 25 minutes on one core.

    python -m examples.bundled_demo.build [--emoji FOLDER] [--out FOLDER]

1. Emoji: `npm pack emoji-datasource-google@16` (or --emoji, its folder img/google/64), scaled to 32 x 32.
2. Vision: tower, projector and word table learn to name each visual token's kind, row and column; then the tower is frozen.
3. Teacher: answers packed questions, easy types first.
4. Student: the same frozen tower, its own projector and words, a decoder with a quarter of the weights, fewer questions, and
   none of the types `another`, `sharing_line` and `category_beside`: the demo trains it for these.

From an ordinary start, attention from a name to its place forms late or never. Three measures in this file make it form early:
visual tokens are named first (2), queries and keys start equal in half of the heads, and in the first steps the first answer
token is also a target one position early. Everything is seeded; another CPU rounds differently and gives other weights.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch.nn.utils import clip_grad_norm_
from transformers import LlavaForConditionalGeneration

from .images import ASSETS, CODE_POINTS
from .models import make_config, save_model
from .packing import Packed, accuracy, answer_loss, naming_loss, pack, visual_features
from .questions import MIXTURE
from .scenes import HELDOUT_SEED

NAMED_IMAGES = 64  # of a batch of stage 2
PACKAGE = "emoji-datasource-google@16"
EASY = ("locate", "cell", "list_row", "list_column", "some_of_category", "some_in_line")
RELATIONS = (
    *("cell", "list_row", "list_column", "some_of_category", "some_in_line", "some_of_category_in_line"),
    *("beside",) * 4,
    *("locate",) * 3,
    *("most",) * 3,
    *("some_beside",) * 3,
    *("tally",) * 2,
    *("tally_in_line",) * 2,
)
LICENCE = (
    "The images in this folder are from the Noto Emoji set, (c) Google, Apache License 2.0, taken from the npm package\n"
    f"{PACKAGE} (images of 64 x 64 pixels) and scaled to 32 x 32.\n"
)


@dataclass(frozen=True)
class Plan:
    """The training of one model.

    lr: peak of a cosine after `warmup` steps. easy, relations: step until which only EASY, then only RELATIONS are asked;
    MIXTURE afterwards. early: step until which the first answer token is also a target one position early. naming: step until
    which the naming loss is added, with a weight that falls from 0.1.
    """

    width: int
    layers: int
    inner: int
    head: int
    seed: int
    naming_steps: int
    steps: int
    lr: float
    easy: int
    relations: int
    early: int
    naming: int
    warmup: int = 100
    images: int = 32
    questions: int = 6

    @property
    def naming_seed(self) -> int:
        """Return the seed of the scenes of stage 2."""
        return self.seed + 9

    @property
    def answer_seed(self) -> int:
        """Return the seed of the scenes of stages 3 and 4."""
        return self.seed + 1

    def types(self, step: int) -> tuple[str, ...]:
        """Return the question types of a step of stages 3 and 4."""
        return EASY if step < self.easy else RELATIONS if step < self.relations else MIXTURE


TEACHER = Plan(
    256, 3, 512, 64, seed=0, naming_steps=250, steps=1700, lr=7e-4, easy=200, relations=800, early=800, naming=1500
)
STUDENT = Plan(
    128, 3, 256, 32, seed=5, naming_steps=200, steps=1000, lr=1.5e-3, easy=200, relations=1000, early=500, naming=500
)


def rate(step: int, steps: int, warmup: int, peak: float) -> float:
    """Return the learning rate: linear warm-up, then a cosine to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def start(plan: Plan, vision: dict[str, torch.Tensor] | None) -> LlavaForConditionalGeneration:
    """Return an untrained model whose embedding is tied to its head while it trains here."""
    torch.manual_seed(plan.seed)
    model = LlavaForConditionalGeneration(make_config(plan.width, plan.layers, plan.inner, plan.head))
    model.model.vision_tower.embeddings.position_embedding.weight.data.normal_(0, 0.5)
    for layer in model.model.language_model.layers:
        query, key = layer.self_attn.q_proj.weight.data, layer.self_attn.k_proj.weight.data
        half = query.shape[0] // 2
        query[:half].normal_(0, 0.8 / math.sqrt(query.shape[1]))
        key[:half] = query[:half]
    if vision is not None:
        model.model.vision_tower.load_state_dict(vision)
        model.model.vision_tower.requires_grad_(False)
    model.lm_head.weight = model.model.language_model.embed_tokens.weight
    return model


def learn_names(model: LlavaForConditionalGeneration, plan: Plan) -> None:
    """Train stage 2: everything outside the decoder layers learns to name the visual tokens."""
    chosen = [p for n, p in model.named_parameters() if p.requires_grad and "language_model.layers" not in n]
    optimizer = torch.optim.AdamW(chosen, lr=2e-3, fused=True)
    for step in range(plan.naming_steps):
        optimizer.param_groups[0]["lr"] = rate(step, plan.naming_steps, 20, 2e-3)
        batch = pack(plan.naming_seed, step, NAMED_IMAGES, 1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = naming_loss(model, batch, visual_features(model, batch.pixels))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


def learn_answers(model: LlavaForConditionalGeneration, plan: Plan, heldout: Sequence[Packed], log: Any) -> None:
    """Train stages 3 and 4: cross-entropy on packed questions, with the vision tower frozen."""
    model.model.vision_tower.requires_grad_(False)
    chosen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(chosen, lr=plan.lr, weight_decay=0.01, betas=(0.9, 0.98), fused=True)
    started, total = time.time(), 0.0
    for step in range(plan.steps):
        optimizer.param_groups[0]["lr"] = rate(step, plan.steps, plan.warmup, plan.lr)
        batch = pack(plan.answer_seed, step, plan.images, plan.questions, plan.types(step), early=step < plan.early)
        with torch.autocast("cpu", torch.bfloat16):
            features = visual_features(model, batch.pixels)
            loss = answer_loss(model, batch, features)
            naming = naming_loss(model, batch, features)
        optimizer.zero_grad(set_to_none=True)
        (loss + 0.1 * max(0.0, 1 - step / plan.naming) * naming).backward()
        clip_grad_norm_(chosen, 1.0)
        optimizer.step()
        total += loss.item()
        if step % 50 == 49:
            log(f"step {step + 1} of {plan.steps}: loss {total / 50:.4f}, {time.time() - started:.0f} s")
            total = 0.0
        if step % 250 == 249:
            log(f"  held out: {accuracy(model, heldout)}")


def named_tower() -> dict[str, torch.Tensor]:
    """Return the vision tower that both models share: stage 2 of the teacher, which takes seconds and is deterministic."""
    model = start(TEACHER, None)
    learn_names(model, TEACHER)
    return {key: value.clone() for key, value in model.model.vision_tower.state_dict().items()}


def train_member(plan: Plan, vision: dict[str, torch.Tensor] | None, heldout: Sequence[Packed], log: Any) -> Any:
    """Train a model and return it with its entry of build.json; vision: the frozen tower, None to train it here."""
    started = time.time()
    model = start(plan, vision)
    learn_names(model, plan)
    learn_answers(model, plan, heldout, log)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    share, by_type = accuracy(model, heldout)
    report = asdict(plan) | {
        "seconds": round(time.time() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    return model, report | {"heldout_accuracy": share, "heldout_by_type": by_type}


def fetch_emoji(folder: Path) -> Path:
    """Download the npm package into `folder` and return its folder of 64 x 64 images."""
    name = subprocess.run(
        ["npm", "pack", PACKAGE], cwd=folder, check=True, capture_output=True, text=True
    ).stdout.split()[-1]
    with tarfile.open(folder / name) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package" / "img" / "google" / "64"


def write_emoji(source: Path, target: Path) -> None:
    """Scale the chosen images and write them with the license note."""
    target.mkdir(parents=True, exist_ok=True)
    for name, code in CODE_POINTS.items():
        image = Image.open(source / f"{code}.png").convert("RGBA").resize((32, 32), Image.Resampling.LANCZOS)
        image.save(target / f"{name}.png", optimize=True)
    (target / "LICENSE.txt").write_text(LICENCE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--emoji", type=Path, help="folder with the 64 x 64 images; without it the npm package is downloaded"
    )
    parser.add_argument("--out", type=Path, default=ASSETS, help="where teacher/, student/ and build.json go")
    parser.add_argument("--member", choices=["teacher", "student"], help="train this one alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        write_emoji(options.emoji or fetch_emoji(Path(folder)), ASSETS / "emoji")
    heldout = [pack(HELDOUT_SEED, index, 125, 6, heldout=True) for index in range(8)]
    report_file = options.out / "build.json"
    report: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
    }
    for name, plan in (("teacher", TEACHER), ("student", STUDENT)):
        if options.member not in (None, name):
            continue
        vision = None if name == "teacher" else named_tower()
        model, said = train_member(plan, vision, heldout, lambda line, name=name: print(f"{name}: {line}", flush=True))
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        save_model(model, options.out / name)
        earlier = json.loads(report_file.read_text()) if report_file.exists() else {}
        report_file.write_text(json.dumps(earlier | report | {name: said}, indent=1) + "\n")


if __name__ == "__main__":
    main()
