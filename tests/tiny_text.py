"""Words and pictures for the tiny models: tokenizers trained on a few sentences, chat templates, conversation samples.

Everything is drawn from seeds; the pictures are a coloured shape on a coloured ground, and the answer says which.
"""

from __future__ import annotations

import random
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

COLORS = {"red": (220, 40, 30), "green": (40, 190, 50), "blue": (40, 60, 220), "yellow": (235, 215, 40)}
SHAPES = ("square", "circle")
SENTENCES = {
    "plain": [
        "what is the shape and what is its colour? answer in a few words.",
        *(f"a {colour} {shape} on a {ground} ground" for colour in COLORS for shape in SHAPES for ground in COLORS),
        "say which colour stands left and which stands right",
        "user assistant system USER: ASSISTANT: yes no one two three four",
    ],
    "other": ["zebra quartz vexing jumbled foxglove wharf", "pygmies dozing by liquid jackdaw lakes"] * 4,
}
LLAVA_SPECIAL = ["<unk>", "<s>", "</s>", "<pad>", "<image>"]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
                "<|video_pad|>"]  # fmt: skip
MARKS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
GRID = {f"r{r}c{c}": f"<row_{r}_col_{c}>" for r in (1, 2) for c in (1, 2)}
CHAT = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
TILES = {
    "fake": "<fake_token_around_image>",
    "image_token": "<image>",
    "global": "<global-img>",
}
#: further families: tokens of the tokenizer itself, and those it names for the processor
SPECIAL: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "llava_onevision": (CHAT, {"image_token": "<image>", "video_token": "<video>", "start": "<|im_start|>"}),
    "pixtral": (MARKS, {"image_token": "[IMG]", "break": "[IMG_BREAK]", "end": "[IMG_END]"}),
    "internvl": (CHAT, {
        "start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>", "start": "<|im_start|>",
    }),
    # the turn's end is the end of text, so that an answer ends where learning it ended
    "idefics3": (CHAT | {"eos_token": "<end_of_utterance>"}, TILES | GRID),
    # line breaks are tokens of Gemma's own vocabulary, and vLLM looks them up
    "gemma3": ({"unk_token": "<unk>", "bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}, {
        "image_token": "<image_soft_token>", "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>",
        **{f"lines{k}": "\n" * k for k in (1, 2, 3, 4)},
    }),
}  # fmt: skip
SPECIAL |= {
    "deepseek_vl": (MARKS, {"image_token": "<image_placeholder>"}),
    "mistral3": SPECIAL["pixtral"],
    "smolvlm": SPECIAL["idefics3"],
}


def chat_template(image: str, video: str = "", end: str = "<|im_end|>") -> str:
    """A template without generation marks: `role: parts`, closed by `end`; `image` and `video` stand for the pictures."""
    parts = (
        "{% for c in m['content'] %}{% if c['type'] == 'image' %}" + image + "{% elif c['type'] == 'video' %}" + video
        + "{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    )  # fmt: skip
    return (
        "{% for m in messages %}{{ m['role'] }}: {% if m['content'] is string %}{{ m['content'] }}{% else %}" + parts
        + "{% endif %}" + end + "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )  # fmt: skip


LLAVA_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'assistant' %}ASSISTANT:{% generation %} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endif %}</s>{% endgeneration %}"
    "{% else %}{{ m['role'].upper() }}: "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n{% else %}{{ c['text'] }}{% endif %}{% endfor %}"
    "{% endif %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
QWEN_TURN = (
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif c['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endif %}"
)
QWEN2_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n" + QWEN_TURN + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}"
    "{% generation %}" + QWEN_TURN + "<|im_end|>{% endgeneration %}{% else %}" + QWEN_TURN + "<|im_end|>{% endif %}"
    "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_samples(count: int, seed: int = 0, *, images: int = 1, size: int | None = None) -> list[dict[str, Any]]:
    """`count` conversations in TRL's form: {"messages": [...], "images": [PIL RGB, ...]}, drawn from `seed`.

    images: pictures in each sample (0 gives text-only samples, with an empty list). size: side in pixels; by default sides
    differ from picture to picture (64 to 112), so that families with dynamic resolution see several token counts.
    """
    draw = random.Random(seed)
    return [_sample(draw, images, size) for _ in range(count)]


def _sample(draw: random.Random, images: int, size: int | None) -> dict[str, Any]:
    pictures, answers = [], []
    for _ in range(max(images, 1)):
        colour, shape, ground = draw.choice(list(COLORS)), draw.choice(SHAPES), draw.choice(list(COLORS))
        sides = (size, size) if size else (draw.randrange(64, 113, 4), draw.randrange(64, 113, 4))
        pictures.append(_picture(colour, shape, ground, sides, draw.randrange(6)))
        answers.append(f"a {colour} {shape} on a {ground} ground")
    question = "what is the shape and what is its colour?" if images else "say " + answers[0]
    content = [{"type": "image"} for _ in range(images)] + [{"type": "text", "text": question}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": ", ".join(answers)}]},
    ]
    return {"messages": messages, "images": pictures[:images]}


def _picture(colour: str, shape: str, ground: str, sides: tuple[int, int], shift: int) -> Image.Image:
    picture = Image.new("RGB", sides, COLORS[ground])
    width, height = sides
    box = (width // 4 + shift, height // 4 + shift, width * 3 // 4 + shift, height * 3 // 4 + shift)
    paint = ImageDraw.Draw(picture)
    (paint.rectangle if shape == "square" else paint.ellipse)(box, fill=COLORS[colour], outline=(0, 0, 0), width=2)
    return picture


def make_tokenizer(family: str, words: str = "plain") -> PreTrainedTokenizerFast:
    """Byte-level BPE (no text gives an unknown token) trained on a few sentences; `words` chooses which."""
    if family in ("llava", "llava_next"):
        named, extra, special = MARKS, {"image_token": "<image>"}, LLAVA_SPECIAL
    elif family in SPECIAL:
        named, extra = SPECIAL[family]
        special = [*named.values(), *extra.values()]
    else:
        named, special = CHAT, QWEN_SPECIAL
        extra = {
            "image_token": "<|image_pad|>", "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>", "vision_end_token": "<|vision_end|>",
        }  # fmt: skip
    core = Tokenizer.from_str(_bpe(tuple(special), words))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, padding_side="left", extra_special_tokens=dict(extra),
        **named,
    )  # fmt: skip


@lru_cache
def _bpe(special: tuple[str, ...], words: str) -> str:
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(SENTENCES[words], trainer)
    return core.to_str()
