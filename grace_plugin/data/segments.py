"""A conversation as rendered text, cut where supervision starts and ends.

Where the chat template has `{% generation %}` blocks, they say which text is supervised. Otherwise turns are rendered one by
one: the text up to an assistant turn ends where generation would start, and the rest of the turn, end-of-turn mark included, is
supervised. No token id is taken for a role. White space at the seams is assigned alike in both cases: what is between the
generation prompt and a block belongs to the answer, because it is generated; what follows an answer does not.

What a sample says is text, also when it spells a special token. Before rendering, every such string is replaced by
noncharacters that no template touches; it comes back as a segment of its own, `literal`, tokenized without special tokens.
`special_tokens` lists those that samples may write as tokens, for instance the marks of a grounding model's boxes.

A turn with `train: false` is rendered as any other and not supervised. A template that leaves out what a sample says (the
system turn, a tool's answer, the reasoning, the tools) is refused: training would see another text than the sample's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from grace_plugin.data.conversation import Sample
from grace_plugin.data.errors import SampleError
from grace_plugin.data.shown import shortened, shown
from grace_plugin.data.special import SpecialStrings
from grace_plugin.data.time_limit import TimeLimitError, memory_limit, time_limit

__all__ = ["Segment", "Segmenter"]

# noncharacters around an index in a private plane
_OPEN, _CLOSE, _FIRST = "\ufdd0", "\ufdd1", 0xF0000
_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
KINDS = ("image", "video")
# for one sample; they take less than a millisecond
_RENDER_SECONDS = 2
# for the first turns that are rendered, before training
_RENDER_BYTES = 2**30
# samples after which no more time is given to a template that does not end
_RENDERS_STOPPED = 5
# fields of a turn that only some templates write
_TEMPLATED = ("reasoning_content", "tool_calls")


# transformers' own `return_assistant_tokens_mask` and TRL's `assistant_only_loss` cannot replace this module: the mask is wrong
# where a processor expands image tokens (transformers issues 46559 and 48793), TRL refuses assistant-only loss for VLMs, and
# most templates have no generation blocks. Once both are fixed, templates with blocks can use the mask.
class _Cut(NamedTuple):
    """A piece of rendered text: whether it is an assistant's turn, and whether that turn is supervised."""

    text: str
    answer: bool = False
    supervised: bool = False


class Segment(NamedTuple):
    """A piece of rendered text: whether it is supervised, and whether it is a sample's own spelling of a special token."""

    text: str
    supervised: bool
    literal: bool = False


@dataclass
class Segmenter:
    """Cuts samples for one processor; `processor` must have a chat template.

    marks: take what is supervised from the template's generation marks where it has them; False renders turns apart always.
    special_tokens: special tokens that samples may write; any other that a sample spells stays text.

    Raises:
        ValueError: one of `special_tokens` is no special token of this processor, or stands for images or videos.
    """

    processor: Any
    marks: bool = True
    special_tokens: tuple[str, ...] = field(default=())
    _stopped: int = field(default=0, init=False, repr=False)

    def __post_init__(self) -> None:
        for token in self.special_tokens:
            if token not in self.protected:
                raise ValueError(f"special_tokens: {shown(token)} is no special token of the model's tokenizer")
            if token in self._visual_tokens:
                raise ValueError(
                    f"special_tokens: {shown(token)} stands for an image or a video; give an image part in its place"
                )

    @cached_property
    def template(self) -> str:
        """The chat template's source (the one named "default" of several)."""
        template = getattr(self.processor, "chat_template", None) or self.processor.tokenizer.chat_template
        return template.get("default", next(iter(template.values()))) if isinstance(template, dict) else template

    @property
    def has_marks(self) -> bool:
        """Whether the template says itself what is supervised."""
        return _MARKS.search(self.template) is not None

    @cached_property
    def protected(self) -> dict[str, int]:
        """Strings that would become special tokens, with the ids they must not become."""
        tokenizer = self.processor.tokenizer
        strings = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        strings |= {str(token) for token in tokenizer.all_special_tokens}
        strings |= self._visual_tokens
        return {text: tokenizer.convert_tokens_to_ids(text) for text in strings if text.strip()}

    @cached_property
    def _visual_tokens(self) -> set[str]:
        """Strings that stand for images and videos."""
        named = {getattr(self.processor, f"{kind}_token", None) for kind in KINDS}
        return {text for text in (*named, *self.placeholders.values()) if isinstance(text, str) and text}

    @cached_property
    def special(self) -> SpecialStrings:
        """The strings of `protected`, to find in texts."""
        return SpecialStrings(self.protected)

    @cached_property
    def _to_hide(self) -> SpecialStrings:
        return SpecialStrings({*self.protected, _OPEN, _CLOSE} - set(self.special_tokens))

    @cached_property
    def placeholders(self) -> dict[str, str]:
        """What the template writes for an image and for a video ("" when it writes nothing).

        Some processors render a conversation with a video by a template of their own (SmolVLM's). What that one writes does not
        count: the model was not given it for training, and the rest of the sample would be rendered otherwise than others.
        """
        found = {}
        for kind in KINDS:
            text = {"type": "text", "text": "\ufdd2"}
            asked = [[{"role": "user", "content": [text, *part, text]}] for part in ([], [{"type": kind}])]
            try:
                with time_limit(_RENDER_SECONDS), memory_limit(_RENDER_BYTES):
                    written, own = (_difference(*map(render, asked)) for render in (self._render, self._by_template))
            except TimeLimitError:
                raise ValueError(
                    f"the model's chat template takes more than {_RENDER_SECONDS} seconds for one turn; give the processor a "
                    "chat template that ends"
                ) from None
            except MemoryError:
                raise ValueError(
                    f"the model's chat template takes more than {_RENDER_BYTES // 10**6} MB for one turn; give the processor "
                    "a chat template that writes less"
                ) from None
            except Exception:  # a template that knows no videos may raise anything
                written = own = ""
            found[kind] = written if written == own and "\ufdd2" not in written else ""
        return found

    @property
    def _named(self) -> dict[str, str]:
        """Special tokens by name, as templates ask for them."""
        return {k: v for k, v in self.processor.tokenizer.special_tokens_map.items() if isinstance(v, str)}

    def _by_template(self, messages: Sequence[dict[str, Any]]) -> str:
        """Return the conversation as the processor's own template renders it."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, _ = render_jinja_template(conversations=[list(messages)], chat_template=self.template, **self._named)
        return str(rendered[0])

    def _render(self, messages: Sequence[dict[str, Any]], prompt: bool = False, tools: Any = None) -> str:
        more = {"tools": tools} if tools else {}
        return self.processor.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **more)

    def segments(self, sample: Sample) -> list[Segment]:
        """Return the sample in segments; their texts joined are the rendered conversation."""
        literals: list[str] = []
        messages = [self._guarded(message, literals) for message in sample.messages]
        tools = self._hidden(list(sample.tools), literals)
        trains = [message.get("train", True) for message in sample.messages if message["role"] == "assistant"]
        by_blocks = self.marks and self.has_marks
        if self._stopped >= _RENDERS_STOPPED:
            raise SampleError(
                "template",
                f"{sample.name}: not rendered, since the chat template did not end for {self._stopped} samples",
            )
        try:
            with time_limit(_RENDER_SECONDS):
                cut = (self._cut_at_blocks if by_blocks else self._cut_by_turns)(messages, tools, trains, sample.name)
                self._check_written(messages, tools, "".join(part.text for part in cut), sample.name)
        except SampleError:
            raise
        except TimeLimitError:
            self._stopped += 1
            raise SampleError(
                "template", f"{sample.name}: the chat template takes more than {_RENDER_SECONDS} seconds to render it"
            ) from None
        except Exception as error:  # jinja's errors, and what a template raises itself
            raise SampleError(
                "template", f"{sample.name}: the chat template cannot render it: {shortened(error)}"
            ) from error
        self._check(cut, sample)
        found = [piece for part in cut for piece in _split(part.text, part.supervised, literals)]
        # LLaVA-1.5's template ends its last answer with no special token: the model would never learn to stop
        end = self.processor.tokenizer.eos_token
        end_of_answers = next(i for i in range(len(cut), 0, -1) if cut[i - 1].answer)
        closed = self.special.within("".join(part.text for part in cut[end_of_answers:]))
        if end and not closed and not self.special.ending(cut[end_of_answers - 1].text):
            found.append(Segment(end, cut[end_of_answers - 1].supervised))
        return found

    def _hidden(self, value: Any, literals: list[str]) -> Any:
        """Return a value whose texts, at any depth, have every string that would become a special token replaced."""
        if isinstance(value, str):

            def hide(found: str) -> str:
                literals.append(found)
                return f"{_OPEN}{chr(_FIRST + len(literals) - 1)}{_CLOSE}"

            return self._to_hide.replace(value, hide)
        if isinstance(value, dict):
            return {self._hidden(key, literals): self._hidden(part, literals) for key, part in value.items()}
        return [self._hidden(part, literals) for part in value] if isinstance(value, (list, tuple)) else value

    def _guarded(self, message: dict[str, Any], literals: list[str]) -> dict[str, Any]:
        """Return a turn as the template gets it: its own spelling of special tokens hidden, and nothing of ours."""
        parts = [
            {"type": "text", "text": self._hidden(part["text"], literals)}
            if part["type"] == "text"
            else {"type": part["type"]}
            for part in message["content"]
        ]
        more = {
            key: self._hidden(message[key], literals) for key in (*_TEMPLATED, "tool_call_id", "name") if key in message
        }
        # templates with tools join a tool's answer to the text around it, so it has to be text
        content = "".join(p["text"] for p in parts) if message["role"] == "tool" and _are_texts(parts) else parts
        return {"role": message["role"], "content": content, **more}

    # templates drop what they do not know without an error, so each field is checked by rendering without it
    def _check_written(self, messages: list[dict[str, Any]], tools: Any, text: str, name: str) -> None:
        """Refuse a template that leaves out what the sample says."""
        for message in messages:
            content = message["content"]
            said = (
                [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
            )
            for part in said:
                if part.strip() not in text:
                    raise SampleError(
                        "template",
                        f"{name}: the chat template leaves out or rewrites the text of a {message['role']} turn",
                    )
        told = "drop it, or give the processor a chat template that writes it"
        for place, message in enumerate(messages):
            # few templates write a tool's name, which its call says; of other turns it is who speaks
            named = ("name",) if message["role"] != "tool" else ()
            for key in (key for key in (*_TEMPLATED, *named) if key in message):
                bare = [{k: v for k, v in m.items() if k != key} if m is message else m for m in messages]
                if self._render(bare, tools=tools) == self._render(messages, tools=tools):
                    raise SampleError(
                        "template", f"{name}: the chat template leaves out {key} of turn {place + 1}; {told}"
                    )
        if tools and self._render(messages, tools=tools) == self._render(messages):
            raise SampleError("template", f"{name}: the chat template leaves out the tools; {told}")

    def _cut_at_blocks(self, messages: list[dict[str, Any]], tools: Any, trains: list[bool], name: str) -> list[_Cut]:
        """Cut at the template's generation blocks."""
        # not public in transformers, but it alone returns the character spans of the blocks: apply_chat_template turns them
        # into token masks, which are wrong where image tokens are expanded (issues above)
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **({"tools": tools} if tools else {}),
            **self._named,
        )
        text, done, cut = rendered[0], 0, list[_Cut]()
        if not all(trains) and len(spans[0]) != len(trains):
            raise SampleError(
                "template",
                f"{name}: the chat template marks {len(spans[0])} answers of {len(trains)} assistant turns, so that it is not "
                "known which of them is not to be supervised",
            )
        for number, (start, end) in enumerate(spans[0]):
            begin = start - len(self._generated_space(text[done:start]))
            answer = text[begin:end].rstrip()
            cut += [_Cut(text[done:begin]), _Cut(answer, True, all(trains) or trains[number])]
            done = begin + len(answer)
        return [*cut, _Cut(text[done:].rstrip())]

    def _generated_space(self, prompt: str) -> str:
        """Return white space at the end of a prompt that serving leaves to the model: what follows the generation prompt."""
        space = prompt[len(prompt.rstrip()) :]
        fits = [n for n in range(len(space) + 1) if self._opening and prompt.endswith(self._opening + space[n:])]
        return space[fits[0] :] if fits else ""

    @cached_property
    def _opening(self) -> str:
        """What the template adds to ask for an answer; "" when it adds nothing."""
        asked = [{"role": "user", "content": [{"type": "text", "text": "\ufdd2"}]}]
        try:
            bare, prompt = self._render(asked), self._render(asked, prompt=True)
        except Exception:  # samples will say it
            return ""
        return prompt[len(bare) :] if prompt.startswith(bare) else ""

    def _cut_by_turns(self, messages: list[dict[str, Any]], tools: Any, trains: list[bool], name: str) -> list[_Cut]:
        """Cut where generation would start, turn by turn, for templates without generation blocks."""
        done, cut = "", list[_Cut]()
        for end, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:end], prompt=True, tools=tools)
            full = self._render(messages[: end + 1], tools=tools)
            if not (prompt.startswith(done) and full.startswith(prompt)):
                raise SampleError(
                    "template",
                    f"{name}: the chat template rewrites earlier turns, so the answers cannot be told from the prompt",
                )
            answer = full[len(prompt) :].rstrip()
            cut += [_Cut(prompt[len(done) :]), _Cut(answer, True, trains[len(cut) // 2])]
            done = prompt + answer
        return cut

    def _check(self, cut: list[_Cut], sample: Sample) -> None:
        for kind, given in (("image", sample.images), ("video", sample.videos)):
            written = self.count("".join(part.text for part in cut), kind) if given else 0
            if written != len(given):
                raise SampleError(
                    "template" if self.placeholders[kind] else "video_unsupported",
                    f"{sample.name} has {len(given)} {kind}(s) and the chat template writes {written} placeholder(s) for them; "
                    f"this model's template takes no {kind}s there",
                )
        if not any(part.supervised and part.text.strip() for part in cut):
            told = "the chat template marks nothing of it as supervised"
            if any(part.answer and part.text.strip() for part in cut):
                told = "no assistant turn of it is to be supervised (train, weight, or answers in a prompt); drop it"
            raise SampleError("no_supervised_tokens", f"{sample.name}: {told}")

    def count(self, text: str, kind: str) -> int:
        """Return placeholders of a kind in rendered text (a sample's own spelling of one is hidden or cut apart by then)."""
        placeholder = self.placeholders[kind]
        return text.count(placeholder) if placeholder else 0

    @cached_property
    def _special_ids(self) -> set[int]:
        """Ids that a literal must not get; a special token that the tokenizer does not know has none of its own."""
        return set(self.protected.values()) - {self.processor.tokenizer.unk_token_id}

    def literal_ids(self, text: str) -> list[int]:
        """Return the token ids of a string that must not become a special token."""
        tokenizer = self.processor.tokenizer
        unknown = tokenizer.unk_token_id
        kept = self._special_ids
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if kept.isdisjoint(ids):
            return list(ids)
        # a tokenizer may still build the special token's id from pieces; single characters cannot
        apart = [tokenizer(c, add_special_tokens=False, split_special_tokens=True)["input_ids"] for c in text]
        return [i for part in apart for i in part if i == unknown or i not in kept]


def _are_texts(parts: list[dict[str, Any]]) -> bool:
    return all(part["type"] == "text" for part in parts)


def _difference(bare: str, full: str) -> str:
    """Return what `full` has and `bare` has not, without the white space around it."""
    start = 0
    while start < len(bare) and start < len(full) and bare[start] == full[start]:
        start += 1
    end = 0
    while end < min(len(bare), len(full)) - start and bare[-1 - end] == full[-1 - end]:
        end += 1
    return full[start : len(full) - end].strip()


def _split(text: str, supervised: bool, literals: list[str]) -> list[Segment]:
    """Return a cut with the hidden strings brought back as segments of their own."""
    found = []
    for part in re.split(f"{_OPEN}(.){_CLOSE}", text) if _OPEN in text else [text]:
        index = ord(part) - _FIRST if len(part) == 1 else -1
        if 0 <= index < len(literals):
            found.append(Segment(literals[index], supervised, True))
        elif part:
            found.append(Segment(part, supervised))
    return found
