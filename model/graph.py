"""A decoding step recorded in a CUDA graph: one launch for the hundreds of kernels of a step."""

from collections.abc import Callable

import torch
from torch import Tensor

from .cache import Cache


class DecodeGraph:
    """The step of a cache's B requests, with the bits of the step itself, whatever the requests' lengths.

    `step` decodes the next token of each request, given `inputs` [B, ...], and updates `cache`; it asks the device for
    nothing. So `lambda tokens: model.decode(tokens, cache).hidden` will do with the Triton kernels; the reference of
    the experts (kernels/moe.py) asks. The step runs once before it is recorded, to compile kernels and to allocate;
    what that writes into the cache is overwritten by each request's next token.

    The lengths are read from `cache.length`: between two replays requests may be rolled back, cleared or extended, all
    in place. A request that has ended gets a token at every replay too: clear it again before the cache is full.
    ValueError for inputs that are not on a CUDA device, and for a full cache.
    """

    @torch.no_grad()
    def __init__(self, step: Callable[[Tensor], Tensor], inputs: Tensor, cache: Cache):
        if not inputs.is_cuda:
            raise ValueError(f"a CUDA graph needs a CUDA device; the inputs are on {inputs.device}")
        self._step, self._inputs, self.cache = step, inputs.clone(), cache
        self._check_room()
        self._graph = torch.cuda.CUDAGraph()
        length, held, longest = cache.length.clone(), cache.held.clone(), cache.longest
        try:
            with torch.cuda.device(inputs.device):
                side, main = torch.cuda.Stream(), torch.cuda.current_stream()
                side.wait_stream(main)
                with torch.cuda.stream(side):
                    self._widest_step()
                main.wait_stream(side)
                with torch.cuda.graph(self._graph):
                    self._output = self._widest_step()
        finally:
            cache.length.copy_(length)
            cache.held.copy_(held)
            cache.longest = longest

    def replay(self, inputs: Tensor) -> Tensor:
        """What `step` gives for `inputs`, until the next replay; ValueError for another shape or a full cache."""
        if inputs.shape != self._inputs.shape:
            raise ValueError(f"the graph takes inputs {list(self._inputs.shape)}, got {list(inputs.shape)}")
        self._check_room()
        self._inputs.copy_(inputs)
        self._graph.replay()
        self.cache.longest += 1
        return self._output

    def _widest_step(self) -> Tensor:
        """The step with the shapes of a cache that it fills, which serve all lengths."""
        self.cache.longest = self.cache.capacity - 1
        return self._step(self._inputs)

    def _check_room(self) -> None:
        if self.cache.longest >= self.cache.capacity:
            raise ValueError(f"the cache is full: a request holds {self.cache.longest} tokens, all there is room for")
