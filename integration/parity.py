"""Judge vLLM's answers by transformers, token by token and by log-probability.

transformers reads the same checkpoint from disk in BF16 and is given vLLM's prompt and tokens (teacher forcing), so
one early difference does not make everything after it incomparable. The head's product is taken in float32: logits of
8 and more are spaced 0.06 apart in BF16, wider than the near-ties looked for. For each generated token: |log p_vLLM - log
p_transformers| in nats, and, where transformers would have chosen another token, how far ahead that one is (its
margin).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoProcessor

from grace_plugin.export.verify import load
from tests.videos import media_of

INT4_KERNEL = "CPUWNA16LinearKernel" if torch.cpu._is_avx512_supported() else "DenseInt4LinearKernel"
"""vLLM's own kernel on this CPU, or the plugin's (`integration/env/dense_int4.py`) where vLLM has none."""


@dataclass
class Parity:
    """Sums over questions. differences: nats per token. margins: nats, of tokens that transformers would not have
    taken. leads: nats per token from transformers' first choice to its second.
    """

    prompts_differing: int = 0
    tokens: int = 0
    differences: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)
    leads: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean difference per token, nats."""
        return sum(self.differences) / max(self.tokens, 1)

    def __str__(self) -> str:
        worst, margins = max(self.differences, default=0.0), [round(margin, 3) for margin in self.margins]
        return (
            f"{self.tokens} tokens, {self.prompts_differing} prompts differ, differences mean {self.mean:.4f} max "
            f"{worst:.4f} nats, margins of other choices {margins}"
        )


def prompts(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows without their last, the assistant's, turn."""
    return [{**row, "messages": row["messages"][:-1]} for row in rows]


def without_colour(questions: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same questions with their pictures and videos in grey: as many tokens, and a difference a judge must notice."""
    grey = []
    for question in questions:
        images = [image.convert("L").convert("RGB") for image in question["images"]]
        videos = [
            (frames.mean(-1, keepdims=True).repeat(3, -1).astype(frames.dtype), known)
            for frames, known in question.get("videos", [])
        ]
        grey.append({**question, "images": images, **({"videos": videos} if videos else {})})
    return grey


def judge(
    checkpoint: str | Path,
    questions: Sequence[dict[str, Any]],
    answers: Sequence[Any],
    *,
    causal: bool = False,
    device: str = "cpu",
) -> Parity:
    """Compare `answers` (prompt_ids, token_ids, logprobs each) with the checkpoint as transformers runs it.

    causal: tokens of a picture see only those before them, also in a model that lets them see each other. device: the model's.
    """
    model = load(Path(checkpoint)).to(device)
    processor = AutoProcessor.from_pretrained(checkpoint)
    parity = Parity()
    for question, answer in zip(questions, answers, strict=True):
        text = processor.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
        batch = dict(processor(text=[text], **media_of(question), return_tensors="pt"))
        if causal and "token_type_ids" in batch:
            batch["token_type_ids"] = torch.zeros_like(batch["token_type_ids"])
        parity.prompts_differing += batch["input_ids"][0].tolist() != _as_written(answer.prompt_ids, processor, model)
        _compare(parity, model, {key: value.to(device) for key, value in batch.items()}, answer)
    return parity


def _as_written(prompt: list[int], processor: Any, model: Any) -> list[int]:
    """vLLM's prompt with the tokens that transformers writes.

    Where a model has no token id for videos, transformers writes their frames with the image's, and vLLM with that of the
    processor's video token; both put the same states there.
    """
    token = getattr(processor, "video_token", None)
    if token is None or getattr(processor, "video_token_id", None) is not None:
        return list(prompt)
    video = processor.tokenizer.convert_tokens_to_ids(token)
    return [model.config.image_token_id if i == video else i for i in prompt]


def _compare(parity: Parity, model: Any, batch: dict[str, torch.Tensor], answer: Any) -> None:
    said = torch.tensor([answer.token_ids], device=model.device)
    length = batch["input_ids"].shape[1]
    batch["input_ids"] = torch.cat([batch["input_ids"], said], 1)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    for key in {"mm_token_type_ids", "token_type_ids"} & batch.keys():
        batch[key] = torch.cat([batch[key], torch.zeros_like(said)], 1)
    states: list[torch.Tensor] = []
    head = model.get_output_embeddings()
    with torch.no_grad():
        with head.register_forward_pre_hook(lambda _, args: states.append(args[0])):
            model(**batch)
        logits = functional.linear(states[0][0, length - 1 : -1].float(), head.weight.float())
    logp = logits.log_softmax(-1).cpu()
    chosen = logp.gather(1, said[0][:, None].cpu())[:, 0]
    parity.tokens += len(answer.token_ids)
    parity.differences += (chosen - torch.tensor(answer.logprobs)).abs().tolist()
    first, second = logp.topk(2).values.unbind(-1)
    parity.leads += (first - second).tolist()
    parity.margins += [margin for margin in (first - chosen).tolist() if margin > 0]
