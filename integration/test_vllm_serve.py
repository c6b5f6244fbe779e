"""`vllm serve` on a GRACE checkpoint, asked over HTTP as a user would, and what is left when it ends.

One server start (20 to 30 s) serves every test of this file; the answers are judged by transformers as in
test_vllm_families. A checkpoint that vLLM cannot read must end in an error that carries vLLM's own words.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from PIL import Image

from grace_plugin.serve.ask import AskError, ask, ask_all
from grace_plugin.serve.launch import Server, ServerError, serve
from integration.parity import INT4_KERNEL, judge, prompts
from tests.pairs import pair, recipe_text, run
from tests.tiny import make_samples

pytestmark = pytest.mark.vllm

QUESTIONS = prompts(make_samples(24, seed=31))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint after 30 steps."""
    root = tmp_path_factory.mktemp("served")
    made = pair("llava", root)
    options = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    return run(made, root / "out", make_samples(48, seed=1), recipe=recipe_text(made.teacher), **options).checkpoint


@pytest.fixture(scope="module")
def server(checkpoint: Path, serve_python: Path) -> Iterator[Server]:
    with serve(checkpoint, serve_python, max_model_len=512) as running:
        yield running
    with socket.socket() as probe:  # the port is free again: nothing listens
        assert probe.connect_ex(("127.0.0.1", urlsplit(running.url).port)) != 0
    left = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(checkpoint) not in left


def test_ask_all__over_http__answers_equal_transformers(server: Server, checkpoint: Path) -> None:
    counted = []
    answers = ask_all(server.url, server.model, QUESTIONS, max_tokens=12, top=3, on_answer=lambda: counted.append(1))
    parity = judge(checkpoint, QUESTIONS, answers)
    assert len(counted) == len(QUESTIONS)
    assert parity.prompts_differing == 0
    assert parity.tokens >= 6 * len(QUESTIONS)
    assert max(parity.differences) < 0.08, str(parity)
    assert max(parity.margins, default=0.0) < 0.05, str(parity)
    assert len(parity.margins) <= parity.tokens // 50, str(parity)


def test_server__int4_checkpoint__kernel_is_named(server: Server) -> None:
    assert server.kernel == INT4_KERNEL


def test_ask_all__many_at_once__order_and_text_as_one_by_one(server: Server) -> None:
    at_once = ask_all(server.url, server.model, QUESTIONS[:6], max_tokens=8)
    one_by_one = [ask(server.url, server.model, one["messages"], one["images"], max_tokens=8) for one in QUESTIONS[:6]]
    assert [answer.text for answer in at_once] == [answer.text for answer in one_by_one]
    assert all(answer.text.strip() for answer in at_once)
    assert at_once[0].logprobs == []


def test_ask__one_image_too_many__refused_with_the_servers_message(server: Server) -> None:
    one = prompts(make_samples(1, seed=32, images=2))[0]
    with pytest.raises(AskError, match=r"refused a question \(400\).*image"):
        ask(server.url, server.model, one["messages"], one["images"])


def test_ask__transparent_image__same_answer_as_without_alpha(server: Server) -> None:
    image = QUESTIONS[0]["images"][0]
    clear = image.convert("RGBA")
    clear.putalpha(Image.new("L", image.size, 40))
    first, second = (
        ask(server.url, server.model, QUESTIONS[0]["messages"], [given], top=1) for given in (image, clear)
    )
    assert first.logprobs == pytest.approx(second.logprobs, abs=1e-3)


def test_serve__checkpoint_vllm_cannot_read__error_with_its_log(
    checkpoint: Path, serve_python: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint, broken)
    config = json.loads((broken / "config.json").read_text())
    config["quantization_config"]["ignore"] = []
    (broken / "config.json").write_text(json.dumps(config))
    with (
        pytest.raises(ServerError, match=r"vLLM ended with code [1-9](.|\n)*end of .*vllm\.log"),
        serve(broken, serve_python),
    ):
        pytest.fail("vLLM served a checkpoint whose vision tower has no quantized weights")
