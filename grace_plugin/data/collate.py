"""Rows to batches, with labels on assistant turns only.

Turns are tokenised apart: the text up to an assistant turn ends exactly where generation would start, the turn's text is
tokenised alone and is what is learned, end-of-turn included. So prompts have the tokens they have when served, whatever the
chat template, and no token id stands for a role. Nothing is truncated silently: a row longer than `max_length` is an error
that says what would be cut.

Legend: B batch, S longest row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from grace_plugin.data.conversation import Row, read_row

__all__ = ["ConversationCollator"]

IGNORE_INDEX = -100
_ALONG_SEQUENCE = ("input_ids", "mm_token_type_ids", "token_type_ids")


@dataclass
class _Piece:
    """A prompt or an answer of a row: tokenised apart, ids without padding."""

    row: int
    text: str
    learned: bool
    images: list[Any]
    prefix: list[int] = field(default_factory=list)
    ids: dict[str, Tensor] = field(default_factory=dict)

    def labels(self) -> Tensor:
        """int64 [tokens of the piece]: the ids of an answer, IGNORE_INDEX in a prompt."""
        ids = self.ids["input_ids"]
        return ids if self.learned else torch.full_like(ids, IGNORE_INDEX)


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
        return self.encode([read_row(row) for row in rows])

    def encode(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Checked rows as a batch; the processor is called once for all pieces with images, the tokenizer for the others."""
        pieces = [piece for number, row in enumerate(rows) for piece in self._pieces(number, row)]
        pictured = [piece for piece in pieces if piece.images]
        plain = [piece for piece in pieces if not piece.images]
        batch: dict[str, Tensor] = {}
        if pictured:
            batch = self._tokenise(pictured, self.processor, images=[piece.images for piece in pictured])
        if plain:
            self._tokenise(plain, self.processor.tokenizer)
        for number, row in enumerate(rows):
            self._check_length(row, sum(len(piece.ids["input_ids"]) for piece in pieces if piece.row == number))
        keys = [
            "input_ids",
            *(["mm_token_type_ids"] if "mm_token_type_ids" in self.processor.model_input_names else []),
            # segments that are all zero say nothing; where they mark pictures, attention inside a picture reads them
            *(
                ["token_type_ids"]
                if any(p.ids["token_type_ids"].any() for p in pictured if "token_type_ids" in p.ids)
                else []
            ),
        ]
        text = [[piece for piece in pieces if piece.row == number] for number in range(len(rows))]
        for key in keys:
            batch[key] = self._pad_rows(
                [[p.ids.get(key, torch.zeros_like(p.ids["input_ids"])) for p in own] for own in text], key
            )
        batch["attention_mask"] = self._pad_rows(
            [[torch.ones_like(p.ids["input_ids"]) for p in own] for own in text], "mask"
        )
        batch["labels"] = self._pad_rows([[p.labels() for p in own] for own in text], "labels")
        return batch

    def _pad_rows(self, rows: list[list[Tensor]], key: str) -> Tensor:
        joined = [torch.cat(parts) for parts in rows]
        return torch.nn.utils.rnn.pad_sequence(joined, batch_first=True, padding_value=self._pad.get(key, 0))

    def _check_length(self, row: Row, length: int) -> None:
        if self.max_length is not None and length > self.max_length:
            raise ValueError(
                f"{row.name} has {length} tokens and max_length is {self.max_length}; cutting it would shift or cut its image "
                "tokens or its answer. Raise max_length, lower the image resolution, or drop the row"
            )

    def _tokenise(self, pieces: list[_Piece], tokenizer: Any, **images: Any) -> dict[str, Tensor]:
        """Fill the pieces' ids (padding taken off again); returns what belongs to the pixels."""
        out = dict(
            tokenizer(
                text=[piece.text for piece in pieces], padding=True, padding_side="right", add_special_tokens=False,
                return_tensors="pt", **images,
            )
        )  # fmt: skip
        lengths = out.pop("attention_mask").sum(dim=1).tolist()
        along = {key: out.pop(key) for key in _ALONG_SEQUENCE if key in out}
        for number, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
            piece.ids = {key: value[number, :length] for key, value in along.items()}
            if piece.prefix:
                piece.ids = {
                    key: torch.cat([torch.tensor(piece.prefix) * (key == "input_ids"), value])
                    for key, value in piece.ids.items()
                }
        return {key: value for key, value in out.items() if isinstance(value, Tensor)}

    def _pieces(self, number: int, row: Row) -> list[_Piece]:
        """The pieces of a row; the first gets the tokens that the tokenizer puts before a text, unless the template has."""
        tokenizer, images = self.processor.tokenizer, list(row.images)
        pieces: list[_Piece] = []
        for text, learned in self._segments(row):
            wanted = 0 if learned else self._placeholders(row, len(pieces))
            pieces.append(_Piece(number, text, learned, images[:wanted]))
            images = images[wanted:]
        if not (tokenizer.bos_token and pieces[0].text.startswith(tokenizer.bos_token)):
            pieces[0].prefix = list(tokenizer("")["input_ids"])
        return pieces

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
