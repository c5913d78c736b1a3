"""Functions of GPU tensors as CUDA graphs, captured once and replayed.

Another thread may allocate meanwhile: a capture minds only its own. It takes place on the current
device, on one stream of its own, so that libraries keep one workspace there and not one a graph.
"""

from __future__ import annotations

import functools
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_capturing = threading.Lock()
_SHAPES = 16  # graphs that are kept, each for one set of shapes


@functools.cache
def _aside(device: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def captured(function: Callable[[], Any], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """The graph of what ``function`` launches, and what it returned while it was captured.

    It runs once before that: libraries and Triton set up then what may not be captured. One thread
    of the process captures at a time, as what another one launches on that stream would be in its
    graph.
    """
    aside = _aside(torch.cuda.current_device())
    with _capturing:
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            function()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool, aside, capture_error_mode="thread_local"):
            outputs = function()
    return graph, outputs


class Captures:
    """One function of tensors, captured for each set of their shapes; the latest stay.

    What a call returns is overwritten by the next one. The graphs share their memory, since one at
    a time is replayed; on a CPU the function itself runs.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, list[Tensor], Any]]
        self._known = OrderedDict()
        self._pool: Any = None

    def clear(self) -> None:
        self._known.clear()
        self._pool = None

    def __call__(self, function: Callable[..., Any], *inputs: Tensor) -> Any:
        if not inputs[0].is_cuda:
            return function(*inputs)
        key = tuple(t.shape for t in inputs)
        if key not in self._known:
            if len(self._known) >= _SHAPES:
                self._known.popitem(last=False)
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            own = [t.clone() for t in inputs]
            graph, outputs = captured(lambda: function(*own), self._pool)
            self._known[key] = graph, own, outputs
        self._known.move_to_end(key)
        graph, own, outputs = self._known[key]
        for mine, given in zip(own, inputs, strict=True):
            mine.copy_(given)
        graph.replay()
        return outputs
