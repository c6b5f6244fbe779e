"""A conversation as rendered text, cut where learning starts and ends.

Where the chat template carries `{% generation %}` marks, they say what is learned. Where it does not, turns are rendered
apart: the text up to an assistant turn ends exactly where generation would start, and the rest of the turn is learned,
end-of-turn mark included. No token id stands for a role either way. White space at the seams is dealt alike in both: what
stands between the generation prompt and a mark is the answer's, for it is generated; what stands behind an answer is not. A
template that ends its last answer with no special token (LLaVA-1.5's) would teach a model never to stop, so the tokenizer's
end of text is added there and learned.

What a row says is text, also when it spells a special token: before rendering, every such string in the row's own text is
replaced by noncharacters that no template touches, and it comes back as a segment of its own, marked `literal`, to be
tokenised without special tokens. The end-of-turn mark that the template writes stays what it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from grace_plugin.data.conversation import Row
from grace_plugin.data.faults import RowError
from grace_plugin.data.shown import shortened

__all__ = ["Segment", "Segmenter"]

_OPEN, _CLOSE, _FIRST = "\ufdd0", "\ufdd1", 0xF0000  # noncharacters around an index in a private plane
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
KINDS = ("image", "video")


class Segment(NamedTuple):
    """A run of rendered text: whether it is learned, and whether it is a row's own spelling of a special token."""

    text: str
    learned: bool
    literal: bool = False


@dataclass
class Segmenter:
    """Cuts rows for one processor; `processor` must have a chat template.

    marks: take what is learned from the template's generation marks where it has them; False renders turns apart always.
    """

    processor: Any
    marks: bool = True

    @cached_property
    def template(self) -> str:
        """The chat template's source (the one named "default" of several)."""
        template = getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template
        return template.get("default", next(iter(template.values()))) if isinstance(template, dict) else template

    @property
    def has_marks(self) -> bool:
        """Whether the template says itself what is learned."""
        return _MARKS.search(self.template) is not None

    @cached_property
    def protected(self) -> dict[str, int]:
        """Strings that would become special tokens, with the ids they must not become."""
        tokenizer = self.processor.tokenizer
        strings = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        strings |= {str(token) for token in tokenizer.all_special_tokens}
        for kind in KINDS:
            token = getattr(self.processor, f"{kind}_token", None)
            strings |= {token} if isinstance(token, str) else set()
        strings |= {text for text in self.placeholders.values() if text}
        return {text: tokenizer.convert_tokens_to_ids(text) for text in strings if text.strip()}

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self.protected, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, [*longest_first, _OPEN, _CLOSE])))

    @cached_property
    def placeholders(self) -> dict[str, str]:
        """What the template writes for an image and for a video ("" when it writes nothing).

        Some processors render a conversation with a video by a template of their own (SmolVLM's). What that one writes does not
        count: the model was not given it for training, and the rest of the row would be rendered otherwise than others.
        """
        found = {}
        for kind in KINDS:
            text = {"type": "text", "text": "\ufdd2"}
            asked = [[{"role": "user", "content": [text, *part, text]}] for part in ([], [{"type": kind}])]
            try:
                written, own = (_difference(*map(render, asked)) for render in (self._render, self._by_template))
            except Exception:  # a template that knows no videos may raise anything
                written = own = ""
            found[kind] = written if written == own and "\ufdd2" not in written else ""
        return found

    @property
    def _named(self) -> dict[str, str]:
        """Special tokens by name, as templates ask for them."""
        return {k: v for k, v in self.processor.tokenizer.special_tokens_map.items() if isinstance(v, str)}

    def _by_template(self, messages: Sequence[dict[str, Any]]) -> str:
        """The conversation as the processor's own template renders it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(conversations=[list(messages)], chat_template=self.template, **self._named)
        return str(rendered[0])

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool = False) -> str:
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)

    def segments(self, row: Row) -> list[Segment]:
        """The row in segments; their texts joined are the rendered conversation.

        Raises:
            RowError: the template cannot render the row, rewrites earlier turns, drops images, or leaves nothing to learn.
        """
        literals: list[str] = []
        messages = [
            {**m, "content": [self._guard(part, literals) for part in m["content"]]} for m in row.messages
        ]  # fmt: skip
        try:
            cut = self._marked(messages) if self.marks and self.has_marks else self._apart(messages, row.name)
        except RowError:
            raise
        except Exception as error:  # jinja's errors, and what a template raises itself
            raise RowError("template", f"{row.name}: the chat template cannot render it: {shortened(error)}") from error
        self._check(cut, row)
        found = [piece for text, learned in cut for piece in _split(text, learned, literals)]
        end = self.processor.tokenizer.eos_token
        behind = next(i for i in range(len(cut), 0, -1) if cut[i - 1][1])
        closed = any(token in "".join(text for text, _ in cut[behind:]) for token in self.protected)
        if end and not closed and not any(cut[behind - 1][0].endswith(token) for token in self.protected):
            found.append(Segment(end, True))
        return found

    def _guard(self, part: dict[str, Any], literals: list[str]) -> dict[str, Any]:
        if part["type"] != "text" or not self._pattern.search(part["text"]):
            return part

        def hide(match: re.Match[str]) -> str:
            literals.append(match.group())
            return f"{_OPEN}{chr(_FIRST + len(literals) - 1)}{_CLOSE}"

        return {**part, "text": self._pattern.sub(hide, part["text"])}

    def _marked(self, messages: list[dict[str, Any]]) -> list[tuple[str, bool]]:
        """Cut at the template's own marks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages], chat_template=self.template, return_assistant_tokens_mask=True, **self._named
        )
        text, done, cut = rendered[0], 0, []
        for start, end in spans[0]:
            begin = start - len(self._generated_space(text[done:start]))
            answer = text[begin:end].rstrip()
            cut += [(text[done:begin], False), (answer, True)]
            done = begin + len(answer)
        return [*cut, (text[done:].rstrip(), False)]

    def _generated_space(self, prompt: str) -> str:
        """White space at the end of a prompt that serving leaves to the model: what follows the generation prompt."""
        space = prompt[len(prompt.rstrip()) :]
        fits = [n for n in range(len(space) + 1) if self._opening and prompt.endswith(self._opening + space[n:])]
        return space[fits[0] :] if fits else ""

    @cached_property
    def _opening(self) -> str:
        """What the template adds to ask for an answer; "" when it adds nothing."""
        asked = [{"role": "user", "content": [{"type": "text", "text": "\ufdd2"}]}]
        try:
            bare, prompt = self._render(asked), self._render(asked, prompt=True)
        except Exception:  # rows will say it
            return ""
        return prompt[len(bare) :] if prompt.startswith(bare) else ""

    def _apart(self, messages: list[dict[str, Any]], name: str) -> list[tuple[str, bool]]:
        """Cut where generation would start, turn by turn."""
        done, cut = "", []
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:end], prompt=True)
            full = self._render(messages[: end + 1])
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise RowError(
                    "template",
                    f"{name}: the chat template rewrites earlier turns, so the answers cannot be told from the prompt",
                )
            answer = full[len(prompt) :].rstrip()
            cut += [(prompt[len(done) :], False), (answer, True)]
            done = prompt + answer
        return cut

    def _check(self, cut: list[tuple[str, bool]], row: Row) -> None:
        for kind, given in (("image", row.images), ("video", row.videos)):
            written = self.count("".join(text for text, _ in cut), kind) if given else 0
            if written != len(given):
                raise RowError(
                    "template" if self.placeholders[kind] else "video_unsupported",
                    f"{row.name} has {len(given)} {kind}(s) and the chat template writes {written} placeholder(s) for them; "
                    f"this model's template takes no {kind}s there",
                )
        if not any(learned and text.strip() for text, learned in cut):
            raise RowError("no_supervised_tokens", f"{row.name}: the chat template marks nothing of it as learned")

    def count(self, text: str, kind: str) -> int:
        """Placeholders of a kind in rendered text (a row's own spelling of one is hidden or cut apart by then)."""
        placeholder = self.placeholders[kind]
        return text.count(placeholder) if placeholder else 0

    def literal_ids(self, text: str) -> list[int]:
        """Token ids of a string that must not become a special token."""
        tokenizer = self.processor.tokenizer
        unknown = tokenizer.unk_token_id
        kept = set(self.protected.values()) - {unknown}
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if kept.isdisjoint(ids):
            return list(ids)
        apart = [tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"] for c in text]
        return [i for part in apart for i in part if i == unknown or i not in kept]


def _difference(bare: str, full: str) -> str:
    """What stands in `full` and not in `bare`, without the white space around it."""
    start = 0
    while start < len(bare) and start < len(full) and bare[start] == full[start]:
        start += 1
    end = 0
    while end < min(len(bare), len(full)) - start and bare[-1 - end] == full[-1 - end]:
        end += 1
    return full[start : len(full) - end].strip()


def _split(text: str, learned: bool, literals: list[str]) -> list[Segment]:
    """A cut with the hidden strings brought back as segments of their own."""
    found = []
    for part in re.split(f"{_OPEN}(.){_CLOSE}", text) if _OPEN in text else [text]:
        index = ord(part) - _FIRST if len(part) == 1 else -1
        if 0 <= index < len(literals):
            found.append(Segment(literals[index], learned, True))
        elif part:
            found.append(Segment(part, learned))
    return found
