"""Where does the time of a step or of a scoring run go?

``Profile`` puts torch's profiler around the timed part of a run and adds up every operator's own time by kind: matrix
multiplications, attention, the optimizer, and the rest (norms, activations, rotations, residuals, copies). What no operator
accounts for (Python, tokenising, waiting) is ``outside of operators``. On CUDA the time is the device's.
The profiler costs time itself: a profiled run's rate is not compared with anything.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

MATRIX_MULTIPLICATION = "matrix multiplication"
# Parts of operators' and kernels' names; the first kind that fits counts.
KINDS = {
    "attention": ("attention", "flash", "flex", "fmha"),
    "optimizer": ("adam", "foreach"),
    MATRIX_MULTIPLICATION: ("aten::mm", "addmm", "bmm", "linear", "gemm", "cutlass", "nvjet", "xmma"),
}
REST = "other operators"
OUTSIDE = "outside of operators"
# Operators named in the line, those that take longest first.
N_NAMED = 12


def kind_of(name: str) -> str:
    """The kind of an operator or kernel."""
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), REST)


def seconds_by_kind(operators: Iterable[tuple[str, float]], seconds: float) -> dict[str, float]:
    """Seconds of every kind; together they are ``seconds``, unless operators ran beside each other."""
    found = dict.fromkeys((*KINDS, REST), 0.0)
    for name, own in operators:
        found[kind_of(name)] += own
    return found | {OUTSIDE: max(0.0, seconds - sum(found.values()))}


class Profile:
    """Measures what runs inside ``with``, where it is wanted; else it does nothing."""

    def __init__(self, wanted: bool, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpu else [])]
        self._profile = profile(activities=activities, acc_events=True) if wanted else None

    def __enter__(self) -> Profile:
        self._context: AbstractContextManager[Any] = nullcontext() if self._profile is None else self._profile
        self._context.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._context.__exit__(*error)

    def fields(self, seconds: float) -> dict[str, Any]:
        """``seconds_by_kind`` and the operators that took longest; nothing where no profile was wanted.

        Args:
            seconds: What the clock says of the profiled part.
        """
        if self._profile is None:
            return {}
        own: dict[str, float] = defaultdict(float)
        for event in self._profile.key_averages():
            # The operators that started a kernel, and the named ranges around them, repeat the kernel's time.
            if self._on_gpu and (event.device_type == DeviceType.CPU or event.is_user_annotation):
                continue
            spent = event.self_device_time_total if self._on_gpu else event.self_cpu_time_total
            own[event.key] += spent / 1e6
        slowest = sorted(own.items(), key=lambda item: -item[1])
        return {
            "seconds_by_kind": seconds_by_kind(slowest, seconds),
            "slowest_operators": [{"name": name, "seconds": spent} for name, spent in slowest[:N_NAMED]],
        }
