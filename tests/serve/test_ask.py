"""Questions over HTTP: what is sent, what is read back, what is refused. A server in this process speaks the API's form."""

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

from grace_plugin.serve.ask import Answer, AskError, ask, ask_all, data_url, with_images
from tests.tiny import make_samples

Reply = Callable[[dict[str, Any]], tuple[int, dict[str, Any]]]


def completion(body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """A chat completion that says how many pictures it saw, with log-probabilities if they were asked for."""
    parts = [part for turn in body["messages"] if not isinstance(turn["content"], str) for part in turn["content"]]
    seen = sum(part["type"] == "image_url" for part in parts)
    choice: dict[str, Any] = {"message": {"content": f"{seen} pictures"}, "token_ids": [7, 8]}
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


def test_a_data_url_holds_every_pixel() -> None:
    picture = make_samples(1, seed=3)[0]["images"][0]
    head, body = data_url(picture).split(",", 1)
    back = Image.open(io.BytesIO(base64.b64decode(body)))
    assert head == "data:image/png;base64"
    assert back.mode == "RGB"
    assert back.tobytes() == picture.tobytes()


def test_transparency_is_dropped_as_processors_drop_it() -> None:
    clear = Image.new("RGBA", (4, 4), (10, 20, 30, 0))
    back = Image.open(io.BytesIO(base64.b64decode(data_url(clear).split(",", 1)[1])))
    assert back.getpixel((0, 0)) == (10, 20, 30)


def test_pictures_go_where_their_places_are() -> None:
    row = make_samples(1, seed=4, images=2)[0]
    messages = [{"role": "system", "content": "be brief"}, row["messages"][0]]
    sent = with_images(messages, row["images"])
    urls = [part["image_url"]["url"] for part in sent[1]["content"] if part["type"] == "image_url"]
    assert sent[0] == {"role": "system", "content": "be brief"}
    assert urls == [data_url(image) for image in row["images"]]
    assert sent[1]["content"][-1] == row["messages"][0]["content"][-1]


@pytest.mark.parametrize(("places", "given"), [(1, 2), (2, 1), (0, 1)])
def test_places_and_pictures_must_be_as_many(places: int, given: int) -> None:
    messages = make_samples(1, seed=5, images=places)[0]["messages"][:1]
    pictures = make_samples(1, seed=5, images=given)[0]["images"]
    with pytest.raises(ValueError, match=f"{places} image places but {given} images"):
        with_images(messages, pictures)


def test_an_answer_is_read_with_its_log_probabilities(address: Any) -> None:
    url, bodies = address(completion)
    row = make_samples(1, seed=6, images=2)[0]
    answer = ask(url, "tiny", row["messages"][:1], row["images"], max_tokens=3, top=2)
    assert answer == Answer("2 pictures", [7, 8], [1, 2, 3], [-0.5], [{7: -0.5, 9: -1.5}])
    assert (bodies[0]["model"], bodies[0]["max_tokens"], bodies[0]["temperature"]) == ("tiny", 3, 0.0)
    assert bodies[0]["top_logprobs"] == 2


def test_without_top_no_log_probabilities_are_asked_for(address: Any) -> None:
    url, bodies = address(completion)
    answer = ask(url, "tiny", make_samples(1, images=0)[0]["messages"][:1])
    assert "logprobs" not in bodies[0]
    assert answer == Answer("0 pictures", [7, 8], [1, 2, 3], [], [])


def test_many_answers_keep_the_order_of_their_questions(address: Any) -> None:
    url, _ = address(completion)
    pictures = [0, 2, 1, 2, 0, 1]
    questions = [
        {"messages": row["messages"][:1], "images": row["images"]}
        for number in pictures
        for row in make_samples(1, seed=number, images=number)
    ]
    counted: list[int] = []
    answers = ask_all(url, "tiny", questions, workers=3, on_answer=lambda: counted.append(1))
    assert [answer.text for answer in answers] == [f"{number} pictures" for number in pictures]
    assert len(counted) == len(questions)


def test_a_refusal_carries_the_servers_words(address: Any) -> None:
    url, _ = address(lambda body: (400, {"error": "at most 1 image"}))
    with pytest.raises(AskError, match=r"refused a question \(400\).*at most 1 image"):
        ask_all(url, "tiny", [{"messages": make_samples(1, images=0)[0]["messages"][:1]}])


def test_a_reply_of_another_form_is_an_error(address: Any) -> None:
    url, _ = address(lambda body: (200, {"choices": []}))
    with pytest.raises(AskError, match="not a chat completion"):
        ask(url, "tiny", make_samples(1, images=0)[0]["messages"][:1])


def test_nobody_listening_is_an_error() -> None:
    with pytest.raises(AskError, match=r"no answer from http://127\.0\.0\.1:9 "):
        ask("http://127.0.0.1:9", "tiny", make_samples(1, images=0)[0]["messages"][:1], timeout=2)
