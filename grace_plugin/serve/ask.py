"""Ask an OpenAI-compatible server questions with images, many at once, greedily."""

from __future__ import annotations

import base64
import io
import json
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from PIL import Image

from grace_plugin.serve.probe import Answer


class AskError(RuntimeError):
    """The server refused a question, did not answer, or sent something that is no chat completion."""


def data_url(image: Image.Image) -> str:
    """Return the image as a base64 PNG data URL, RGB."""
    out = io.BytesIO()
    # PNG, because JPEG changes every pixel. RGB here, as processors drop alpha; a server given RGBA may lay it on white.
    image.convert("RGB").save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return OpenAI messages, in which each {"type": "image"} part has become the next of `images`.

    Raises:
        ValueError: the numbers of parts and of images differ.
    """
    parts = sum(part.get("type") == "image" for turn in messages for part in _parts(turn))
    if parts != len(images):
        raise ValueError(f"the messages have {parts} image parts but {len(images)} images were given")
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
    """Request one greedy chat completion.

    Args:
        messages: with content parts {"type": "image"} where an image belongs.
        top: alternatives per token to report; 0 asks for no log-probabilities.
        timeout: seconds.

    Raises:
        AskError: the server refuses the question or does not answer in time.
    """
    body: dict[str, Any] = {
        "model": model,
        "messages": with_images(messages, images),
        "max_tokens": max_tokens,
        "temperature": 0.0,
        "return_token_ids": True,
    }
    if top:
        # ids, because several tokens may have the same text
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
    """Ask `workers` questions at a time; returns the answers in the order of the questions.

    Args:
        questions: {"messages": [...], "images": [...]} each.
        on_answer: called after each answer, for a progress bar.

    Raises:
        AskError: as `ask`; the questions that were not sent yet are dropped.
    """

    def one(question: Mapping[str, Any]) -> Answer:
        answer = ask(url, model, question["messages"], question.get("images", ()), max_tokens=max_tokens, top=top)
        if on_answer is not None:
            on_answer()
        return answer

    # threads: each only waits for the server, which batches what arrives together
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
