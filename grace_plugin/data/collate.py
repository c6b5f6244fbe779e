"""Rows to batches, with labels on assistant turns only.

Turns are tokenised apart: the text up to an assistant turn ends exactly where generation would start, the turn's text is
tokenised alone and is what is learned, end-of-turn included. So prompts have the tokens they have when served, whatever the
chat template, and no token id stands for a role. Nothing is truncated silently: a row longer than `max_length` is an error
that says what would be cut.

Legend: B batch, S longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data.conversation import Row, read_row

__all__ = ["ConversationCollator"]

IGNORE_INDEX = -100
_ALONG_SEQUENCE = ("input_ids", "attention_mask", "labels", "mm_token_type_ids", "token_type_ids")


class ConversationCollator:
    """Callable that turns rows into a right-padded batch.

    Args:
        processor: a transformers processor with a chat template.
        max_length: longest row in tokens, visual tokens included; None for no limit.
    """

    def __init__(self, processor: Any, max_length: int | None = None) -> None:
        if getattr(processor, "chat_template", None) is None and processor.tokenizer.chat_template is None:
            raise ValueError("the processor has no chat template; set processor.chat_template to the model's own")
        self.processor = processor
        self.max_length = max_length
        pad = processor.tokenizer.pad_token_id
        self._pad = {"input_ids": 0 if pad is None else pad, "labels": IGNORE_INDEX}

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """[rows] -> input_ids, attention_mask, labels (int64 [B, S]) and the family's pixel entries.

        Raises:
            ValueError: a row that cannot be used, named.
        """
        encoded = [self.encode(read_row(row)) for row in rows]
        longest = max(e["input_ids"].shape[1] for e in encoded)
        batch: dict[str, Tensor] = {}
        for key in dict.fromkeys(k for e in encoded for k in e):
            parts = [e[key] for e in encoded if key in e]
            if key in _ALONG_SEQUENCE:
                fill = self._pad.get(key, 0)
                parts = [torch.nn.functional.pad(p, (0, longest - p.shape[1]), value=fill) for p in parts]
            batch[key] = torch.cat(parts)
        return batch

    def encode(self, row: Row) -> dict[str, Tensor]:
        """One row as a batch of one, without padding."""
        images = list(row.images)
        pieces: list[dict[str, Tensor]] = []
        for text, learned in self._segments(row):
            wanted = 0 if learned else self._placeholders(row, len(pieces))
            pieces.append(self._tokens(text, images[:wanted], learned, first=not pieces))
            images = images[wanted:]
        joined: dict[str, Tensor] = {}
        for key in dict.fromkeys(k for piece in pieces for k in piece):
            dim = 1 if key in _ALONG_SEQUENCE else 0
            joined[key] = torch.cat([piece[key] for piece in pieces if key in piece], dim=dim)
        length = joined["input_ids"].shape[1]
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"{row.name} has {length} tokens and max_length is {self.max_length}; cutting it would shift or cut its image "
                "tokens or its answer. Raise max_length, lower the image resolution, or drop the row"
            )
        return joined

    def _segments(self, row: Row) -> list[tuple[str, bool]]:
        """The rendered conversation in pieces: (text, whether it is learned), prompt and answer in turn."""
        render = self.processor.apply_chat_template
        messages, done, segments = list(row.messages), "", []
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = render(messages[:end], tokenize=False, add_generation_prompt=True)
            full = render(messages[: end + 1], tokenize=False)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise ValueError(
                    f"{row.name}: the chat template rewrites earlier turns, so the answers cannot be told from the prompt"
                )
            answer = full[len(prompt) :].rstrip()  # a line break behind the end of turn is not generated
            segments += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return segments

    @staticmethod
    def _placeholders(row: Row, segment: int) -> int:
        """Images of the prompt that is the `segment`-th piece: those between two assistant turns."""
        turn, count = 0, 0
        for message in row.messages:
            if message["role"] == "assistant":
                turn += 2
            elif turn == segment:
                count += sum(part.get("type") == "image" for part in message["content"])
        return count

    def _tokens(self, text: str, images: list[Any], learned: bool, *, first: bool) -> dict[str, Tensor]:
        if images:
            out = dict(self.processor(text=[text], images=images, return_tensors="pt", add_special_tokens=first))
        else:
            out = dict(self.processor.tokenizer([text], return_tensors="pt", add_special_tokens=first))
        piece = {key: value for key, value in out.items() if isinstance(value, Tensor)}
        ids = piece["input_ids"]
        piece["labels"] = ids.clone() if learned else torch.full_like(ids, IGNORE_INDEX)
        if "mm_token_type_ids" in getattr(self.processor, "model_input_names", []):
            piece.setdefault("mm_token_type_ids", torch.zeros_like(ids))
        return piece
