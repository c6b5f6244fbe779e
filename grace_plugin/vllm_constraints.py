"""Check the shape constraints of vLLM's INT4 and INT8 kernels before training instead of after it.

Under tensor parallelism vLLM splits some linears of a family along their inputs and all others along their outputs. An
input width per rank that the group does not divide has no kernel and is refused. A layer that only vLLM's CPU kernel takes (it
needs multiples of 32) is a warning, and so are bits other than 4 and 8, which need the package humming-kernels and CUDA.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

from torch import nn

from grace_plugin.quantizer import QuantFormat
from grace_plugin.vlm import Family

__all__ = ["check_kernels"]

logger = logging.getLogger(__name__)

SERVED_BITS = (4, 8)  # by kernels that are in vLLM itself; humming-kernels adds 2, 3, 5, 6 and 7
#: kernel: (inputs in multiples of, outputs in multiples of)
GPU_KERNELS = {"Marlin": (128, 64), "Machete": (64, 128)}


def check_kernels(
    formats: Mapping[QuantFormat, Mapping[str, nn.Linear]],
    tensor_parallel_size: int = 1,
    row_parallel: Collection[str] = Family.row_parallel,
) -> list[str]:
    """Refuse layers that no kernel can take at this tensor parallelism; warn of those that no GPU kernel takes.

    Args:
        formats: layers by format.
        tensor_parallel_size: ranks the checkpoint will be served on.
        row_parallel: names of the linears that vLLM splits along their inputs, of the family.

    Returns:
        The warnings, which are also logged.

    Raises:
        ValueError: lists every layer whose width per rank is no multiple of the group, and how to fix it.
    """
    problems, slow, odd = [], [], set()
    for fmt, linears in formats.items():
        if fmt.num_bits not in SERVED_BITS:
            odd.add(fmt.num_bits)
        for name, linear in linears.items():
            along_input = name.rpartition(".")[2] in row_parallel
            split = linear.in_features if along_input else linear.out_features
            width = linear.in_features // tensor_parallel_size if along_input else linear.in_features
            outputs = linear.out_features if along_input else linear.out_features // tensor_parallel_size
            if split % tensor_parallel_size:
                problems.append(f"{name}: {split} cannot be split in {tensor_parallel_size}")
            elif fmt.width_problem(width):
                problems.append(f"{name}: {width} inputs per rank, group {fmt.group_size}")
            elif not any(width % k == 0 and outputs % n == 0 for k, n in GPU_KERNELS.values()):
                slow.append(f"{name} ({width} in, {outputs} out)")
    if problems:
        raise ValueError(
            f"{len(problems)} layer(s) cannot be served at tensor_parallel_size={tensor_parallel_size}: {'; '.join(problems)}. "
            "To fix: lower serving.tensor_parallel_size or group_size, or add the layers to ignore"
        )
    warnings = []
    if odd:
        warnings.append(
            f"{sorted(odd)} bits: vLLM serves them on CUDA where humming-kernels is installed (pip install humming-kernels); "
            "its CPU build does not"
        )
    if slow:
        warnings.append(
            f"{len(slow)} layer(s) fit neither Marlin nor Machete at tensor_parallel_size={tensor_parallel_size} and run on "
            f"vLLM's CPU kernel only: {', '.join(slow[:6])}"
        )
    for warning in warnings:
        logger.warning(warning)
    return warnings
