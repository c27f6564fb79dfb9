"""What a training step computes, in floating-point operations, and what a machine can do of them in a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def count_flops(step: Callable[[], object]) -> float:
    """Operations of matrix products and convolutions in ``step()``, a multiplication and an addition counting as two.

    Attention counts as its two products over all pairs, masked or not, also where a fused kernel skips some. Whatever
    ``step`` computes twice counts twice: count without gradient checkpointing, whose recomputation does not get the
    model any further.
    """
    # In plain products, since the counter does not know every device's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    return float(counter.get_total_flops())


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Operations per second of square matrix products in ``dtype``, the best of several sizes, each a median."""
    best = 0.0
    sizes = (4096, 8192, 16384) if device.type == "cuda" else (1024, 2048)
    for size in sizes:
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        rates, began = [], time.perf_counter()
        while len(rates) < 3 or time.perf_counter() - began < seconds / len(sizes):
            rates.append(2 * size**3 / seconds_of(device, lambda a=a, b=b: a @ b))
        best = max(best, statistics.median(rates[1:]))
    return best


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """Time that ``work()`` takes on the device."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3
