"""Tensors on the device whose values the host has too, so that nothing waits for them to be read back.

A collated batch is made in host memory and copied. Modeling code then asks the copy: how many image tokens are there, is
anything padded, where does this mask hold. Each question stops the host until the device has caught up. `Known` is the copy
with its original: what known tensors alone make is known as well, and what would be read is read from the host, where it is
computed when it is asked for. Masks that select or fill rows of other tensors become lists of positions, in the backward pass
too. Values are those of the device, bit for bit; what is not known to be so (float arithmetic, random numbers, a tensor that
somebody else wrote to) is an ordinary tensor and is read as one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from grace_plugin.vlm.host import moved

__all__ = ["Known", "known_inputs"]

_READ = {
    *("item", "tolist", "numpy", "cpu", "equal", "is_nonzero", "__bool__", "__int__", "__float__", "__index__"),
    *("__format__", "__contains__", "__array__"),
}
"""What gives its caller something in host memory."""
_SIZED = {"nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "repeat_interleave", "bincount"}
"""What gives tensors whose sizes depend on values."""
_CAST = {"to", "cuda", "as_tensor", "expand_as", "type_as"}
"""What changes a tensor's dtype, its device or how often it stands there; of other tensors it takes these alone."""
_MOVED = {
    *("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "unfold", "__getitem__"),
    *("contiguous", "clone", "detach"),
}
"""What puts values elsewhere."""
_PARTS = {"unbind", "split", "chunk"}
"""What gives a tensor's values in parts."""
_WRITTEN = {"__setitem__", "__ior__", "__iand__"}
"""What writes to its first tensor."""
_LOOSE = {
    *("argmax", "argmin", "argsort", "empty_like", "new_empty"),
    *("rand_like", "randn_like", "randint_like", "randperm"),
}
"""What need not be the same here and there."""
_COUNTED = {"split", "split_with_sizes", "new_zeros", "new_ones", "new_full", "view", "reshape", "expand", "narrow"}
"""What takes numbers of elements behind its first tensor."""


class _Values:
    """Values in host memory, computed when they are first asked for; nobody writes to them."""

    def __init__(self, values: Tensor | Callable[[], Tensor]) -> None:
        self._values = values

    def get(self) -> Tensor:
        if not isinstance(self._values, Tensor):
            self._values = self._values()
        return self._values


class Known(Tensor):
    """A tensor with the same values in host memory, or with what computes them there; made by `Known.of`."""

    _equal: _Values
    _written: int
    _places: Tensor | None
    _part_of: tuple[Known, Any] | None

    @classmethod
    def of(
        cls, tensor: Tensor, values: Tensor | Callable[[], Tensor], part_of: tuple[Known, Any] | None = None
    ) -> Self:
        """`tensor` and its equal in host memory, which nobody writes to; part_of: the tensor it is a view of, and the index."""
        with torch._C.DisableTorchFunctionSubclass():
            made = tensor.as_subclass(cls)
            made._part_of = part_of
            made._note(values)
        return made

    def _note(self, values: Tensor | Callable[[], Tensor]) -> None:
        self._equal, self._written, self._places = _Values(values), self._version, None

    def host(self) -> Tensor:
        """The values in host memory."""
        return self._equal.get()

    def places(self) -> Tensor:
        """int64 [n] on the device: flat positions where a mask holds."""
        if self._places is None:
            self._places = moved(self.host().flatten().nonzero().squeeze(1), self.device)
        return self._places

    @classmethod
    @torch.compiler.disable  # nothing here is worth compiling, and it would be anew for each function that it is asked for
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":  # of a property: shape, device, dtype
                return func(*args)
            if any(map(_is_unknown, _leaves(args[:1] if name in _CAST else (args, kwargs)))):
                done = _BY_PLACE[name](*args) if name in _BY_PLACE and not kwargs else NotImplemented
                if done is not NotImplemented:
                    return done
                if name in _COUNTED:
                    args = (*args[:1], *_each(_number_of, args[1:]))
                return func(*args, **kwargs)
            return _on_both(func, name, args, kwargs)


def _on_both(func: Any, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`func` of known tensors: on the device at once, in host memory when it is asked for, of the values they have now."""
    taken = _each(_values_of, (args, kwargs))

    def on_host() -> Any:
        there, options = _each(_got, taken)
        return there[0].to(out.dtype).expand(out.shape) if name in _CAST else func(*there, **options)

    if name in _READ:
        return on_host()
    if name in _LOOSE or (name in _CAST | _SIZED and not (args and isinstance(args[0], Known))):
        return func(*args, **kwargs)
    if name in _SIZED and not args[0].is_floating_point():  # what is large is not copied twice
        return _each(lambda found: Known.of(moved(found, args[0].device), found), on_host())
    if name in _WRITTEN:
        return _write(func, *args)
    if name == "__iter__":
        return iter([Known.of(row, partial(_part, args[0]._equal.get, n)) for n, row in enumerate(args[0].unbind(0))])
    if name == "__getitem__" and _rows_mask(args[1], args[0]) is not None:
        return Known.of(_get_rows(*args), on_host)
    out = func(*args, **kwargs)
    if isinstance(out, tuple) and name in _PARTS:
        return tuple(Known.of(part, partial(_part, on_host, n)) for n, part in enumerate(out))
    if type(out) is not Tensor or (out.is_floating_point() and name not in _CAST | _MOVED):
        return out
    return Known.of(out, on_host, (args[0], taken[0][1]) if name == "__getitem__" else None)


def _write(func: Any, tensor: Known, *given: Any) -> Any:
    """Write known values to a known tensor, here and there; one that it is a view of stays known as well."""
    whole, index = tensor._part_of or (tensor, ...)
    was_known = not _is_unknown(whole)
    values = tensor.host().clone()
    func(values, *_each(_got, _each(_values_of, given)))
    out = _set_rows(tensor, *given) if len(given) == 2 else NotImplemented
    if out is NotImplemented:
        out = func(tensor, *given)
    tensor._note(values)
    if was_known and _is_unknown(whole):  # it was written to through its view
        written = whole.host().clone()
        written[_each(_got, index)] = values
        whole._note(written)
    return out


def _part(whole: Callable[[], Any], number: int) -> Tensor:
    part: Tensor = whole()[number]
    return part


def _leaves(value: Any) -> Iterator[Any]:
    """What stands in nested arguments; torch's own pytree takes longer for it than all the rest here."""
    if type(value) in (tuple, list, dict):
        for one in value.values() if type(value) is dict else value:
            yield from _leaves(one)
    else:
        yield value


def _each(change: Callable[[Any], Any], value: Any) -> Any:
    """Nested arguments, each changed."""
    if type(value) is dict:
        return {key: _each(change, one) for key, one in value.items()}
    return type(value)(_each(change, one) for one in value) if type(value) in (tuple, list) else change(value)


def _is_unknown(value: Any) -> bool:
    return isinstance(value, Tensor) and not (isinstance(value, Known) and value._written == value._version)


def _values_of(value: Any) -> Any:
    return value._equal if isinstance(value, Known) else value


def _got(value: Any) -> Any:
    return value.get() if isinstance(value, _Values) else value


def _number_of(value: Any) -> Any:
    whole = isinstance(value, Known) and not _is_unknown(value) and value.dim() == 0 and not value.is_floating_point()
    return int(value.host()) if whole else value


def _rows_mask(index: Any, of: Any) -> Known | None:
    """The mask of `of[mask]`, `of[mask, :]` or `of[mask, ...]`, known and over leading dimensions; None for another index."""
    mask, *others = index if isinstance(index, tuple) else (index,)
    if not all(one is Ellipsis or (isinstance(one, slice) and one == slice(None)) for one in others):
        return None
    if not isinstance(mask, Known) or _is_unknown(mask) or mask.dtype != torch.bool:
        return None
    return mask if 0 < mask.dim() <= of.dim() and mask.shape == of.shape[: mask.dim()] else None


def _get_rows(tensor: Tensor, index: Any) -> Any:
    """`tensor[mask]` by positions."""
    mask = _rows_mask(index, tensor)
    return NotImplemented if mask is None else tensor.flatten(0, mask.dim() - 1).index_select(0, mask.places())


def _set_rows(tensor: Tensor, index: Any, value: Any) -> Any:
    """`tensor[mask] = value` by positions."""
    mask = _rows_mask(index, tensor)
    if mask is None or not tensor.is_contiguous():
        return NotImplemented
    flat, places = tensor.view(-1, *tensor.shape[mask.dim() :]), mask.places()
    if not isinstance(value, Tensor):
        flat.index_fill_(0, places, value)
    else:
        flat.index_copy_(0, places, value.to(flat).expand(places.numel(), *flat.shape[1:]))
    return None


def _scatter_rows(tensor: Tensor, mask: Any, source: Tensor) -> Any:
    """`tensor.masked_scatter(mask, source)` by positions, for a mask that takes rows whole."""
    if not isinstance(mask, Known) or _is_unknown(mask) or mask.dim() != tensor.dim() or mask.dim() < 2:
        return NotImplemented
    if mask.shape[:-1] != tensor.shape[:-1] or not (mask.shape[-1] == 1 or mask.stride(-1) == 0):
        return NotImplemented
    places, width = Known.of(mask[..., 0], mask.host()[..., 0]).places(), tensor.shape[-1]
    if source.numel() != places.numel() * width:  # more than it takes, or too little
        return NotImplemented
    return tensor.flatten(0, -2).index_copy(0, places, source.reshape(-1, width)).view_as(tensor)


_BY_PLACE: dict[str, Callable[..., Any]] = {
    "__getitem__": _get_rows, "__setitem__": _set_rows, "masked_scatter": _scatter_rows,
}  # fmt: skip


def known_inputs(inputs: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs of a model; those whose equals stand in the batch in host memory are known."""
    return {
        key: Known.of(value, host[key])
        if isinstance(value, Tensor) and isinstance(host.get(key), Tensor) and value.device != host[key].device
        else value
        for key, value in inputs.items()
    }
