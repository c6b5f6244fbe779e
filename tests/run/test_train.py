"""`train` through the real Trainer: optimizer groups, clipping, events, skipped steps, logs, lengths and resuming."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import IterableDataset
from transformers import AutoModelForImageTextToText, AutoProcessor, TrainerCallback

import grace_plugin
from grace_plugin.upstream import Modifier, ModifierFactory
from tests.conftest import Finished
from tests.pairs import Pair, loaded, mixed_samples, recipe_text, run, structure
from tests.tiny import make_samples


class Watch(TrainerCallback):
    """What a callback of the user's sees of each step."""

    def __init__(self) -> None:
        self.groups: list[dict[str, Any]] = []
        self.names: dict[int, str] = {}
        self.norms: list[tuple[float, float]] = []
        self.first: dict[str, torch.Tensor] = {}
        self.last: dict[str, torch.Tensor] = {}
        self.dtypes: dict[str, torch.dtype] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **_: Any
    ) -> None:
        self.first = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.names = {id(p): n for n, p in model.named_parameters()}
        self.dtypes = {n: p.dtype for n, p in model.named_parameters()}
        self.groups = [{**g, "params": [self.names[id(p)] for p in g["params"]]} for g in optimizer.param_groups]

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        grads = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        parts = [[g for n, g in grads if n.endswith("log_scale") is which] for which in (False, True)]
        self.norms.append(tuple(math.sqrt(sum(float(g.double().square().sum()) for g in part)) for part in parts))  # type: ignore[arg-type]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.last = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_optimizer__scales__own_group_rate_and_clip_norm(llava: Pair, tmp_path: Path) -> None:
    watch = Watch()
    run(
        llava, tmp_path / "out", max_steps=1, callbacks=[watch], weight_decay=0.1, max_grad_norm=1e-3, warmup_steps=0,
        lr_scheduler_type="constant",
    )  # fmt: skip
    scales = [g for g in watch.groups if any(n.endswith("log_scale") for n in g["params"])]
    others = [g for g in watch.groups if g not in scales]
    (group,) = scales
    assert len(group["params"]) == 21 and all(n.endswith("weight_log_scale") for n in group["params"])
    assert (group["lr"], group["weight_decay"]) == (pytest.approx(1e-2), 0.0)
    assert {g["lr"] for g in others} == {1e-3}
    assert {g["weight_decay"] for g in others} == {0.1, 0.0}
    assert sorted(n for g in watch.groups for n in g["params"]) == sorted(watch.first)
    assert {watch.dtypes[n] for n in group["params"]} == {torch.float32}
    assert watch.norms == [(pytest.approx(1e-3, rel=1e-5), pytest.approx(1e-3, rel=1e-5))]


def test_logs__every_step__all_quantities(finished: Finished) -> None:
    logs = [log for log in finished.result.history if "loss" in log]
    assert len(logs) == 8
    wanted = {
        "loss_ce", "loss_gdkd", "loss_tckd", "loss_nckd", "loss_rcka", "beta", "omega", "clip_share",
        "gate_q05", "gate_q50", "gate_q95", "images", "images_skipped", "samples_without_images", "supervised_tokens",
        "nonfinite_steps", "learning_rate", "grad_norm",
    }  # fmt: skip
    assert wanted <= logs[0].keys()
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    assert {name for name in {*wanted, "ema", "share_at_bound"} if f"`{name}`" not in page} == set()
    assert {log["images_skipped"] for log in logs} == {0}
    assert {log["beta"] for log in logs} == {0.5}
    assert all(0.0 < log["clip_share"] < 0.5 for log in logs)
    assert sum(log["images"] for log in logs) == 2 * sum(len(sample["images"]) for sample in finished.dataset)
    assert sum(log["samples_without_images"] for log in logs) == 2 * 2
    weighted = logs[0]["loss_ce"] + 0.5 * logs[0]["loss_gdkd"] + 3.0 * logs[0]["loss_rcka"]
    assert logs[0]["loss"] == pytest.approx(weighted, rel=1e-5)


@pytest.mark.slow
def test_lifecycle_events__accumulation__once_per_optimizer_step_in_order(llava: Pair, tmp_path: Path) -> None:
    seen: list[str] = []

    class Recorder(Modifier):
        def on_initialize(self, state: Any, **kwargs: Any) -> bool:
            return True

        def on_event(self, state: Any, event: Any, **kwargs: Any) -> None:
            seen.append(event.type_.name)

    ModifierFactory.register("Recorder", Recorder)
    recipe = yaml.safe_load(recipe_text(llava.teacher))
    recipe["grace_stage"]["grace_modifiers"]["Recorder"] = {}
    run(llava, tmp_path / "out", recipe=yaml.safe_dump(recipe), max_steps=2, gradient_accumulation_steps=2)
    one_step = ["BATCH_START", "LOSS_CALCULATED", "OPTIM_PRE_STEP", "OPTIM_POST_STEP", "BATCH_END"]
    training = [name for name in seen if name in one_step]
    assert training == one_step * 2


def infinite(pair: Pair) -> Any:
    """A processor whose pixels are not finite: black becomes 0 * inf."""
    processor = AutoProcessor.from_pretrained(pair.student)
    processor.image_processor.rescale_factor = float("inf")
    return processor


@pytest.mark.slow
def test_train__loss_not_finite__nothing_moves_and_run_ends(llava: Pair, tmp_path: Path) -> None:
    watch = Watch()
    recipe = recipe_text(llava.teacher, training={"max_nonfinite_steps": 2})
    with pytest.raises(
        FloatingPointError, match=r"3 optimizer steps had a non-finite loss .*max_nonfinite_steps allows 2"
    ):
        run(
            llava, tmp_path / "o/out", recipe=recipe, max_steps=9, callbacks=[watch], processor=infinite(llava),
            teacher_processor=infinite(llava), weight_decay=0.1, warmup_steps=0,
        )  # fmt: skip
    assert len(watch.norms) == 3
    assert not all(math.isfinite(norm) for pair in watch.norms for norm in pair)
    assert watch.first.keys() == watch.last.keys()
    assert all(torch.equal(watch.first[name], watch.last[name]) for name in watch.first)
    assert not (tmp_path / "o/out").exists() and not (tmp_path / "o/.out.partial").exists()


@pytest.mark.slow
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_train__gradient_not_finite__step_skipped(llava: Pair, tmp_path: Path, max_grad_norm: float) -> None:
    class Blow(Watch):
        def on_train_begin(self, *args: Any, model: Any = None, **rest: Any) -> None:
            super().on_train_begin(*args, model=model, **rest)
            model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))

    watch = Blow()
    recipe = recipe_text(llava.teacher, training={"max_nonfinite_steps": 0})
    with pytest.raises(FloatingPointError, match="1 optimizer steps had a non-finite loss or gradient"):
        run(llava, tmp_path / "out", recipe=recipe, callbacks=[watch], max_grad_norm=max_grad_norm, warmup_steps=0)
    assert all(torch.equal(watch.first[name], watch.last[name]) for name in watch.last)


@pytest.mark.slow
def test_train__incomplete_last_window__own_step(llava: Pair, tmp_path: Path) -> None:
    """5 samples by 2 are 3 batches, two windows an epoch; two epochs are 4 steps and 4 controller updates."""
    result = run(
        llava, tmp_path / "out", make_samples(5, seed=2), max_steps=-1, num_train_epochs=2, gradient_accumulation_steps=2,
        logging_steps=1,
    )  # fmt: skip
    logs = [log for log in result.history if "loss" in log]
    assert [log["images"] for log in logs] == [4, 1, 4, 1]
    state = json.loads((result.checkpoint / "grace/record.json").read_text())["run"]
    assert (state["steps"], state["controller"]["step"], state["total_steps"]) == (4, 4, 4)


@pytest.mark.slow
def test_train__dataset_without_length__max_steps_needed(llava: Pair, tmp_path: Path) -> None:
    def generate() -> Any:
        yield from make_samples(4, seed=2)

    dataset = IterableDataset.from_generator(generate)
    with pytest.raises(ValueError, match="the dataset has no length; pass max_steps="):
        run(llava, tmp_path / "out", dataset, max_steps=-1)
    assert run(llava, tmp_path / "out", dataset, max_steps=1).verification["verified"]


class Fail(TrainerCallback):
    """Ends a run by an error after its first step."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        raise self.error


@pytest.mark.slow
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the disk is on fire")])
def test_train__failure__model_given_back(llava: Pair, tmp_path: Path, error: BaseException) -> None:
    student = loaded(llava)
    before, start = structure(student), {n: p.clone() for n, p in student.named_parameters()}
    with pytest.raises(type(error)) as raised:
        run(llava, tmp_path / "out", model=student, callbacks=[Fail(error)], warmup_steps=0)
    assert raised.value is error
    assert structure(student) == before
    assert not (tmp_path / "out").exists()
    assert any(not torch.equal(p, start[n]) for n, p in student.named_parameters())
    assert run(llava, tmp_path / "again", model=student).verification["verified"]


@pytest.mark.slow
def test_train__model_of_an_earlier_run__refused(llava: Pair, tmp_path: Path) -> None:
    """Upstream's save packs the weights of the model in memory and leaves a hook that unpacks them once."""
    student = loaded(llava)
    run(llava, tmp_path / "bf16", model=student, recipe=recipe_text(llava.teacher, scheme=None, quantize=False))
    with pytest.raises(ValueError, match=r"an earlier GRACE run has saved this model .* load the checkpoint again"):
        run(llava, tmp_path / "o/int4", model=student)
    with pytest.raises(ValueError, match="an earlier GRACE run"):
        grace_plugin.oneshot(student, recipe=recipe_text(None), dataset=make_samples(1), output_dir=tmp_path / "o/int4")
    with pytest.raises(ValueError, match="an earlier GRACE run"):
        grace_plugin.grace_session(student, recipe_text(None), total_steps=1).__enter__()
    assert not (tmp_path / "o").exists()
    assert run(llava, tmp_path / "int4", model=tmp_path / "bf16").verification["verified"]


class Sequence:
    """Samples of a known length that are made when asked for, so that Trainer's own sampler orders them."""

    def __init__(self, held: list[dict[str, Any]]) -> None:
        self.held = held

    def __len__(self) -> int:
        return len(self.held)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.held[index]


@pytest.mark.slow
@pytest.mark.parametrize("count", [6, 3])
def test_train__stream_ends_inside_a_window__as_samples_of_known_length(
    llava: Pair, tmp_path: Path, count: int
) -> None:
    """6 samples are a window of 4 and one of 2, 3 samples a short window each; four steps pass over the samples again."""
    held = mixed_samples(count)

    def generate() -> Any:
        yield from held

    options: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "logging_steps": 1,
        "train_sampling_strategy": "sequential", "max_bad_samples": 0.0,
    }  # fmt: skip
    known = run(llava, tmp_path / "known", Sequence(held), **options)
    stream = run(llava, tmp_path / "stream", IterableDataset.from_generator(generate), **options)
    values = (
        "loss",
        "loss_ce",
        "loss_gdkd",
        "loss_rcka",
        "supervised_tokens",
        "images",
        "grad_norm",
        "beta",
        "gate_q50",
    )
    one, two = (
        [{key: log[key] for key in values} for log in result.history if "loss" in log] for result in (known, stream)
    )
    assert len(one) == 4 and one == two
    left, right = (r.checkpoint / "model.safetensors" for r in (known, stream))
    assert left.read_bytes() == right.read_bytes()


@pytest.mark.slow
def test_train__resumed__same_bytes(llava: Pair, tmp_path: Path) -> None:
    """From a folder given by name; the whole behaviour is tested in integration/test_resume.py."""
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    whole = run(llava, tmp_path / "a", **options)
    first = str(tmp_path / "a.run" / "checkpoint-1")
    again = run(llava, tmp_path / "b", resume_from_checkpoint=first, **options)
    left, right = (r.checkpoint / "model.safetensors" for r in (whole, again))
    assert left.read_bytes() == right.read_bytes()
    other = recipe_text(llava.teacher, distill={"temperature": 3.0})
    with pytest.raises(ValueError, match=r"checkpoint-1 was started .*: recipe.distill.temperature: 2.0 -> 3.0"):
        run(llava, tmp_path / "c", recipe=other, resume_from_checkpoint=first, **options)
    (tmp_path / "a").rename(tmp_path / "kept")
    with pytest.raises(FileExistsError, match=r"a\.run holds resume states of an earlier run"):
        run(llava, tmp_path / "a", **options)


@pytest.mark.slow
def test_train__quantize_false__bf16_student(llava: Pair, tmp_path: Path) -> None:
    result = run(
        llava, tmp_path / "out", recipe=recipe_text(llava.teacher, scheme=None, quantize=False), warmup_steps=0
    )
    assert (result.verification["layers"], result.verification["codes"]) == (0, 0)
    assert result.verification["verified"] and result.verification["logits_equal"]
    model = AutoModelForImageTextToText.from_pretrained(result.checkpoint, dtype="auto")
    before = AutoModelForImageTextToText.from_pretrained(llava.student, dtype="auto")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    names = dict(before.named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, names[n])}
    assert any("q_proj" in n for n in moved) and not any("vision_tower" in n for n in moved)
    assert "clip_share" not in result.history[0]


@pytest.mark.slow
def test_train__two_formats__both_saved(llava: Pair, tmp_path: Path) -> None:
    four = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}
    eight = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    groups = {
        "attention": {"targets": [r"re:.*self_attn\..*_proj$"], "weights": four},
        "mlp": {"targets": [r"re:.*mlp\..*_proj$"], "weights": eight},
    }
    recipe = recipe_text(llava.teacher, scheme=None, config_groups=groups, scales={"stored_dtype": "float16"})
    result = run(llava, tmp_path / "out", recipe=recipe)
    assert result.verification["verified"] and result.verification["layers"] == 21
    model = AutoModelForImageTextToText.from_pretrained(result.checkpoint, dtype="auto")
    layer = model.model.language_model.layers[0]
    assert (layer.self_attn.q_proj.weight_scale.shape[1], layer.mlp.up_proj.weight_scale.shape[1]) == (8, 1)
    assert layer.self_attn.q_proj.weight_scale.dtype == torch.float16


@pytest.mark.slow
def test_train__loaded_teacher__named_in_the_recipe(llava: Pair, tmp_path: Path) -> None:
    teacher = AutoModelForImageTextToText.from_pretrained(llava.teacher, dtype=torch.float32)
    result = run(llava, tmp_path / "out", recipe=recipe_text(None), teacher=teacher, max_steps=1)
    assert f"model: {llava.teacher.name}\n" in (result.checkpoint / "recipe.yaml").read_text()
    by_path = run(llava, tmp_path / "p", recipe=recipe_text(None), teacher=llava.teacher, max_steps=1)
    assert grace_plugin.verify(by_path.checkpoint)["verified"]


@pytest.mark.slow
def test_train__mixed_precision__no_autocast_left_on_the_model(llava: Pair, tmp_path: Path) -> None:
    student = loaded(llava)
    during = []
    student.model.language_model.norm.register_forward_hook(lambda *_: during.append(torch.is_autocast_enabled("cpu")))
    options = {"model": student, "bf16": True}
    recipe = recipe_text(llava.teacher, teacher={"model": str(llava.teacher)})
    assert run(llava, tmp_path / "out", recipe=recipe, **options).verification["logits_equal"]
    assert during[0] and not during[-1]  # the last pass is the checkpoint's probe
