"""A micro-batch's forward and backward as one CUDA graph: one launch for the thousands of kernels of a step.

A graph's shapes are fixed, so a pack is filled up with documents that weigh nothing: to a number of tokens, of which
there are eight between two powers of two, and its longest document to a power of two (our choice). A token's bits
follow from its own document, so fillers change none; a weight's gradient sums up zeros more, and the compressors' sums
go in other steps than those of a pack as it is.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..kernels.dispatch import wants_triton
from ..model.deepseek_v4 import DeepseekV4
from .balance import Loads
from .packing import Batch

Metrics = dict[str, Tensor]
_F = TypeVar("_F", bound=Callable)
_LOG = logging.getLogger(__name__)
_said: set[str] = set()

GRAIN = 128  # tokens of a filler, at most, and of a pack's rounding, at least
KEPT = 16  # graphs, the last used, which share their memory


def recordable(loss: _F) -> _F:
    """Marks a loss that a graph may hold. It asks the host for nothing, with any settings; and a token takes part in it
    and in its metrics as batch["weight"] says, so that fillers, of weight 0, add nothing."""
    loss.recordable = True  # pyright: ignore[reportFunctionMemberAccess]
    return loss


class Sizes(NamedTuple):
    tokens: int
    longest: int  # tokens of a document, at most


def sizes_of(cu_seqlens: np.ndarray) -> Sizes:
    """What a pack is filled up to."""
    total, longest = int(cu_seqlens[-1]), int(np.diff(cu_seqlens).max())
    step = max(_power(total) // 16, GRAIN)
    tokens = -(-total // step) * step
    return Sizes(tokens, min(max(_power(longest), GRAIN), tokens))


def filled(batch: Batch, tokens: int) -> Batch:
    """The batch with further documents up to `tokens`, all of zeros, and "cu_seqlens" [tokens + 1], whose end repeats:
    so many documents there may be. "real" int64 [tokens] is 1 for the batch's own tokens."""
    borders = batch["cu_seqlens"]
    end = int(borders[-1])
    made = {name: _longer(values, tokens) for name, values in batch.items() if name != "cu_seqlens"}
    made["real"] = _longer(np.ones(end, np.int64), tokens)
    cu = made["cu_seqlens"] = np.full(tokens + 1, tokens, borders.dtype)
    cu[: len(borders)] = borders
    more = np.arange(end + GRAIN, tokens, GRAIN)
    cu[len(borders) : len(borders) + len(more)] = more
    return made


class TrainingGraphs:
    """Graphs of one model's losses. `loads` counts the batches' own tokens alone; gradients come multiplied by `times`.

    The first pack of new sizes runs without a graph, laid out as for one; the second is recorded. On a CPU there are no
    graphs, and all else is the same. All graphs, and what runs without one, use the same memory.
    """

    def __init__(self, model: DeepseekV4, loads: Loads | None = None, times: int = 1):
        self._model, self._loads, self._times = model, loads, times
        self._weights = [p for p in model.parameters() if p.requires_grad]
        self._device = model.lm_head.weight.device
        self._recordings: OrderedDict[tuple, _Recording] = OrderedDict()
        self._memory = _Memory(self._device) if self._device.type == "cuda" else None

    def run(self, loss: Callable, batch: Batch, shared: dict[str, Tensor], settings: dict[str, Any]) -> Metrics:
        """loss(model, batch, shared, **settings), which is `recordable`: its metrics, as float64.

        The gradient of this batch alone is then in the parameters' `grad`, until the next run; None where the loss does
        not reach one. `shared`, and the parameters, are read where they were when the loss was recorded: they may only
        change in place, or `clear` follows.
        """
        sizes = sizes_of(batch["cu_seqlens"])
        given = filled(batch, sizes.tokens)
        for p in self._weights:
            p.grad = None  # whose memory this run may use
        fields = tuple((name, values.dtype.str, values.shape) for name, values in given.items())
        key = loss, sizes.longest, fields, tuple(sorted(settings.items()))
        if key not in self._recordings:
            self._recordings[key] = _Recording(given, self._device)
            if len(self._recordings) > KEPT:
                self._recordings.popitem(last=False)
        self._recordings.move_to_end(key)
        recording = self._recordings[key]
        recording.fill(given)
        compute = partial(self._compute, loss, recording.inputs, sizes.longest, shared, settings)
        result = compute() if self._memory is None else self._memory.run(recording, compute, name_of(loss))
        for p, gradient in zip(self._weights, result.gradients, strict=True):
            p.grad = gradient
        return dict(zip(result.names, result.metrics.unbind(), strict=True))

    def held_bytes(self) -> int:
        """Of memory that nothing else can use."""
        return 0 if self._memory is None else self._memory.held_bytes()

    def clear(self) -> None:
        """Forgets all graphs."""
        self._recordings.clear()

    def _compute(
        self, loss: Callable, inputs: dict[str, Tensor], longest: int, shared: dict[str, Tensor], settings: dict
    ) -> "_Result":
        batch = dict(inputs)
        real = batch.pop("real")
        with self._fixed(longest, real):
            value, metrics = loss(self._model, batch, shared, **settings)
        with torch.autograd.set_multithreading_enabled(False):  # else another thread would not use the pool
            gradients = torch.autograd.grad(value * self._times, self._weights, allow_unused=True)
        together = torch.stack([metric.detach().double() for metric in metrics.values()])
        return _Result([*metrics], together, [None if g is None else g.contiguous() for g in gradients])

    @contextmanager
    def _fixed(self, longest: int, real: Tensor) -> Iterator[None]:
        self._model.longest = longest
        if self._loads is not None:
            self._loads.real = real
        try:
            yield
        finally:
            self._model.longest = None
            if self._loads is not None:
                self._loads.real = None


class _Result(NamedTuple):
    names: list[str]
    metrics: Tensor  # float64, in the names' order
    gradients: list[Tensor | None]


class _Recording:
    """The tensors that a batch of one kind is copied into; and the graph, once there is one, with its result."""

    def __init__(self, batch: Batch, device: torch.device):
        self.inputs = {n: torch.empty_like(torch.from_numpy(x), device=device) for n, x in batch.items()}
        self.seen = False
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: _Result | None = None

    def fill(self, batch: Batch) -> None:
        for name, values in batch.items():
            there, here = self.inputs[name], torch.from_numpy(values)
            # From memory that is not pinned a copy would wait for all that the device has still to do.
            there.copy_(here.pin_memory() if there.is_cuda else here, non_blocking=True)


class _Memory:
    """A pool, and the stream that it belongs to: recordings and what runs before them use the same bytes in turn."""

    def __init__(self, device: torch.device):
        self._device = device
        with torch.cuda.device(device):
            self._pool, self._stream = torch.cuda.MemPool(), torch.cuda.Stream()

    def run(self, recording: _Recording, compute: Callable[[], _Result], name: str) -> _Result:
        with torch.cuda.device(self._device):
            if not recording.seen:
                recording.seen = True
                return self._aside(compute)
            if recording.graph is None:
                recording.graph, recording.result = self._recorded(compute, name)
            assert recording.result is not None
            recording.graph.replay()
            return recording.result._replace(metrics=recording.result.metrics.clone())

    def held_bytes(self) -> int:
        return sum(segment["total_size"] for segment in self._pool.snapshot())

    def _aside(self, compute: Callable[[], _Result]) -> _Result:
        """On the pool's stream, with the pool's memory."""
        main = torch.cuda.current_stream()
        self._stream.wait_stream(main)
        with torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            result = compute()
        main.wait_stream(self._stream)
        return result

    def _recorded(self, compute: Callable[[], _Result], name: str) -> tuple[torch.cuda.CUDAGraph, _Result]:
        graph, pool = torch.cuda.CUDAGraph(), cast(Any, self._pool.id)
        try:
            with torch.cuda.graph(graph, pool, self._stream, capture_error_mode="thread_local"):
                result = compute()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"{name} cannot be recorded in a CUDA graph: it asks the host for a number or a shape, and must not be "
                "marked as recordable"
            ) from error
        # Gradients are held without their memory, which the next recording may use.
        borrowed: list[Tensor | None] = [None if g is None else _borrowed(g) for g in result.gradients]
        return graph, result._replace(gradients=borrowed)


def _borrowed(x: Tensor) -> Tensor:
    """A tensor at the place of x, which is contiguous, that does not keep x's memory from being used again."""
    whole = x.view(torch.uint8)
    place = {"shape": tuple(whole.shape), "typestr": "|u1", "data": (whole.data_ptr(), False), "version": 3}
    holder = type("Place", (), {"__cuda_array_interface__": place})()
    return torch.as_tensor(holder, device=x.device).view(x.dtype)


def why_not(model: nn.Module, loss: Callable) -> str:
    """Why `TrainingGraphs` does not take a loss of a model; nothing if it does. The log says it once."""
    device = next(model.parameters()).device
    if device.type != "cuda":
        why = f"there are none on {device.type}"
    elif not isinstance(model, DeepseekV4) or not wants_triton(device):
        why = "only the Triton kernels of DeepSeek-V4 ask the host for nothing"
    elif not getattr(loss, "recordable", False):
        why = "the loss is not marked as recordable"
    else:
        why = ""
    said = f"{name_of(loss)} runs " + (f"without CUDA graphs: {why}" if why else "as CUDA graphs")
    if said not in _said:
        _said.add(said)
        _LOG.info(said)
    return why


def name_of(loss: Callable) -> str:
    return f"{loss.__module__}:{loss.__qualname__}"


def _longer(values: np.ndarray, tokens: int) -> np.ndarray:
    made = np.zeros((tokens, *values.shape[1:]), values.dtype)
    made[: len(values)] = values
    return made


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()
