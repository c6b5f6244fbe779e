"""Pack several questions about one image into one training sequence, to train the bundled models quickly.

A sequence is `<s><user><image>*9` followed by Q segments, one per question: its words, <assistant>, its answer. A segment
sees the prefix and itself and counts its positions from the end of the prefix, so each question is computed exactly as if it
were alone, while the image is encoded once: 2.5 times as many questions per second.

Shapes: B images, Q questions each, P = 2 + visual tokens, L = SEGMENT, S = P + Q * L, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax
from transformers import LlavaForConditionalGeneration

from .images import GRID, NAMES, compose
from .models import ASSISTANT, BOS, EOS, IMAGE, USER, VISUAL_TOKENS, WORDS
from .questions import COLUMNS, MIXTURE, Question, ask
from .scenes import Scene, draw_scene

TOKEN = {word: index for index, word in enumerate(WORDS)}
PREFIX = 2 + VISUAL_TOKENS
SEGMENT = 11
IGNORE = -100


@dataclass(frozen=True)
class Answered:
    """One question of a packed batch.

    position: predicts the first token of the answer. length: tokens of the answer, the end of turn included. accept: first
    tokens that count as correct when several answers are.
    """

    type: str
    image: int
    position: int
    length: int
    accept: frozenset[int]


@dataclass(frozen=True)
class Packed:
    """A batch.

    pixels float32 [B, 3, H, W] in [-1, 1]; ids and targets int64 [B, S] (a target is at the position
    that predicts it, IGNORE elsewhere); kinds int64 [B, visual tokens], the word of each cell.
    """

    pixels: Tensor
    ids: Tensor
    targets: Tensor
    kinds: Tensor
    asked: list[Answered]


def draw_asked(
    rng: np.random.Generator, images: int, questions: int, types: Sequence[str] = MIXTURE, heldout: bool = False
) -> Iterator[tuple[Scene, list[tuple[Question, str]]]]:
    """Yield the scenes of a batch, each with its questions and the answers that are their labels."""
    for _ in range(images):
        scene = draw_scene(rng, heldout)
        cells, answered = scene.cells.ravel().tolist(), []
        for _ in range(questions):
            question = ask(cells, rng, types)
            answered.append((question, question.accept[int(rng.integers(len(question.accept)))]))
        yield scene, answered


def pack(
    seed: int,
    index: int,
    images: int,
    questions: int,
    types: Sequence[str] = MIXTURE,
    heldout: bool = False,
    early: bool = False,
) -> Packed:
    """Return batch `index` of the stream `seed`.

    early: the first answer token is also a target one position earlier, at the last word of the question, which makes the
    first steps easier: that prediction needs one step of attention less.
    """
    rng = np.random.default_rng((seed, index))
    ids = np.zeros((images, PREFIX + questions * SEGMENT), np.int64)
    targets = np.full_like(ids, IGNORE)
    ids[:, 0], ids[:, 1], ids[:, 2:PREFIX] = TOKEN[BOS], TOKEN[USER], TOKEN[IMAGE]
    scenes: list[Scene] = []
    asked: list[Answered] = []
    for image, (scene, answered) in enumerate(draw_asked(rng, images, questions, types, heldout)):
        scenes.append(scene)
        for number, (question, label) in enumerate(answered):
            prompt = [*(TOKEN[word] for word in question.text.split()), TOKEN[ASSISTANT]]
            answer = [*(TOKEN[word] for word in label.split()), TOKEN[EOS]]
            start = PREFIX + number * SEGMENT
            first = start + len(prompt) - 1
            ids[image, start : first + len(answer)] = prompt + answer[:-1]
            targets[image, first : first + len(answer)] = answer
            if early:
                targets[image, first - 1] = answer[0]
            starts = frozenset(TOKEN[right.split()[0]] for right in question.accept)
            asked.append(Answered(question.type, image, first, len(answer), starts))
    grids = np.stack([scene.cells for scene in scenes])
    pixels = compose(grids, np.stack([s.shifts for s in scenes]), np.array([s.background for s in scenes]))
    kinds = torch.from_numpy(grids.reshape(images, -1).astype(np.int64)) + TOKEN[NAMES[0]]
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)
    return Packed(scaled, torch.from_numpy(ids), torch.from_numpy(targets), kinds, asked)


def mask_and_positions(questions: int) -> tuple[Tensor, Tensor]:
    """Return the attention mask bool [1, 1, S, S] (true: sees) and positions int64 [1, S] of a packed sequence."""
    length = PREFIX + questions * SEGMENT
    segment, positions = torch.full((length,), -1), torch.arange(length)
    for number in range(questions):
        part = slice(PREFIX + number * SEGMENT, PREFIX + (number + 1) * SEGMENT)
        segment[part], positions[part] = number, PREFIX + torch.arange(SEGMENT)
    own = (segment[None, :] == segment[:, None]) | (segment[None, :] == -1)
    return (torch.ones(length, length).tril().bool() & own)[None, None], positions[None]


def visual_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return the projected visual tokens [B, visual tokens, d]."""
    return torch.stack(list(model.model.get_image_features(pixel_values=pixels).pooler_output))


def packed_logits(model: LlavaForConditionalGeneration, batch: Packed, features: Tensor, where: Tensor) -> Tensor:
    """Return the logits [N, V] at the positions that the mask `where` [B, S] marks, from visual features [B, visual tokens,
    d].
    """
    words = model.model.language_model.embed_tokens(batch.ids)
    embedded = torch.cat([words[:, :2], features.to(words.dtype), words[:, PREFIX:]], dim=1)
    mask, positions = mask_and_positions((batch.ids.shape[1] - PREFIX) // SEGMENT)
    states = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=mask.expand(len(words), 1, -1, -1),
        position_ids=positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(states[where])


def answer_loss(model: LlavaForConditionalGeneration, batch: Packed, features: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answer tokens in nats."""
    where = batch.targets != IGNORE
    return cross_entropy(packed_logits(model, batch, features, where).float(), batch.targets[where])


def naming_loss(model: LlavaForConditionalGeneration, batch: Packed, features: Tensor) -> Tensor:
    """Return the loss in nats of naming each visual token's kind, row and column with equal probability.

    The features are scaled to unit root mean square and multiplied by the language model's own head; 0 is the minimum.
    """
    unit = features.float() * torch.rsqrt(features.float().pow(2).mean(-1, keepdim=True) + 1e-6)
    logs = log_softmax(model.lm_head(unit).float(), dim=-1)
    rows = torch.tensor([TOKEN[str(place // GRID + 1)] for place in range(VISUAL_TOKENS)]).expand(len(unit), -1)
    columns = torch.tensor([TOKEN[COLUMNS[place % GRID]] for place in range(VISUAL_TOKENS)]).expand(len(unit), -1)
    named = torch.stack([batch.kinds, rows, columns], dim=-1)
    return -logs.gather(2, named).mean() - float(np.log(3))


@torch.no_grad()
def accuracy(model: LlavaForConditionalGeneration, batches: Sequence[Packed]) -> tuple[float, dict[str, float]]:
    """Return the share of held-out questions that are answered correctly, in total and by type.

    The label's own tokens are the input, which equals greedy decoding where one answer is correct; where several are, the first
    token and the end of turn decide.
    """
    right: dict[str, list[bool]] = {}
    model.eval()
    for batch in batches:
        where = batch.targets != IGNORE
        best = torch.full_like(batch.ids, IGNORE)
        with torch.autocast("cpu", torch.bfloat16):
            best[where] = packed_logits(model, batch, visual_features(model, batch.pixels), where).argmax(-1)
        for question in batch.asked:
            span = slice(question.position, question.position + question.length)
            chosen, wanted = best[question.image, span], batch.targets[question.image, span]
            equal = chosen == wanted
            if len(question.accept) > 1:
                equal[0] = int(chosen[0]) in question.accept
            right.setdefault(question.type, []).append(bool(equal.all()))
    model.train()
    every = [value for values in right.values() for value in values]
    return float(np.mean(every)), {kind: float(np.mean(values)) for kind, values in sorted(right.items())}
