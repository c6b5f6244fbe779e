"""GraceModifier's lifecycle in a real session: what it checks, what it attaches, what it hands to upstream."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForImageTextToText

from grace_plugin import GraceModifier
from grace_plugin.data import ConversationCollator
from grace_plugin.upstream import QuantizationStatus, create_session
from grace_plugin.vlm import load_tokenizer
from tests.pairs import Pair, modifier_of, recipe_text
from tests.tiny import build, make_samples


def student_of(pair: Pair, dtype: torch.dtype = torch.bfloat16) -> Any:
    return AutoModelForImageTextToText.from_pretrained(pair.student, dtype=dtype)


def start(modifier: GraceModifier, student: Any) -> None:
    with create_session() as session:
        session.initialize(recipe=modifier, model=student, copy_data=False)


def decoder_linears(model: Any) -> dict[str, nn.Linear]:
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layers." in n and "language_model" in n
    }


def test_initialize__defaults__scales_on_decoder_and_inferred_fields_recorded(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher)), student_of(llava)
    start(modifier, student)
    carrying = {n for n, m in student.named_modules() if hasattr(m, "weight_log_scale")}
    assert carrying == set(decoder_linears(student))
    upstreams = ("weight_scale", "weight_zero_point")
    assert {p.dtype for n, p in student.named_parameters() if not n.endswith(upstreams)} == {torch.float32}
    assert modifier.saved_dtype == torch.bfloat16
    assert r"re:(.*\.)?vision_tower\..*" in modifier.ignore and len(modifier.ignore) == len(set(modifier.ignore))
    assert modifier.frozen == {}


def test_initialize__master_weights_keep__loaded_dtype(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher, training={"master_weights": "keep"})), student_of(llava)
    start(modifier, student)
    thetas = {p.dtype for n, p in student.named_parameters() if n.endswith("weight_log_scale")}
    assert thetas == {torch.float32}
    assert student.lm_head.weight.dtype == torch.bfloat16


def test_initialize__float32_master_weights__same_values(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher)), student_of(llava)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    start(modifier, student)
    after = dict(student.named_parameters())
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], p.float()) for n, p in before.items())


@pytest.mark.parametrize("method", ["scales", "lora"])
def test_initialize__weights_that_do_not_train__dtype_kept(llava: Pair, method: str) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher, training={"method": method})), student_of(llava)
    before = {n: p.detach().clone() for n, p in student.named_parameters()}
    start(modifier, student)
    after = dict(student.named_parameters())
    assert all(after[n].dtype == torch.bfloat16 and torch.equal(after[n], p) for n, p in before.items())
    carrying = {n.removesuffix(".lora_A") for n in after if n.endswith(".lora_A")}
    assert carrying == (set(decoder_linears(student)) if method == "lora" else set())


def test_initialize__lora_targets__updates_on_them_alone(llava: Pair) -> None:
    lora = {"rank": 4, "targets": ["re:.*(q|v)_proj$"]}
    modifier = modifier_of(recipe_text(llava.teacher, training={"method": "lora", "lora": lora}))
    student = student_of(llava)
    start(modifier, student)
    carrying = {n.rpartition(".")[2] for n, m in student.named_modules() if hasattr(m, "lora_A")}
    assert carrying == {"q_proj", "v_proj"}
    assert student.model.language_model.layers[0].self_attn.q_proj.lora_A.shape == (4, 256)


@pytest.mark.parametrize(
    ("lora", "message"),
    [({"targets": ["q_proj"]}, "no quantized layer matches"), ({"rank": 128}, "not below the width")],
)
def test_initialize__lora_that_does_not_fit__refused_before_the_teacher_is_loaded(
    llava: Pair, lora: dict[str, Any], message: str
) -> None:
    modifier = modifier_of(recipe_text("no/teacher", training={"method": "lora", "lora": lora}))
    student = student_of(llava)
    with pytest.raises(ValueError, match=message):
        start(modifier, student)
    assert not any(hasattr(m, "weight_log_scale") for m in student.modules())


def test_initialize__no_layer_matches__refused(llava: Pair) -> None:
    modifier = modifier_of(recipe_text(llava.teacher, targets=["re:no_such_layer"]))
    with pytest.raises(ValueError, match=r"no layer matches targets.*no_such_layer"):
        start(modifier, student_of(llava))


def test_initialize__fused_layers_of_two_formats__refused(llava: Pair) -> None:
    modifier = modifier_of(recipe_text(llava.teacher, ignore=["re:.*layers.1.self_attn.k_proj"]))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn .*k_proj: not quantized") as caught:
        start(modifier, student_of(llava))
    assert "layers.0" not in str(caught.value)
    assert "Target or ignore them together" in str(caught.value)


def test_initialize__ignored_layers__unquantized(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher, ignore=["re:.*layers.1.mlp.*"])), student_of(llava)
    start(modifier, student)
    bare = {n for n, m in decoder_linears(student).items() if not hasattr(m, "weight_log_scale")}
    assert bare == {f"model.language_model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")}


def test_objective__before_begin__refused() -> None:
    with pytest.raises(RuntimeError, match=r"no run yet; call begin\(total_steps\)"):
        _ = modifier_of(recipe_text("t")).objective


def test_finalize__no_step__refused(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher)), student_of(llava)
    with create_session() as session:
        session.initialize(recipe=modifier, model=student, copy_data=False)
        modifier.begin(3)
        with pytest.raises(RuntimeError, match="GRACE trained nothing"):
            session.finalize()


def test_finalize__one_step__codes_and_scales_given_to_upstream(llava: Pair) -> None:
    modifier, student = modifier_of(recipe_text(llava.teacher)), student_of(llava)
    _, processor = build("llava")
    batch = ConversationCollator(processor)(make_samples(2))
    with create_session() as session:
        session.initialize(recipe=modifier, model=student, copy_data=False)
        objective = modifier.begin(1)
        objective.begin_step([batch])
        objective.compute_loss(student, batch).backward()
        objective.reduce_metrics()
        objective.end_step()
        session.finalize()
    linears = decoder_linears(student)
    assert modifier.frozen.keys() == linears.keys()
    for name, (codes, scales) in modifier.frozen.items():
        layer: Any = linears[name]
        assert layer.quantization_status == QuantizationStatus.FROZEN
        assert torch.equal(layer.weight_scale, scales) and not layer.weight_scale.requires_grad
        assert torch.equal(
            layer.weight, (codes.to(scales.dtype).unflatten(1, (-1, 128)) * scales[..., None]).flatten(1)
        )
        assert int(codes.min()) >= -8 and int(codes.max()) <= 7
    assert student.config.dtype == student.config.text_config.dtype == torch.bfloat16
    assert student.lm_head.weight.dtype == torch.bfloat16


def test_initialize__no_tokenizer_folder__processors_given(llava: Pair) -> None:
    teacher, processor = build("llava", seed=1)
    modifier, student = modifier_of(recipe_text(None)), student_of(llava)
    modifier.use_teacher(teacher)
    with create_session() as session, pytest.raises(ValueError, match="the teacher has no name_or_path"):
        session.initialize(recipe=modifier, model=student, copy_data=False)
    modifier, student = modifier_of(recipe_text(None)), student_of(llava)
    modifier.use_teacher(teacher)
    with create_session() as session:
        session.initialize(
            recipe=modifier, model=student, copy_data=False, processors=(load_tokenizer(student, "student"), processor)
        )
        modifier.teacher_to(torch.device("cpu"))
        assert modifier.begin(2).context.vocabulary == len(processor.tokenizer)
    assert modifier.teacher.model is None


def test_initialize__no_term_reads_a_teacher__none_loaded(llava: Pair) -> None:
    off = {"enabled": False}
    modifier, student = modifier_of(recipe_text("/no/where", distill=off, relational=off)), student_of(llava)
    start(modifier, student)
    objective = modifier.begin(1)
    assert objective.teacher is None
    assert objective.context.vocabulary == student.lm_head.weight.shape[0]


def test_initialize__eight_bits_of_bfloat16__error_says_how_to_fix(llava: Pair) -> None:
    student = student_of(llava)
    with pytest.raises(ValueError, match=r"8-bit codes do not survive.*scales\.stored_dtype: float16 in a recipe"):
        start(modifier_of(recipe_text(llava.teacher, scheme="W8A16")), student)
    assert not any(hasattr(module, "weight_log_scale") for module in student.modules())
    modifier = modifier_of(recipe_text(llava.teacher, scheme="W8A16", scales={"stored_dtype": "float16"}))
    start(modifier, student)
    assert modifier.saved_dtype == torch.float16
