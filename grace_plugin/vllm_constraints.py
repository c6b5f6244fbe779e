"""Shape rules of vLLM's INT4 and INT8 kernels, asked before training instead of found out after it.

Under tensor parallelism of t, vLLM cuts o_proj and down_proj along their inputs and every other projection along its outputs.
A cut input width that the group does not divide has no kernel at all and is refused. Marlin wants outputs in multiples of 64
and inputs in multiples of 128, Machete 128 and 64, the CPU kernel 32 and 32; a layer that only the CPU kernel takes is a
warning.
Widths other than 4 and 8 bits need the package humming-kernels next to vLLM, on CUDA: a warning as well.
"""

from __future__ import annotations

import logging

from torch import nn

__all__ = ["check_kernels"]

logger = logging.getLogger(__name__)

SERVED_BITS = (4, 8)  # by kernels that are in vLLM itself; humming-kernels adds 2, 3, 5, 6 and 7
CUT_ALONG_INPUT = ("o_proj", "down_proj")
#: kernel: (inputs in multiples of, outputs in multiples of)
GPU_KERNELS = {"Marlin": (128, 64), "Machete": (64, 128)}


def check_kernels(
    formats: dict[tuple[int, int | None], dict[str, nn.Linear]], tensor_parallel_size: int = 1
) -> list[str]:
    """Refuse layers that no kernel can take at this tensor parallelism; warn of those that no GPU kernel takes.

    Args:
        formats: layers by (num_bits, group_size), group_size None for one scale per output channel.
        tensor_parallel_size: ranks the checkpoint will be served on.

    Returns the warnings, which are also logged.

    Raises:
        ValueError: lists every layer whose width per rank is no multiple of the group, and the ways out.
    """
    problems, slow, odd = [], [], set()
    for (num_bits, group_size), linears in formats.items():
        if num_bits not in SERVED_BITS:
            odd.add(num_bits)
        for name, linear in linears.items():
            along_input = name.rpartition(".")[2] in CUT_ALONG_INPUT
            cut = linear.in_features if along_input else linear.out_features
            width = linear.in_features // tensor_parallel_size if along_input else linear.in_features
            outputs = linear.out_features if along_input else linear.out_features // tensor_parallel_size
            if cut % tensor_parallel_size:
                problems.append(f"{name}: {cut} cannot be cut in {tensor_parallel_size}")
            elif group_size is not None and width % group_size:
                problems.append(f"{name}: {width} inputs per rank, group {group_size}")
            elif not any(width % k == 0 and outputs % n == 0 for k, n in GPU_KERNELS.values()):
                slow.append(f"{name} ({width} in, {outputs} out)")
    if problems:
        raise ValueError(
            f"{len(problems)} layer(s) cannot be served at tensor_parallel_size={tensor_parallel_size}: {'; '.join(problems)}. "
            "Ways out: a smaller serving.tensor_parallel_size, a smaller group_size, or the layers in ignore"
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
