"""Questions over HTTP, to a server in this process: what is sent, what is read back and what is refused."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from grace_plugin.serve.ask import AskError, ask, ask_all, data_url, with_images
from grace_plugin.serve.probe import Answer
from tests.tiny import make_samples

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A chat completion that says how many images it saw, with log-probabilities if they were asked for."""
    parts = [part for turn in body["messages"] if not isinstance(turn["content"], str) for part in turn["content"]]
    seen = sum(part["type"] == "image_url" for part in parts)
    choice: dict[str, Any] = {"message": {"content": f"{seen} images"}, "token_ids": [7, 8]}
    if body.get("logprobs"):
        other = [{"token": "token_id:7", "logprob": -0.5}, {"token": "token_id:9", "logprob": -1.5}]
        choice["logprobs"] = {"content": [{"token": "token_id:7", "logprob": -0.5, "top_logprobs": other}]}
    return 200, {"choices": [choice], "prompt_token_ids": [1, 2, 3]}


@pytest.fixture
def address() -> Iterator[Callable[[Reply], tuple[str, list[dict[str, Any]]]]]:
    """Start a server with a way to reply; gives its address and the list of bodies it received."""
    servers: list[ThreadingHTTPServer] = []

    def start(reply: Reply) -> tuple[str, list[dict[str, Any]]]:
        bodies: list[dict[str, Any]] = []

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/chat/completions"
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                bodies.append(body)
                code, sent = reply(body)
                self.send_response(code)
                self.end_headers()
                self.wfile.write(json.dumps(sent).encode())

            def log_message(self, *_: Any) -> None:
                """Say nothing on stderr."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}", bodies

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_data_url__rgb_image__every_pixel_comes_back() -> None:
    image = make_samples(1, seed=3)[0]["images"][0]
    head, body = data_url(image).split(",", 1)
    back = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/png;base64"
    assert back.mode == "RGB"
    assert back.tobytes() == image.tobytes()


def test_data_url__transparent_image__alpha_is_dropped() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    back = Image.open(io.BytesIO(base64.b64decode(data_url(clear).split(",", 1)[1])))
    assert back.getpixel((0, 0)) == (10, 20, 30)


def test_with_images__two_images__in_the_order_of_their_parts() -> None:
    sample = make_samples(1, seed=4, images=2)[0]
    messages = [{"role": "system", "content": "be brief"}, sample["messages"][0]]
    sent = with_images(messages, sample["images"])
    urls = [part["image_url"]["url"] for part in sent[1]["content"] if part["type"] == "image_url"]
    assert sent[0] == {"role": "system", "content": "be brief"}
    assert urls == [data_url(image) for image in sample["images"]]
    assert sent[1]["content"][-1] == sample["messages"][0]["content"][-1]


@pytest.mark.parametrize(("parts", "given"), [(1, 2), (2, 1), (0, 1)])
def test_with_images__parts_and_images_differ_in_number__refused(parts: int, given: int) -> None:
    messages = make_samples(1, seed=5, images=parts)[0]["messages"][:1]
    images = make_samples(1, seed=5, images=given)[0]["images"]
    with pytest.raises(ValueError, match=f"{parts} image parts but {given} images"):
        with_images(messages, images)


def test_ask__top__log_probabilities_are_read(address: Any) -> None:
    url, bodies = address(completion)
    sample = make_samples(1, seed=6, images=2)[0]
    answer = ask(url, "tiny", sample["messages"][:1], sample["images"], max_tokens=3, top=2)
    assert answer == Answer("2 images", [1, 2, 3], [7, 8], [-0.5], [{7: -0.5, 9: -1.5}])
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == ("tiny", 3, 0.0)
    assert bodies[0]["top_logprobs"] == 2


def test_ask__no_top__log_probabilities_are_not_requested(address: Any) -> None:
    url, bodies = address(completion)
    answer = ask(url, "tiny", make_samples(1, images=0)[0]["messages"][:1])
    assert "logprobs" not in bodies[0]
    assert answer == Answer("0 images", [1, 2, 3], [7, 8], [], [])


def test_ask_all__three_workers__order_of_the_questions(address: Any) -> None:
    url, _ = address(completion)
    counts = [0, 2, 1, 2, 0, 1]
    questions = [
        {"messages": sample["messages"][:1], "images": sample["images"]}
        for number in counts
        for sample in make_samples(1, seed=number, images=number)
    ]
    counted: list[int] = []
    answers = ask_all(url, "tiny", questions, workers=3, on_answer=lambda: counted.append(1))
    assert [answer.text for answer in answers] == [f"{number} images" for number in counts]
    assert len(counted) == len(questions)


def test_ask_all__server_refuses__error_with_its_message(address: Any) -> None:
    url, _ = address(lambda body: (400, {"error": "at most 1 image"}))
    with pytest.raises(AskError, match=r"refused a question \(400\).*at most 1 image"):
        ask_all(url, "tiny", [{"messages": make_samples(1, images=0)[0]["messages"][:1]}])


def test_ask__reply_without_choices__error(address: Any) -> None:
    url, _ = address(lambda body: (200, {"choices": []}))
    with pytest.raises(AskError, match="not a chat completion"):
        ask(url, "tiny", make_samples(1, images=0)[0]["messages"][:1])


def test_ask__no_server__error() -> None:
    with pytest.raises(AskError, match=r"no answer from http://127\.0\.0\.1:9 "):
        ask("http://127.0.0.1:9", "tiny", make_samples(1, images=0)[0]["messages"][:1], timeout=2)
