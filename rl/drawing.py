"""How the rows of a step are drawn: counters, settings and masks of their requests, on the device."""

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.sampling import Draw, DrawSettings, sample
from .response import Response

_Kinds = tuple[Tensor, DrawSettings, Tensor | None]


class Drawing:
    """`vocabulary` tokens; `sets`: whether what each token was drawn from is wanted."""

    def __init__(self, device: torch.device, vocabulary: int, sets: bool):
        self.device, self.vocabulary, self.sets = device, vocabulary, sets
        self._recent: deque[tuple[list[Response], _Kinds]] = deque(maxlen=2)  # most steps draw for the same requests

    def draw(self, logits: Tensor, responses: list[Response], positions: list[int]) -> Draw:
        """The tokens at `positions` from logits fp32 [B, V]."""
        found = next((kinds for rows, kinds in self._recent if rows == responses), None)
        if found is None:
            found = self._of(responses)
            self._recent.append((list(responses), found))
        ids, settings, allowed = found
        return sample(logits, ids, self.to_device(positions, np.int64), settings, allowed, self.sets)

    def to_device(self, values: Any, dtype: Any) -> Tensor:
        """Without waiting for the device."""
        tensor = torch.from_numpy(np.asarray(values, dtype))
        return tensor.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else tensor

    def _of(self, responses: list[Response]) -> _Kinds:
        """The requests' counters int64 [B], their settings, and their masks int32 [B, words] if one has any."""
        params = [response.request.params for response in responses]

        def column(name: str, dtype: Any, none: float) -> Tensor | None:
            values = [getattr(each, name) for each in params]
            return None if all(value == none for value in values) else self.to_device(values, dtype)

        settings = DrawSettings(
            self.to_device([each.temperature for each in params], np.float64),
            self.to_device([each.seed for each in params], np.int64),
            column("top_k", np.int32, 0),
            column("top_p", np.float32, 1.0),
            column("min_p", np.float32, 0.0),
        )
        allowed = None
        if any(each.allowed is not None for each in params):
            every = np.ones(self.vocabulary, bool)
            allowed = np.stack([_packed(every if each.allowed is None else each.allowed) for each in params])
            allowed = self.to_device(allowed, np.int32)
        return self.to_device([response.request.counter for response in responses], np.int64), settings, allowed


def _packed(mask: np.ndarray) -> np.ndarray:
    """bool [V] -> int32 [ceil(V / 32)], as `losses.packed_mask`."""
    padded = np.zeros(-(-len(mask) // 32) * 32, bool)
    padded[: len(mask)] = mask
    return np.packbits(padded, bitorder="little").view("<i4")
