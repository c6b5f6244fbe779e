"""Comparison of two checkpoints: its numbers against float64 by another route, and checkpoints with one edited tensor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from grace_plugin.data import ConversationCollator
from grace_plugin.report import compare_checkpoints
from tests.conftest import Finished
from tests.pairs import Pair, mixed_samples
from tests.report.checkpoints import edited, rounded, stored_name
from tests.tiny import make_samples

LAYER = "layers.1.self_attn.v_proj"


def asked(count: int = 4) -> list[dict[str, Any]]:
    """Samples with images, types and accepted answers."""
    found = []
    for number, row in enumerate(make_samples(count, seed=21)):
        answer = row["messages"][-1]["content"][0]["text"]
        found.append({**row, "id": f"held-{number}", "type": ("colour", "shape")[number % 2], "accept": [answer]})
    return found


def opened(folder: Path) -> Any:
    """A checkpoint whose packed layers have become dense, as a first forward pass leaves them."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
    with torch.no_grad():
        model(input_ids=torch.ones(1, 2, dtype=torch.int64))
    return model


def final_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """The base model's own last hidden state at the positions before supervised tokens, float64."""
    with torch.no_grad():
        given = {key: value for key, value in batch.items() if key != "labels"}
        states = model.model(**given, use_cache=False).last_hidden_state[0]
    return states[
        torch.tensor([i - 1 for i, label in enumerate(batch["labels"][0].tolist()) if label != -100])
    ].double()


def divergence(a: Any, b: Any, batch: dict[str, Tensor]) -> tuple[list[float], list[float]]:
    """KL(A || B) of each supervised token, and A's negative log-likelihood of it, in float64."""
    words = [model.lm_head.weight.double() for model in (a, b)]
    p, q = (torch.softmax(final_states(m, batch) @ w.T, dim=1) for m, w in zip((a, b), words, strict=True))
    label = batch["labels"][0][batch["labels"][0] != -100]
    return [float((x * (x / y).log()).sum().detach()) for x, y in zip(p, q, strict=True)], (-p.detach().log()).gather(
        1, label[:, None]
    )[:, 0].tolist()


def unpacked(folder: Path, layer: str) -> tuple[Tensor, Tensor]:
    """Codes and dense weight of a packed layer, from the file's bytes."""
    tensors = load_file(folder / "model.safetensors")
    packed = tensors[stored_name(folder, f"{layer}.weight_packed")].numpy().view("uint32")
    scale = tensors[stored_name(folder, f"{layer}.weight_scale")].double()
    codes = torch.tensor(
        [[(int(word) >> shift & 15) - 8 for word in row for shift in range(0, 32, 4)] for row in packed]
    )
    return codes, (codes.double().unflatten(1, (scale.shape[1], -1)) * scale[..., None]).flatten(1).bfloat16().double()


@pytest.fixture(scope="module")
def report(llava: Pair, int4: Path) -> dict[str, Any]:
    return compare_checkpoints(llava.student, int4, asked() + make_samples(1, seed=5, images=0), batch_size=1)


def test_divergence__against_softmax_in_float64__equal(llava: Pair, int4: Path, report: dict[str, Any]) -> None:
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    a, b = opened(llava.student), opened(int4)
    with_images = [divergence(a, b, collator([row])) for row in asked()]
    text_only = [{**row, "images": [], "messages": text_of(row)} for row in asked()]
    without = [divergence(a, b, collator([row])) for row in text_only]
    text = divergence(a, b, collator(make_samples(1, seed=5, images=0)))

    def mean(parts: list[tuple[list[float], list[float]]], which: int) -> float:
        values = [value for part in parts for value in part[which]]
        return sum(values) / len(values)

    found = report["modality"]
    assert found["compared_samples"] == 4
    assert found["kl_image_conditioned"] == pytest.approx(mean(with_images, 0), rel=1e-4)
    assert found["kl_text_only"] == pytest.approx(mean(without, 0), rel=1e-4)
    assert found["text"]["kl"] == pytest.approx(mean([text], 0), rel=1e-4)
    assert report["overall"]["kl"] == pytest.approx(mean([*with_images, text], 0), rel=1e-4)
    assert report["overall"]["nll_a"] == pytest.approx(mean([*with_images, text], 1), rel=1e-5)
    assert found["kl_image_conditioned"] != pytest.approx(found["kl_text_only"], rel=0.01)
    worst = max(range(4), key=lambda n: sum(with_images[n][0]) / len(with_images[n][0]))
    first = next(row for row in report["worst"] if row["images"])
    assert first["number"] == worst
    assert [token["kl"] for token in first["tokens"]] == pytest.approx(with_images[worst][0], rel=1e-3, abs=1e-6)


def text_of(row: dict[str, Any]) -> list[dict[str, Any]]:
    """The sample's turns as strings, which no image can be in."""
    return [{"role": t["role"], "content": "".join(p.get("text", "") for p in t["content"])} for t in row["messages"]]


def test_output_error__against_two_products_in_float64__equal(llava: Pair, int4: Path, report: dict[str, Any]) -> None:
    a = opened(llava.student)
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    (name,) = [name for name, _ in a.named_modules() if name.endswith(LAYER) and "language_model" in name]
    module = a.get_submodule(name)
    assert isinstance(module, nn.Linear)
    codes, dense = unpacked(int4, LAYER)
    sums = {"output_error": [0.0, 0.0], "output_error_visual": [0.0, 0.0], "output_error_text": [0.0, 0.0]}
    for row in [*asked(), *make_samples(1, seed=5, images=0)]:
        batch, inputs = collator([row]), []
        handle = module.register_forward_pre_hook(lambda _m, given, into=inputs: into.append(given[0]))
        final_states(a, batch)
        handle.remove()
        x, seen = inputs[0][0].double(), batch["input_ids"][0] == a.config.image_token_id
        ours, theirs = x @ module.weight.double().T, x @ dense.T
        for key, keep in (("output_error", seen | ~seen), ("output_error_visual", seen), ("output_error_text", ~seen)):
            sums[key][0] += float((theirs - ours)[keep].pow(2).sum())
            sums[key][1] += float(ours[keep].pow(2).sum())
    (found,) = [one for one in report["layers"] if one["name"] == name]
    for key, (error, reference) in sums.items():
        assert found[key] == pytest.approx((error / reference) ** 0.5, rel=1e-4), key
    weight = module.weight.double()
    assert found["weight_error"] == pytest.approx(float((dense - weight).norm() / weight.norm()), rel=1e-9)
    assert found["clip_share"] == ((codes == -8) | (codes == 7)).double().mean().item()
    assert (found["bits"], found["group_size"], found["decoder_layer"]) == (4, 128, 1)


def test_hidden_error__against_hidden_states_of_both_models__equal(
    llava: Pair, int4: Path, report: dict[str, Any]
) -> None:
    a, b = opened(llava.student), opened(int4)
    collator = ConversationCollator(AutoProcessor.from_pretrained(llava.student))
    error, reference = torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)
    for row in [*asked(), *make_samples(1, seed=5, images=0)]:
        batch = collator([row])
        batch.pop("labels")
        with torch.no_grad():
            states = [m(**batch, output_hidden_states=True).hidden_states[1:3] for m in (a, b)]
        error += torch.stack([(y.double() - x.double()).pow(2).sum() for x, y in zip(*states, strict=True)])
        reference += torch.stack([x.double().pow(2).sum() for x in states[0]])
    found = [one["hidden_error"] for one in report["decoder_layers"]]
    assert len(found) == 3
    assert found[:2] == pytest.approx((error / reference).sqrt().tolist(), rel=1e-6)


@pytest.mark.slow
def test_compare__larger_batches_with_padding__only_rounding_differs(
    llava: Pair, int4: Path, report: dict[str, Any]
) -> None:
    whole = compare_checkpoints(llava.student, int4, asked() + make_samples(1, seed=5, images=0), batch_size=5)
    assert whole["overall"]["kl"] == pytest.approx(report["overall"]["kl"], rel=0.02)
    for one, other in zip(whole["layers"], report["layers"], strict=True):
        assert (one["name"], one["output_error"]) == (other["name"], pytest.approx(other["output_error"], rel=0.005))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "error"), [(lambda s: s.mul_(2.0), 1.0), (lambda s: s.zero_(), 1.0)], ids=["doubled", "zero"]
)
def test_compare__one_edited_layer__ranks_first(
    llava: Pair, int4: Path, tmp_path: Path, edit: Any, error: float
) -> None:
    broken = edited(int4, tmp_path / "broken", f"{LAYER}.weight_scale", edit)
    found = compare_checkpoints(llava.student, broken, asked())
    assert found["layers"][0]["name"].endswith(LAYER)
    assert found["layers"][0]["output_error"] == pytest.approx(error, abs=0.05)
    assert found["layers"][1]["output_error"] < 0.3
    assert found["decoder_layers"][0]["hidden_error"] < 0.3 < found["decoder_layers"][1]["hidden_error"]


@pytest.mark.slow
def test_compare__one_edited_embedding__the_sample_that_reads_it_ranks_first(int4: Path, tmp_path: Path) -> None:
    """Two INT4 checkpoints that differ in the embedding of one letter, which one sample holds."""
    tokenizer = AutoProcessor.from_pretrained(int4).tokenizer
    (letter,) = tokenizer("Z", add_special_tokens=False)["input_ids"]
    broken = edited(int4, tmp_path / "broken", "embed_tokens.weight", lambda w: w[letter].neg_())
    questions = asked(6)
    questions[3]["messages"][0]["content"].append({"type": "text", "text": " Z Z Z"})
    found = compare_checkpoints(int4, broken, questions, worst=2)
    first, second = found["worst"]
    assert (first["number"], first["name"]) == (3, "sample 'held-3'")
    assert first["kl"] > 0 == second["kl"]
    assert found["types"][0]["type"] == "shape" and found["types"][1]["kl"] == 0.0
    assert all(one["output_error"] == 0.0 and one["weight_error"] == 0.0 for one in found["layers"])
    assert found["layers"][0]["clip_share"] == found["layers"][0]["clip_share_a"]
    assert found["a"]["quantized"]


@pytest.mark.slow
def test_compare__types_and_accepted_answers__counted_by_sample(
    llava: Pair, int4: Path, report: dict[str, Any]
) -> None:
    assert sorted((one["type"], one["samples"]) for one in report["types"]) == [("", 1), ("colour", 2), ("shape", 2)]
    assert report["overall"]["questions"] == 4
    model = opened(llava.student)
    processor = AutoProcessor.from_pretrained(llava.student)
    row = asked()[0]
    prompt = processor.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, tokenize=False)
    given = processor(text=prompt, images=row["images"], return_tensors="pt", add_special_tokens=False)
    out = model.generate(**given, max_new_tokens=64, do_sample=False)
    said = processor.tokenizer.decode(out[0, given["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    long = "yes " * 80
    both = [{**row, "id": 1, "accept": [long]}, {**row, "id": 2, "accept": [long, f" {said} "]}]
    found = compare_checkpoints(llava.student, int4, both, batch_size=1)
    assert [one["answers"]["a"] for one in found["worst"]] == [said, said]
    assert found["overall"]["accuracy_a"] == 0.5


def test_compare__checkpoint_of_a_run__read(finished: Finished) -> None:
    found = compare_checkpoints(finished.pair.student, finished.folder, finished.dataset, limit=5, seed=3)
    assert found["samples"] == {"given": 16, "drawn": 5, "used": 5, "rejected": {}}
    assert len(found["layers"]) == 21
    assert all(one["output_error"] > 0 for one in found["layers"])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "smolvlm", "gemma3", "qwen3_vl_moe"])
def test_compare__other_families__all_layers_measured(pair_of: Any, tmp_path: Path, family: str) -> None:
    student = pair_of(family).student
    found = compare_checkpoints(student, rounded(student, tmp_path / "int4"), mixed_samples(4), batch_size=2)
    assert found["family"] == family
    assert found["overall"]["kl"] > 0
    assert found["modality"]["compared_samples"] == 3 and found["modality"]["kl_text_only"] > 0
    assert all(0 < one["hidden_error"] < 1.5 for one in found["decoder_layers"])
    used = [one for one in found["layers"] if one["output_error"] is not None]
    assert len(used) >= 20
    assert all(0.02 < one["output_error"] < 0.4 for one in used)


@pytest.mark.slow
def test_compare__twice__the_same_bytes(llava: Pair, int4: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        compare_checkpoints(llava.student, int4, asked(), output_dir=tmp_path / name, limit=3)
    for file in ("report.json", "page.html"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    assert json.loads((tmp_path / "one/report.json").read_text())["settings"]["seed"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_damage__old_name__warns_and_is_the_same_function() -> None:
    from grace_plugin import report

    with pytest.warns(
        FutureWarning, match=r"grace_plugin\.report\.damage is now grace_plugin\.report\.compare_checkpoints"
    ):
        assert report.damage is compare_checkpoints
