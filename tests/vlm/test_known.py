"""Known tensors: what is read of them comes from host memory and is what the device holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from grace_plugin.data import ConversationCollator
from grace_plugin.teacher.base import model_inputs
from grace_plugin.vlm import FAMILIES, family_of
from grace_plugin.vlm.host import moved
from grace_plugin.vlm.known import Known, known_inputs
from tests.pairs import mixed_rows
from tests.tiny import build
from tests.vlm.test_host_inputs import batch_of

CPU, META = torch.device("cpu"), torch.device("meta")
IDS = torch.tensor([[5, 7, 7, 1, 0], [7, 2, 5, 0, 0]])
MASK = IDS == 7
SIZES = torch.tensor([[2, 3], [4, 5]])


def away(tensor: Tensor) -> Known:
    """A known tensor whose device cannot be read."""
    return Known.of(tensor.to(META), tensor.clone())


def filled(ids: Any) -> Any:
    """As modeling code takes out ids that the word table does not have."""
    copied = ids.clone()
    copied[ids == 7] = 0
    return copied


READS: dict[str, Callable[[Any], Any]] = {
    "item": lambda ids: (ids == 7).sum().item(),
    "message": lambda ids: f"{(ids == 7).sum()} tokens",
    "truth": lambda ids: bool((ids != 0).all()),
    "number": lambda ids: int(ids[0, 1]) + range(9)[ids[1, 0]],
    "fraction": lambda ids: float(ids.max()),
    "list": lambda ids: ids.flatten().tolist(),
    "membership": lambda ids: 5 in ids,
    "sameness": lambda ids: torch.equal(ids, ids.clone()),
    "padded": lambda ids: torch.nn.functional.pad(ids.cumsum(0), (1, 0), value=3).tolist(),
    "runs": lambda ids: torch.diff(ids, dim=1, prepend=ids[:, :1]).ne(0).cumsum(1).tolist(),
    "cast": lambda ids: ids.to(torch.float32)[1].view(5, 1).tolist(),
    "repeated": lambda ids: (ids == 7).unsqueeze(-1).expand_as(torch.zeros(2, 5, 3, device=ids.device)).tolist(),
    "array": lambda ids: torch.as_tensor(ids, device=ids.device).prod(dim=-1).tolist(),
    "rows": lambda ids: [row.tolist() for row in ids],
    "parts": lambda ids: [part.tolist() for part in (*ids.unbind(1), *ids.split(1), *ids.chunk(2))],
    "positions": lambda ids: (ids == 7).nonzero().tolist(),
    "positions by dimension": lambda ids: [index.tolist() for index in (ids == 7).nonzero(as_tuple=True)],
    "chosen": lambda ids: torch.masked_select(ids, ids > 1).tolist(),
    "chosen by mask": lambda ids: (ids * 2)[ids == 7].tolist(),
    "kinds": lambda ids: ids.unique().tolist(),
    "repeats": lambda ids: torch.repeat_interleave(ids[0], ids[1]).tolist(),
    "in host memory": lambda ids: (ids.device, ids.cpu().tolist())[1],
    "joined": lambda ids: torch.cat([ids, ids + 1]).tolist(),
    "as numpy": lambda ids: np.asarray(ids).tolist(),
    "filled": lambda ids: filled(ids).tolist(),
    "mixed": lambda ids: ((ids == 7) | (ids == 5) & ~(ids == 0)).tolist(),
}


@pytest.mark.parametrize("name", READS)
def test_what_is_read_is_what_was_copied(name: str) -> None:
    known = away(IDS)
    assert READS[name](known) == READS[name](IDS)
    assert known.device == META and known.shape == IDS.shape  # nothing was taken off the device


def test_sizes_are_numbers() -> None:
    height, width = away(SIZES)[1]
    tensor = torch.zeros(2, 30, device=META)
    assert tensor[:, :height].shape == (2, 4)
    assert [part.shape[1] for part in tensor.split([width * height, width + width], dim=1)] == [20, 10]
    assert tensor.new_zeros(height, 3).shape == (4, 3) and tensor.view(height - 2, 5, 6).shape == (2, 5, 6)


def test_the_host_computes_only_what_is_asked() -> None:
    asked = []

    def values() -> Tensor:
        asked.append(1)
        return IDS

    known = Known.of(IDS.to(META), values)
    count = (known == 7).sum()
    assert not asked
    assert [count.item(), count.item(), known[0, 0].item()] == [3, 3, 5] and len(asked) == 1


def embedded(known: Tensor) -> Tensor:
    return torch.nn.functional.embedding(known, torch.ones(9, 4, device=known.device))


@pytest.mark.parametrize(
    "work",
    [
        lambda known: known.float().mean(), lambda known: torch.rand_like(known.float()), torch.empty_like, embedded,
        lambda known: torch.randint_like(known, 9), lambda known: known.argmax(1), lambda known: known.float() * 2,
        lambda known: known + torch.ones_like(IDS, device=known.device),
    ],
)  # fmt: skip
def test_what_the_host_could_not_say_bit_for_bit_is_not_known(work: Callable[[Tensor], Tensor]) -> None:
    assert type(work(away(IDS))) is Tensor


def test_what_was_written_to_is_read_from_the_device() -> None:
    known = Known.of(IDS.clone(), IDS.clone())
    view, copy = known.view(-1), known.clone()
    view.fill_(4)
    assert (known == 4).all().item() and view[3].item() == 4 and copy.tolist() == IDS.tolist()
    known[0] = torch.tensor([1, 2, 3, 4, 5])
    assert known[0].tolist() == [1, 2, 3, 4, 5]


def test_known_values_written_to_a_known_tensor_stay_known() -> None:
    known, plain = away(MASK), MASK.clone()
    for mask in (known, plain):
        mask[0] |= ~torch.any(mask)
        mask[1, 2] = True
        mask[1] &= mask[0]
    assert known.device == META and known.tolist() == plain.tolist()
    other, before = known[0], ~known
    known[1, 0] = True
    assert before.tolist() == (~plain).tolist()  # of the values at the time
    with pytest.raises(Exception, match="meta"):
        other.tolist()  # may have been written to


def test_a_copy_that_is_written_to_changes_nothing_else() -> None:
    known, chosen = away(MASK), away(torch.tensor([1, 0]))
    copied = known[chosen]
    copied[0] = True
    copied |= known
    assert known.tolist() == MASK.tolist()
    plain = MASK[[1, 0]]
    plain[0] = True
    assert copied.tolist() == (plain | MASK).tolist()


@st.composite
def masks(draw: Any) -> Tensor:
    return torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=4, max_size=4), min_size=1, max_size=3)))


def both(work: Callable[[Any, Tensor, Tensor], Tensor], mask: Any, base: Tensor, rows: Tensor) -> list[Tensor]:
    """The outcome and the gradients of base and rows."""
    base, rows = base.clone().requires_grad_(), rows.clone().requires_grad_()
    out = work(mask, base, rows)
    out.square().sum().backward()
    return [value for value in (out, base.grad, rows.grad) if value is not None]


def set_rows(mask: Any, base: Tensor, rows: Tensor) -> Tensor:
    out = base.clone()
    out[mask, :] = out[mask, :] + rows
    return out


def set_number(mask: Any, base: Tensor, rows: Tensor) -> Tensor:
    out = base * 2
    out[mask] = 3.0
    return out


def set_one_row(mask: Any, base: Tensor, rows: Tensor) -> Tensor:
    out = base * 2
    out[mask] = base[0, 0]
    return out


WORKS = {
    "scatter": lambda mask, base, rows: base.masked_scatter(mask.unsqueeze(-1), rows),
    "scatter repeated": lambda mask, base, rows: base.masked_scatter(mask.unsqueeze(-1).expand_as(base), rows),
    "get": lambda mask, base, rows: base[mask] * rows,
    "get, rest whole": lambda mask, base, rows: base[mask, ...] + base[mask, :],
    "set": set_rows,
    "set a number": set_number,
    "set one row": set_one_row,
}


@pytest.mark.parametrize("name", WORKS)
@given(mask=masks(), seed=st.integers(0, 99))
def test_rows_by_mask_are_torchs_bit_for_bit(name: str, mask: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    base, rows = torch.randn(*mask.shape, 3), torch.randn(int(mask.sum()), 3)
    want = both(WORKS[name], mask, base, rows)
    found = both(WORKS[name], Known.of(mask.clone(), mask), base, rows)
    assert len(want) == len(found) and all(map(torch.equal, want, found))


@pytest.mark.parametrize(
    "work",
    [
        lambda mask, base: base.masked_scatter(mask.unsqueeze(-1), torch.arange(60.0)),  # more than it takes
        lambda mask, base: base[0][mask[0]], lambda mask, base: base[mask, 1], lambda mask, base: base[:, 0][mask[:, 0]],
        lambda mask, base: base.masked_scatter(base > 0, base), lambda mask, base: base.masked_fill(mask[..., None], 2.0),
        lambda mask, base: torch.where(mask[..., None], base, -base), lambda mask, base: base[..., 0][mask],
        lambda mask, base: base.transpose(0, 1).index_put((mask.T,), torch.tensor(1.0)), lambda mask, base: base[mask.long()],
        lambda mask, base: mask[..., None].masked_scatter(mask[..., None], ~mask),
    ],
)  # fmt: skip
def test_other_ways_to_use_a_mask_are_torchs(work: Callable[[Any, Tensor], Tensor]) -> None:
    base = torch.randn(2, 5, 3)
    assert torch.equal(work(Known.of(MASK.clone(), MASK), base), work(MASK, base))


def test_a_view_is_written_through() -> None:
    known, base = Known.of(MASK.clone(), MASK), torch.zeros(5, 2)
    base.T[known] = 1.0
    assert torch.equal(base.T == 1.0, MASK)


def test_lists_of_known_tensors_and_large_ones_are_left_to_torch() -> None:
    pixels = Known.of(torch.randn(3, 2), torch.zeros(3, 2))
    numbers = [Known.of(torch.tensor(n), torch.tensor(n)) for n in (1, 2)]
    assert type(torch.masked_select(pixels, Known.of(pixels > 0, pixels > 0))) is Tensor
    assert torch.as_tensor(numbers).tolist() == torch.tensor(numbers).tolist() == [1, 2]
    assert type(torch.nonzero(input=Known.of(MASK.clone(), MASK))) is Tensor


def test_too_few_rows_are_torchs_error() -> None:
    with pytest.raises(RuntimeError, match="Number of elements"):
        torch.zeros(2, 5, 3).masked_scatter(Known.of(MASK.clone(), MASK)[..., None], torch.ones(3))


def test_inputs_are_known_where_the_host_has_them() -> None:
    host = {"input_ids": IDS, "keys": ["a"], "here": MASK}
    made = known_inputs({"input_ids": IDS.to(META), "pixels": IDS.to(META), "keys": ["b"], "here": MASK}, host)
    assert {key: type(value) for key, value in made.items()} == {
        "input_ids": Known, "pixels": Tensor, "keys": list, "here": Tensor,
    }  # fmt: skip
    assert made["input_ids"].host() is IDS and moved(IDS, CPU) is IDS


def outcome(model: Any, inputs: dict[str, Any], labels: Tensor) -> dict[str, Tensor]:
    """Logits and gradients of a model by name."""
    model.zero_grad()
    out = model(**inputs, labels=labels, use_cache=False)
    out.loss.backward()
    return {"logits": out.logits.detach()} | {
        n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_computes_the_same_bits(name: str, packed: bool) -> None:
    model, processor = build(name)
    if packed and not family_of(model).packs:
        pytest.skip("rows of this family cannot be packed")
    batch = ConversationCollator(processor, packed=packed)(mixed_rows(6))
    known = {key: Known.of(value, value.clone()) for key, value in model_inputs(batch).items()}
    found = outcome(model, known | family_of(model).host_inputs(model, batch, CPU), batch["labels"])
    want = outcome(model, model_inputs(batch), batch["labels"])
    assert len(want) > 20 and want.keys() == found.keys()
    assert [key for key in want if not torch.equal(want[key], found[key])] == []


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl"])
def test_with_videos_as_well(name: str) -> None:
    model, processor = build(name)
    batch = batch_of(processor, "both")
    known = {key: Known.of(value, value.clone()) for key, value in model_inputs(batch).items()}
    found, want = (outcome(model, inputs, batch["labels"]) for inputs in (known, model_inputs(batch)))
    assert [key for key in want if not torch.equal(want[key], found[key])] == []


def test_under_torch_compile() -> None:
    model, processor = build("llava")
    inputs = model_inputs(ConversationCollator(processor)(mixed_rows(4)))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        want = model(**inputs, use_cache=False).logits
        found = compiled(
            **{key: Known.of(value, value.clone()) for key, value in inputs.items()}, use_cache=False
        ).logits
    assert torch.equal(want, found)
