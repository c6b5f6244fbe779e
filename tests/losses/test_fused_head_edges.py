"""The teacher's gates by chunk, and what the head refuses."""

import pytest
import torch

from grace_plugin.losses import confidence_gate, distillation_head, teacher_gates
from tests.losses.sides import NAMES, draw, run


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_teacher_gates__chunks__equal_gates_of_all(chunk):
    sides, _ = draw()
    gate, entropy, _ = teacher_gates(
        sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, sharpness=1.5, chunk=chunk
    )
    logits = (sides["hidden_t"] @ sides["weight_t"].T + sides["bias_t"])[:, :9]
    want_gate, want_entropy = confidence_gate(logits, 1.5)
    torch.testing.assert_close(gate, want_gate, rtol=1e-13, atol=0)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-12, atol=0)


def test_teacher_gates__defaults__published_gate_without_gradient():
    sides, _ = draw(dtype=torch.float32)
    sides["hidden_t"].requires_grad_()
    arguments = sides["hidden_t"], sides["weight_t"], None
    gate, _, _ = teacher_gates(*arguments, vocabulary=9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, _, _ = teacher_gates(*arguments, vocabulary=9, sharpness=1.0)
    assert torch.equal(gate, inside)
    assert gate.dtype == torch.float32
    assert not gate.requires_grad


def head_of(sides, **changed):
    given = {**sides, **changed}
    arguments = {
        "vocabulary": 9,
        "ce_weight": 1.0,
        "kd_weight": 1.0,
        **{k: v for k, v in changed.items() if k == "vocabulary"},
    }
    arguments["chunk"] = changed.get("chunk", 3)
    targets = given.get("targets", torch.zeros(7, dtype=torch.int64))
    return distillation_head(*(given[name] for name in NAMES), targets, given.get("gate", torch.ones(7)), **arguments)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_s": torch.zeros(7, 4)}, r"student: hidden states \(7, 4\) do not fit a head of \(11, 5\)"),
        ({"hidden_s": torch.zeros(5)}, "student: hidden states"),
        ({"weight_s": torch.zeros(5)}, "student: hidden states"),
        ({"hidden_t": torch.zeros(7, 4)}, r"teacher: hidden states \(7, 4\) do not fit a head of \(12, 6\)"),
        ({"vocabulary": 12}, "student: a head of 11 rows does not hold a common vocabulary of 12 ids"),
        ({"vocabulary": 0}, "does not hold a common vocabulary of 0 ids"),
        ({"weight_t": torch.zeros(8, 6)}, "teacher: a head of 8 rows does not hold a common vocabulary of 9 ids"),
        ({"bias_s": torch.zeros(8)}, "student: a head of 11 rows does not hold"),
        ({"bias_t": torch.zeros(8)}, "teacher: a head of 12 rows does not hold"),
        ({"targets": torch.zeros(6, dtype=torch.int64)}, "6 targets for 7 student positions"),
        ({"hidden_t": torch.zeros(6, 6)}, "6 teacher hidden states for 7 student positions"),
        ({"gate": torch.ones(8)}, "8 gates for 7 student positions"),
        ({"gate": None}, "without weight_t or gate"),
        ({"weight_t": None}, "without weight_t or gate"),
        ({"chunk": 0}, "chunk must be at least 1 position, got 0"),
    ],
)
def test_head__shapes_that_do_not_fit__refused_by_name(changed, message):
    sides, _ = draw(grad=False)
    with pytest.raises(ValueError, match=message):
        head_of(sides, **changed)


def test_head__largest_vocabulary_and_smallest_chunk__accepted():
    sides, _ = draw(grad=False)
    assert head_of(sides, vocabulary=11, chunk=1).loss.item() > 0
    assert head_of(sides, vocabulary=1).loss.item() == 0


def test_head__bad_settings__refused():
    sides, targets = draw()
    with pytest.raises(ValueError, match="temperature must be a positive"):
        run(sides, targets, temperature=0.0)
    with pytest.raises(ValueError, match="teacher: a head of 12 rows"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=13)
    with pytest.raises(ValueError, match="teacher: a head of 12 rows"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], torch.zeros(8), vocabulary=9)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        teacher_gates(sides["hidden_t"], sides["weight_t"], sides["bias_t"], vocabulary=9, chunk=0)
