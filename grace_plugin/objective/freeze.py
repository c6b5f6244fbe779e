"""The end of a run's quantizer: codes and scales of the final weights, and the proof that a forward pass multiplies by them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from grace_plugin.quantizer.attach import QuantizedLayerGroup

__all__ = ["freeze"]


def freeze(attached: Sequence[QuantizedLayerGroup]) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, int]]:
    """Codes (int8 [out, in]) and scales ([out, groups], stored dtype) by layer name, and how many weights were compared.

    Every layer's weight is taken the way its forward pass takes it and compared with `code * scale`, bit for bit, one layer at
    a time.

    Raises:
        RuntimeError: a forward pass would multiply by other weights; nothing was changed, and the call can be made again.
    """
    frozen: dict[str, tuple[Tensor, Tensor]] = {}
    differing: dict[str, int] = {}
    for one in attached:
        codes = one.freeze()
        differing |= one.count_forward_mismatches(codes)
        frozen |= codes
    if differing:
        shown = ", ".join(f"{name}: {count}" for name, count in list(differing.items())[:5])
        raise RuntimeError(
            f"in {len(differing)} of {len(frozen)} layers the forward pass multiplies by weights that are not code * scale of "
            f"the final ones ({shown}): they were changed in a way torch does not count, such as a write through .data, and "
            "the last forward passes ran on older ones. Call invalidate() of objective.attached after such a write; to save "
            "the weights as they are now, call the same again"
        )
    return frozen, {"weights": sum(codes.numel() for codes, _ in frozen.values()), "weights_differing": 0}
