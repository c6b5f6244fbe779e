"""Medians, peaks and the machine's two ceilings."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

__all__ = ["Work", "ceilings", "device_ms", "extra_gib", "graphed", "median_ms", "paired_ms", "reserved_gib"]

Work = Callable[[], Any]


def paired_ms(works: dict[str, Work], repeats: int = 20, lead: int = 0) -> dict[str, float]:
    """Median times of several works in milliseconds, a call of each in turn: a clock that drifts drifts under all of them.

    lead: untimed calls of the same work ahead of each timed one, where a call finds what the one before it left; on a CPU all
    calls of a work follow each other.
    """
    if not torch.cuda.is_available():
        timers = {name: Timer("work()", "work()", globals={"work": work}) for name, work in works.items()}
        return {name: 1000 * timer.blocked_autorange(min_run_time=0.2).median for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(3 + repeats):
        for name, work in works.items():
            for _ in range(lead):
                work()
            torch.cuda.synchronize()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            if number >= 3:
                times[name].append(start.elapsed_time(end))
    return {name: statistics.median(several) for name, several in times.items()}


def median_ms(work: Work, repeats: int = 20) -> float:
    """Median time of a call in milliseconds: device events around each of `repeats` calls, or torch's Timer on a CPU."""
    return paired_ms({"work": work}, repeats)["work"]


def graphed(work: Work) -> Work:
    """The same device work without the host's share: a CUDA graph's replay. On a CPU, the work itself."""
    if not torch.cuda.is_available():
        return work
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def _settle() -> None:
    """Wait for the device, give back what torch keeps of it, and begin a new peak."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def extra_gib(work: Work) -> float | None:
    """Peak GiB that a call holds beyond what was there before it, results included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    _settle()
    before = torch.cuda.memory_allocated()
    held = work()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del held
    return peak / 2**30


def device_ms(work: Work) -> float | None:
    """Milliseconds of all kernels and copies of a call, added up by torch's profiler; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in seen.key_averages()) / 1000


def reserved_gib(work: Work) -> float | None:
    """Peak GiB that torch holds of the device during a call, what was there before it included; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    _settle()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_reserved() / 2**30


def ceilings(device: str) -> dict[str, float]:
    """TB/s of a large copy (bytes read and written) and TFLOP/s of a large bfloat16 (CPU: float32) product."""
    cuda = device == "cuda"
    source = torch.zeros(1 << (31 if cuda else 27), dtype=torch.uint8, device=device)
    target, side = torch.empty_like(source), 8192 if cuda else 1024
    square = torch.randn(side, side, device=device, dtype=torch.bfloat16 if cuda else torch.float32)
    return {
        "copy_tb_per_s": 2 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e9,
        "product_tflop_per_s": 2 * side**3 / median_ms(lambda: square @ square) / 1e9,
    }
