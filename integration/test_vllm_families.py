"""Every family end to end: GRACE for 30 steps, a checkpoint on disk, vLLM in its own environment, judged by
transformers.

All checkpoints are answered in one vLLM process (its import is most of the time), on images that training never saw:
one, two or none per prompt. Measured: log-probabilities differ by 0.003 nats on average and 0.03 at most, no token
differs; with the wrong image given to transformers the mean is 0.15 to 0.3. The bounds below are between those
two.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from grace_plugin.serve.launch import kernel_of
from grace_plugin.serve.probe import Answer, Job, probe
from integration.parity import INT4_KERNEL, Parity, judge, prompts, without_colour
from tests.pairs import Pair, pair, recipe_text, run
from tests.tiny import FAMILIES, make_samples

pytestmark = pytest.mark.vllm

MEAN, MOST, NEAR_TIE = 0.01, 0.08, 0.05  # nats
LEFT_OUT = "llava, groups of 32, two layers left out"
QUESTIONS = prompts(make_samples(12, seed=21) + make_samples(4, seed=22, images=2) + make_samples(4, seed=23, images=0))


class Served(NamedTuple):
    """A checkpoint and what vLLM answered from it; kernels: INT4 kernels named in vLLM's log."""

    checkpoint: Path
    answers: list[Answer]
    kernel: str | None


def trained(pair: Pair, output: Path, recipe: str) -> Path:
    """Thirty steps over samples with one, two and no images."""
    dataset = make_samples(32, seed=1) + make_samples(8, seed=2, images=2) + make_samples(8, seed=3, images=0)
    options = {"max_steps": 30, "per_device_train_batch_size": 4, "learning_rate": 3e-3}
    return run(pair, output, dataset, recipe=recipe, **options).checkpoint


def grouped(teacher: Path, group: int, ignore: list[str]) -> str:
    """A recipe with its own group size and more linears left in BF16."""
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return recipe_text(teacher, scheme=None, config_groups=groups, ignore=ignore)


@pytest.fixture(scope="module")
def served(serve_python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Served]:
    """Train one checkpoint for each family and one with other groups, then ask vLLM about all of them."""
    root = tmp_path_factory.mktemp("families")
    checkpoints = {}
    for family in FAMILIES:
        made = pair(family, root / family)
        checkpoints[family] = trained(made, root / family / "out", recipe_text(made.teacher))
    llava = Pair("llava", root / "llava" / "student", root / "llava" / "teacher")
    ignore = [r"re:.*layers\.0\.mlp\.down_proj$", r"re:.*layers\.1\.self_attn\.(q|k|v)_proj$"]
    checkpoints[LEFT_OUT] = trained(llava, root / "left_out", grouped(llava.teacher, 32, ignore))
    answers, log = probe(serve_python, [Job(path, QUESTIONS, max_tokens=12) for path in checkpoints.values()])
    kernel = kernel_of(log)
    return {name: Served(path, said, kernel) for (name, path), said in zip(checkpoints.items(), answers, strict=True)}


@pytest.fixture(scope="module")
def parity_of(served: dict[str, Served]) -> Callable[[str], Parity]:
    """name -> its comparison with transformers, made once."""
    made: dict[str, Parity] = {}

    def get(name: str) -> Parity:
        if name not in made:
            made[name] = judge(served[name].checkpoint, QUESTIONS, served[name].answers)
            print(name, made[name])
        return made[name]

    return get


@pytest.mark.parametrize("name", [*FAMILIES, LEFT_OUT])
def test_prompts__vllm_and_transformers__same_tokens(parity_of: Callable[[str], Parity], name: str) -> None:
    assert parity_of(name).prompts_differing == 0


@pytest.mark.parametrize("name", [*FAMILIES, LEFT_OUT])
def test_log_probabilities__vllm_and_transformers__within_the_bound(
    parity_of: Callable[[str], Parity], name: str
) -> None:
    parity = parity_of(name)
    assert parity.tokens >= 6 * len(QUESTIONS)
    assert parity.mean < MEAN, str(parity)
    assert max(parity.differences) < MOST, str(parity)


@pytest.mark.parametrize("name", [*FAMILIES, LEFT_OUT])
def test_tokens__vllm_and_transformers__equal_but_for_near_ties(parity_of: Callable[[str], Parity], name: str) -> None:
    parity = parity_of(name)
    assert len(parity.margins) <= parity.tokens // 50, str(parity)
    assert max(parity.margins, default=0.0) < NEAR_TIE, str(parity)


@pytest.mark.parametrize("family", FAMILIES)
def test_comparison__other_images__noticed(
    served: dict[str, Served], parity_of: Callable[[str], Parity], family: str
) -> None:
    other = judge(served[family].checkpoint, without_colour(QUESTIONS), served[family].answers)
    assert other.prompts_differing == 0
    assert other.mean > max(10 * parity_of(family).mean, 3 * MEAN), str(other)


def test_kernel__every_checkpoint__int4(served: dict[str, Served]) -> None:
    assert {one.kernel for one in served.values()} == {INT4_KERNEL}


@pytest.mark.parametrize("family", FAMILIES)
def test_answers__every_family__words_of_the_task(served: dict[str, Served], family: str) -> None:
    texts = [answer.text for answer in served[family].answers]
    assert sum("ground" in text for text in texts) > len(texts) // 2, texts
