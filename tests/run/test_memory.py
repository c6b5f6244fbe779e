"""Optimizers with 8-bit states, and activations kept on the host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import TrainerCallback

from grace_plugin.run.memory import offloaded
from tests.pairs import Pair, mixed_samples, pair, recipe_text, run

LIBRARIES = {"adamw_bnb_8bit": "bitsandbytes", "adamw_torch_8bit": "torchao"}
GROUPS = {"all": {"targets": ["Linear"], "weights": {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32,
}}}  # fmt: skip


WITHOUT = """
import sys
sys.modules[sys.argv[1]] = None  # as where it is not installed
from tests.pairs import Pair, run
run(Pair("llava", sys.argv[3] + "/no_student", sys.argv[3] + "/no_teacher"), sys.argv[3] + "/out", optim=sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("optim", LIBRARIES)
def test_optim__library_missing__named_before_a_model_is_loaded(optim: str, tmp_path: Path) -> None:
    line = [sys.executable, "-c", WITHOUT, LIBRARIES[optim], optim, str(tmp_path)]
    done = subprocess.run(line, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode
    last = done.stderr.strip().splitlines()[-1]
    assert re.match(rf"ValueError: optim={optim}: .*{LIBRARIES[optim]}", last), done.stderr[-2000:]
    assert list(tmp_path.iterdir()) == []


class States(TrainerCallback):
    """Groups at the start and what each parameter's state holds at the end of a run, by name."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        names = {id(p): n for n, p in model.named_parameters()}
        self.sizes = {n: p.numel() for n, p in model.named_parameters()}
        self.groups = [
            (float(g["initial_lr"]), g["weight_decay"], [names[id(p)] for p in g["params"]])
            for g in optimizer.param_groups
        ]

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        held = {n: optimizer.optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}
        self.eight = {n for n, s in held.items() if any(is_eight_bit(v) for v in s.values())}
        self.rest = held.keys() - self.eight


def is_eight_bit(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.dtype == torch.uint8 or type(value).__name__ == "OptimState8bit")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    """A student whose larger layers have more than 4096 scales each."""
    return pair("llava", tmp_path_factory.mktemp("wide"), student={"hidden": 512, "layers": 2})


@pytest.mark.slow
@pytest.mark.parametrize("optim", LIBRARIES)
def test_optim__8_bit__scales_keep_group_and_float32_states(optim: str, wide: Pair, tmp_path: Path) -> None:
    pytest.importorskip(LIBRARIES[optim])
    watch = States()
    recipe = recipe_text(wide.teacher, scheme=None, config_groups=GROUPS, training={"method": "lora", "norms": True})
    options: dict[str, Any] = {
        "recipe": recipe, "optim": optim, "weight_decay": 0.1, "max_steps": 3, "save_strategy": "steps", "save_steps": 2,
    }  # fmt: skip
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its step, which takes minutes on a CPU
        whole = run(wide, tmp_path / "a", mixed_samples(6), callbacks=[watch], **options)
        again = run(
            wide,
            tmp_path / "b",
            mixed_samples(6),
            resume_from_checkpoint=str(tmp_path / "a.run/checkpoint-2"),
            **options,
        )
    others = [g for g in watch.groups if not g[2] or not g[2][0].endswith("log_scale")]
    ((rate, decay, scales),) = [g for g in watch.groups if g not in others]
    assert (rate, decay, len(scales)) == (pytest.approx(1e-2), 0.0, 14)
    assert [rate for rate, _, _ in others] == pytest.approx([1e-3] * len(others))
    assert max(watch.sizes[name] for name in scales) > 4096
    assert set(scales) <= watch.rest
    assert {n for n in watch.eight if not n.endswith(("lora_A", "lora_B"))} == set()
    assert {n for n in watch.sizes if n.endswith("lora_A") and watch.sizes[n] >= 4096} <= watch.eight
    assert whole.verification["verified"] and whole.verification["codes_differing"] == 0
    one, two = (load_file(r.checkpoint / "model.safetensors") for r in (whole, again))
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.mark.parametrize(
    "option", [{"activation_offloading": True}, {"gradient_checkpointing_kwargs": {"determinism_check": "none"}}]
)
def test_checkpointing_options__without_checkpointing__refused(
    option: dict[str, Any], llava: Pair, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=rf"{next(iter(option))} needs gradient_checkpointing=True"):
        run(llava, tmp_path / "out", **option)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "scales", "lora"])
def test_train__checkpointing_and_offloading__same_bits(method: str, llava: Pair, tmp_path: Path) -> None:
    recipe = recipe_text(llava.teacher, training={"method": method})
    found = []
    for number, option in enumerate([{}, {"gradient_checkpointing": True, "activation_offloading": True}]):
        result = run(
            llava, tmp_path / str(number), mixed_samples(6), recipe=recipe, warmup_steps=0, logging_steps=1, **option
        )
        logs = [(log["loss"], log["grad_norm"]) for log in result.history if "loss" in log]
        found.append((logs, load_file(result.checkpoint / "model.safetensors")))
    (logs, tensors), (other_logs, other_tensors) = found
    assert len(logs) == 2 and logs == other_logs
    assert [name for name in tensors if not torch.equal(tensors[name], other_tensors[name])] == []


@pytest.mark.slow
def test_checkpointing__frozen_vision_tower__no_gradient(llava: Pair, tmp_path: Path) -> None:
    """transformers' checkpointing asks for gradients of every embedding, the frozen tower's too."""
    seen: list[bool] = []

    class Watch(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            model.model.vision_tower.register_forward_hook(
                lambda m, i, o: seen.append(o.last_hidden_state.requires_grad)
            )

    run(llava, tmp_path / "out", gradient_checkpointing=True, max_steps=1, callbacks=[Watch()])
    assert seen[0] is False  # the later ones are the checkpoint's proofs


class Exponential(nn.Module):
    """Its backward pass reads its output."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = x.exp()
        return self.kept.sum()


def test_offloaded__saved_tensors__through_host_memory() -> None:
    """Without the hooks torch notices that a saved tensor was written to."""
    model = Exponential()
    for call, noticed in ((model, True), (offloaded(model), False)):
        x = torch.ones(3, requires_grad=True)
        loss = call(x=x)
        with torch.no_grad():
            model.kept.zero_()
        if noticed:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
        else:
            loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offloaded__cuda__less_memory_and_same_gradient() -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(8))).cuda()
    for layer in layers:
        layer.requires_grad_(False)

    def forward(hidden: Tensor) -> Tensor:
        for layer in layers:
            hidden = torch.utils.checkpoint.checkpoint(lambda h, f=layer: f(h).tanh(), hidden, use_reentrant=False)
        return hidden.sum()

    held, grads = [], []
    for call in (forward, offloaded(forward)):
        hidden = (torch.randn(4096, 1024, generator=torch.Generator().manual_seed(0)) / 1e3).cuda().requires_grad_()
        before = torch.cuda.memory_allocated()
        loss = call(hidden=hidden)
        held.append(torch.cuda.memory_allocated() - before)
        loss.backward()
        assert hidden.grad is not None
        grads.append(hidden.grad)
    assert torch.equal(*grads) and grads[0].isfinite().all() and grads[0].any()
    assert held[1] < held[0] - 5 * 4096 * 1024 * 4
