"""Questions with images to an OpenAI-compatible server, many at once, greedily.

Messages have TRL's form: content parts {"type": "image"} mark places, and the pictures stand in a list beside the
messages. Each picture is made RGB and sent as PNG, which loses nothing: a server that runs the checkpoint's own
processor then sees the pixels that training saw. (Alpha is dropped here as processors drop it; a server handed RGBA
may lay it on white instead. JPEG would change every pixel.) Only the standard library and Pillow are used.
"""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image


class AskError(RuntimeError):
    """The server refused a question or sent something that is no chat completion; the message says which and why."""


@dataclass(frozen=True)
class Answer:
    """One greedy answer. token_ids: what was generated, the end token included where the server reports it. prompt_ids:
    the prompt with image places unfolded. logprobs: of each token, in nats. top: per token, {token id: nats}."""

    text: str
    token_ids: list[int]
    prompt_ids: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


def data_url(image: Image.Image) -> str:
    """The picture as a base64 PNG data URL, RGB."""
    out = io.BytesIO()
    image.convert("RGB").save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """OpenAI messages: each {"type": "image"} part becomes the next picture of `images`.

    Raises ValueError when parts and pictures differ in number.
    """
    places = sum(part.get("type") == "image" for turn in messages for part in _parts(turn))
    if places != len(images):
        raise ValueError(f"the messages have {places} image places but {len(images)} images were given")
    rest = iter(images)

    def fill(part: Mapping[str, Any]) -> dict[str, Any]:
        if part.get("type") != "image":
            return dict(part)
        return {"type": "image_url", "image_url": {"url": data_url(next(rest))}}

    return [
        {"role": turn["role"], "content": [fill(part) for part in _parts(turn)] or turn["content"]} for turn in messages
    ]


def ask(
    url: str,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    images: Sequence[Image.Image] = (),
    *,
    max_tokens: int = 16,
    top: int = 0,
    timeout: float = 300.0,
) -> Answer:
    """One greedy chat completion. top: how many alternatives per token to report (0: log-probabilities are not asked
    for).

    Raises AskError when the server refuses the question or does not answer within `timeout` seconds.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": with_images(messages, images),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "return_token_ids": True,
    }
    if top:
        body |= {"logprobs": True, "top_logprobs": top, "return_tokens_as_token_ids": True}
    request = urllib.request.Request(
        url + "/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=timeout) as reply:
            return _answer(json.load(reply))
    except urllib.error.HTTPError as error:
        raise AskError(f"the server refused a question ({error.code}): {error.read().decode()[:500]}") from error
    except (urllib.error.URLError, TimeoutError) as error:
        raise AskError(f"no answer from {url} within {timeout:.0f} s: {error}") from error


def ask_all(
    url: str,
    model: str,
    questions: Sequence[Mapping[str, Any]],
    *,
    max_tokens: int = 16,
    top: int = 0,
    workers: int = 8,
    on_answer: Callable[[], None] | None = None,
) -> list[Answer]:
    """Answers in the order of `questions`, each a {"messages": [...], "images": [...]}, `workers` of them at a time.

    on_answer is called after each answer, for a progress bar. Raises AskError as `ask` does; later questions are
    dropped.
    """

    def one(question: Mapping[str, Any]) -> Answer:
        answer = ask(url, model, question["messages"], question.get("images", ()), max_tokens=max_tokens, top=top)
        if on_answer is not None:
            on_answer()
        return answer

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(one, question) for question in questions]
        try:
            return [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _parts(turn: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
    return [] if isinstance(turn["content"], str) else turn["content"]


def _answer(reply: Mapping[str, Any]) -> Answer:
    try:
        choice = reply["choices"][0]
        steps = (choice.get("logprobs") or {}).get("content") or []
        return Answer(
            text=choice["message"]["content"] or "",
            token_ids=list(choice.get("token_ids") or []),
            prompt_ids=list(reply.get("prompt_token_ids") or []),
            logprobs=[step["logprob"] for step in steps],
            top=[{_token_id(other["token"]): other["logprob"] for other in step["top_logprobs"]} for step in steps],
        )
    except (KeyError, IndexError, TypeError) as error:
        raise AskError(f"not a chat completion: {json.dumps(reply)[:500]}") from error


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))
