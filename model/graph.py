"""A decoding step recorded in a CUDA graph: one launch for the hundreds of kernels of a step."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .cache import Cache
from .language_model import Output

SIZES = (1, 2, 4, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
"""Requests of a graph; a batch takes the next larger one, and a larger batch none (our choice)."""


class DecodeGraph:
    """The step of a cache's B requests, with the bits of the step itself, whatever the requests' lengths.

    `step` decodes the next token of each request, given `inputs` [B, ...], and updates `cache`; it asks the device for
    nothing. So `lambda tokens: model.decode(tokens, cache).hidden` will do with the Triton kernels; the reference of
    the experts (kernels/moe.py) asks. The step runs once before it is recorded, to compile kernels and to allocate;
    what that writes into the cache is overwritten by each request's next token. Graphs of one `pool` share their
    memory: what one gave is lost with another's replay.

    The lengths are read from `cache.length`: between two replays requests may be rolled back, cleared or extended, all
    in place. A request that has ended gets a token at every replay too: clear it again before the cache is full.
    ValueError for inputs that are not on a CUDA device, and for a full cache.
    """

    @torch.no_grad()
    def __init__(
        self,
        step: Callable[..., Any],
        inputs: Tensor | tuple[Tensor, ...],
        cache: Cache,
        pool: Any = None,
    ):
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        if not inputs[0].is_cuda:
            raise ValueError(f"a CUDA graph needs a CUDA device; the inputs are on {inputs[0].device}")
        self._step, self._inputs, self.cache = step, [each.clone() for each in inputs], cache
        self._check_room()
        self._graph = torch.cuda.CUDAGraph()
        length, held, longest = cache.length.clone(), cache.held.clone(), cache.longest
        try:
            with torch.cuda.device(inputs[0].device):
                side, main = torch.cuda.Stream(), torch.cuda.current_stream()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    self._widest_step()
                main.wait_stream(side)
                with torch.cuda.graph(self._graph, pool=pool):
                    self._output = self._widest_step()
        finally:
            cache.length.copy_(length)
            cache.held.copy_(held)
            cache.longest = longest

    def replay(self, *inputs: Tensor) -> Any:
        """What `step` gives for `inputs`, until the next replay; ValueError for another shape or a full cache."""
        for new, own in zip(inputs, self._inputs, strict=True):
            if new.shape != own.shape:
                raise ValueError(f"the graph takes inputs {list(own.shape)}, got {list(new.shape)}")
        self._check_room()
        for new, own in zip(inputs, self._inputs, strict=True):
            own.copy_(new)
        self._graph.replay()
        self.cache.longest += 1
        return self._output

    def _widest_step(self) -> Any:
        """The step with the shapes of a cache that it fills, which serve all lengths."""
        self.cache.longest = self.cache.capacity - 1
        return self._step(*self._inputs)

    def _check_room(self) -> None:
        if self.cache.longest >= self.cache.capacity:
            raise ValueError(f"the cache is full: a request holds {self.cache.longest} tokens, all there is room for")


class DecodeGraphs:
    """`model.decode(tokens, cache, slots)` by graphs for batches of `sizes`, each recorded when it is first needed.

    A batch is filled up with rows of the cache's last slot, which is nobody's and has no pages. `record` makes a graph
    of a step (tests give another on a CPU).
    """

    def __init__(
        self,
        model: Any,
        cache: Cache,
        sizes: tuple[int, ...] = SIZES,
        record: Callable[..., Any] = DecodeGraph,
    ):
        self._model, self._cache, self._sizes, self._record = model, cache, sizes, record
        self._spare = cache.length.numel() - 1
        self._graphs: dict[int, Any] = {}
        self._pool = torch.cuda.graph_pool_handle() if cache.length.is_cuda else None

    def decode(self, tokens: Tensor, slots: Tensor) -> Output:
        """Tokens and slots int64 [B]. What it returns is lost with the next call."""
        count = tokens.numel()
        size = next((size for size in self._sizes if size >= count), None)
        if size is None:
            return self._model.decode(tokens, self._cache, slots)
        inputs = F.pad(tokens, (0, size - count)), F.pad(slots, (0, size - count), value=self._spare)
        if size not in self._graphs:
            nobody = torch.full_like(inputs[1], self._spare)
            self._graphs[size] = self._record(self._step, (inputs[0], nobody), self._cache, self._pool)
        output = self._graphs[size].replay(*inputs)
        few: Any = [each if each is None else each[:count] for each in output]
        return Output(*few)

    def _step(self, tokens: Tensor, slots: Tensor) -> Output:
        output = self._model.decode(tokens, self._cache, slots)
        self._cache.length[self._spare :].zero_()
        self._cache.held[self._spare :].zero_()
        return output
