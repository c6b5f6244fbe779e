"""Test what the study's ablations change, and that they change nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.accuracy import formats, pair
from benchmarks.accuracy.data import KeptTeacher, Text, batch_of
from benchmarks.accuracy.methods import METHODS
from benchmarks.accuracy.relation import RelationObjective, deep_states, tokens_of
from benchmarks.accuracy.scenes import Album, draw
from benchmarks.accuracy.train import learn
from grace_plugin.objective import GraceObjective
from grace_plugin.quantizer import PARAMETER, dequantize
from tests.benchmarks.test_accuracy import CPU, coloured, small


@pytest.fixture(scope="module")
def scene():
    photos, text = coloured(60), Text()
    rows, album = draw(5, 12, photos, augment=True), Album(photos, CPU)
    return rows, text, album, small(1).eval()


def test_relation_objective__default_layers__same_as_grace(scene) -> None:
    rows, text, album, teacher = scene
    numbers = np.array([7, 2, 11])
    batch, host = batch_of(rows.take(numbers), text, album, keys=numbers)
    deep, losses = deep_states(teacher, (0,), rows, text, album, batch_size=5), {}
    for kinds in ((), ("visual",), ("text",), ("visual", "text")):
        student, blocks = small(0), METHODS["grace"].blocks()
        objective = RelationObjective(*blocks) if kinds else GraceObjective(*blocks)
        if isinstance(objective, RelationObjective):
            objective.layers, objective.kinds, objective.states = ((0, 0),), kinds, deep
        objective.prepare(student, KeptTeacher(teacher, rows, text, album), vocabulary=pair.VOCABULARY, total_steps=1)
        objective.begin_step([batch], [host])
        loss = objective.compute_loss(student, batch)
        loss.backward()
        gradient = student.model.language_model.layers[0].mlp.up_proj.weight.grad
        losses[kinds] = (loss.item(), objective.reduce_metrics().rcka, gradient)
    assert losses["visual",][:2] == pytest.approx(losses[()][:2], rel=1e-6)
    torch.testing.assert_close(losses["visual",][2], losses[()][2], rtol=1e-4, atol=1e-7)
    both, visual, words = (losses[kinds] for kinds in (("visual", "text"), ("visual",), ("text",)))
    assert both[1] == pytest.approx(visual[1] + words[1], rel=1e-5)
    assert 0 < visual[1] < 1 and 0 < words[1] < 1 and abs(visual[1] - words[1]) > 1e-3


def test_tokens_of__text__tokens_after_the_image(scene) -> None:
    rows, text, album, _ = scene
    ids = batch_of(rows, text, album)[0]["input_ids"]
    index, sizes = tokens_of(ids, "text")
    lengths = (ids != pair.PAD).sum(1) - 2 - pair.VISUAL  # without <s><user> and the image
    assert list(sizes) == lengths.tolist() and (ids.flatten()[index] != pair.IMAGE).all()
    assert tokens_of(ids, "visual")[1] == (pair.VISUAL,) * len(rows)


def test_changed_forward__unmasked__clipped_weight_has_a_gradient() -> None:
    model, gradients = small(0), {}
    method = METHODS["grace-unmasked"]
    for name in ("grace", "grace-unmasked"):
        model = small(0)
        formats.quantize(model, METHODS[name], "w2g128", {})
        layer = model.model.language_model.layers[0].mlp.up_proj
        getattr(layer, PARAMETER).data -= 1.0  # many weights lie beyond
        out = layer(torch.eye(128))
        out.sum().backward()
        gradients[name] = (out.detach(), layer.weight.grad, getattr(layer, PARAMETER).grad)
    masked, free = gradients["grace"], gradients["grace-unmasked"]
    assert torch.equal(masked[0], free[0]) and torch.equal(masked[2], free[2]) and not method.masked
    assert torch.equal(free[1], torch.ones(128, 128)) and 0.2 < (masked[1] == 0).float().mean() < 0.8
    assert torch.equal(free[1][masked[1] != 0], masked[1][masked[1] != 0])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["damage", "error", "reverse"])
def test_mixed_bits__damage__half_of_the_weights_get_more(scene, how: str) -> None:
    rows, text, album, model = scene
    probe, _ = batch_of(rows, text, album)
    layers = {n: m for n, m in model.named_modules() if ".layers." in n and isinstance(m, torch.nn.Linear)}
    layers = {n: m for n, m in layers.items() if "language_model" in n}
    bits = formats.mixed_bits(model, layers, how, (3, 128), probe)
    found = dict(formats.damages(model, layers, how, (2, 128), probe))
    assert set(bits.values()) == {2, 4} and all(value > 0 for value in found.values())
    total = sum(layer.weight.numel() for layer in layers.values())
    assert total / 3 < sum(layers[name].weight.numel() for name in layers if bits[name] == 4) <= total / 2
    by_weight = {name: found[name] / layers[name].weight.numel() for name in layers}
    first = (min if how == "reverse" else max)(by_weight, key=by_weight.__getitem__)
    assert bits[first] == 4
    assert all(not hasattr(layer, PARAMETER) for layer in layers.values())


def test_learn__float_scales__rounded_scales_exported(scene) -> None:
    rows, text, album, teacher = scene
    model = small(0)
    kept, order = KeptTeacher(teacher, rows, text, album), np.arange(12).reshape(3, 4)
    _, frozen = learn(model, kept, METHODS["grace-floatscales"], "w2g128", rows, album, text, order=order, rate=1e-3)
    for name, (codes, scale) in frozen.items():
        assert scale.dtype == torch.bfloat16
        assert torch.equal(model.get_submodule(name).weight, dequantize(codes, scale))
