"""When a quantized weight is computed again and when it is not."""

import copy

import pytest
import torch

from grace_plugin.quantizer import StepCounter, WeightCache


class Watched:
    """A cache with two tensors, and a value that tells how often it was made."""

    def __init__(self, counter=None):
        self.cache = WeightCache(counter)
        self.weight = torch.nn.Parameter(torch.ones(2, 2))
        self.scale = torch.nn.Parameter(torch.zeros(2, 1))
        self.made = 0

    def get(self, dtype=torch.float32):
        def compute():
            self.made += 1
            return torch.full((2, 2), float(self.made), dtype=dtype), torch.full((2, 1), float(self.made))

        value, scale = self.cache.get(self.weight, self.scale, dtype, compute)
        assert scale[0, 0] == value[0, 0]
        return value


def test_weight_cache__no_change__one_computation():
    watched = Watched()
    values = [watched.get() for _ in range(3)]
    assert [value[0, 0].item() for value in values] == [1, 1, 1]
    assert len({value.data_ptr() for value in values}) == 1
    assert len({id(value) for value in values}) == 3
    assert watched.cache.quantizations == 1


@torch.no_grad()
def in_place(watched):
    watched.weight.add_(1)


@torch.no_grad()
def in_place_scale(watched):
    watched.scale.add_(1)


def new_storage(watched):
    watched.weight.data = watched.weight.data.clone()


def new_storage_of_scales(watched):
    watched.scale.data = watched.scale.data.clone()


def another_dtype(watched):
    watched.weight.data = watched.weight.data.view(torch.bfloat16)[:, :2]


def another_shape(watched):
    watched.weight.data = watched.weight.data.view(4, 1)


@pytest.mark.parametrize(
    "change", [in_place, in_place_scale, new_storage, new_storage_of_scales, another_dtype, another_shape]
)
def test_weight_cache__visible_change__computed_again(change):
    watched = Watched()
    first = watched.get()
    change(watched)
    second = watched.get()
    assert [first[0, 0].item(), second[0, 0].item()] == [1, 2]
    assert watched.cache.quantizations == 2
    assert watched.get()[0, 0].item() == 2


def test_weight_cache__other_dtype__computed_again():
    watched = Watched()
    watched.get()
    assert watched.get(torch.bfloat16).dtype == torch.bfloat16
    assert watched.get(torch.float32).dtype == torch.float32
    assert watched.cache.quantizations == 3


def test_weight_cache__hidden_write__seen_by_step_counter():
    """``.data`` writes do not move the version: the reason the counter exists."""
    counter = StepCounter()
    watched = Watched(counter)
    watched.get()
    version = watched.weight._version
    watched.weight.data.add_(1)
    assert watched.weight._version == version
    assert watched.get()[0, 0].item() == 1
    counter.advance()
    assert watched.get()[0, 0].item() == 2


class HiddenSteps(torch.optim.Optimizer):
    """An optimizer that writes through ``.data``, as several published ones do."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(1.0)


def test_step_counter__between_start_and_stop__counts_every_optimizer():
    counter = StepCounter()
    watched = Watched(counter)
    optimizer = HiddenSteps([watched.weight])
    optimizer.step()
    assert counter.steps == 0
    counter.start()
    counter.start()
    watched.get()
    optimizer.step()
    assert counter.steps == 1
    assert watched.get()[0, 0].item() == 2
    torch.optim.SGD([watched.scale], lr=0.1).step()
    assert counter.steps == 2
    counter.stop()
    counter.stop()
    optimizer.step()
    assert counter.steps == 2
    counter.start()
    optimizer.step()
    assert counter.steps == 3
    counter.stop()


def test_weight_cache__deepcopy__empty_with_same_counter():
    counter = StepCounter()
    watched = Watched(counter)
    watched.get()
    clone = copy.deepcopy(watched.cache)
    assert clone.quantizations == 0
    clone.get(watched.weight, watched.scale, torch.float32, lambda: (torch.zeros(1), torch.ones(1)))
    counter.advance()
    clone.get(watched.weight, watched.scale, torch.float32, lambda: (torch.zeros(1), torch.ones(1)))
    assert clone.quantizations == 2


def test_weight_cache__value__without_autograd_history():
    watched = Watched()
    first = watched.get()
    first.requires_grad_()
    assert not watched.get().requires_grad
