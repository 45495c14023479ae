"""Device memory lent to whoever shares the device: tensors go to the host and come back."""

import gc
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, UntypedStorage


class Offload:
    """The memory of these tensors, which other tensors may share. The tensors stay what they are; only their storage
    goes, and while it is away nobody may touch them.

    They may come back at other addresses: whoever recorded CUDA graphs over them has to record them again. The host's
    buffers are kept for the next time, pinned where the device is a GPU.
    """

    def __init__(self, tensors: Iterable[Tensor]):
        storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in tensors}
        self._held = [(storage, _host_buffer(storage)) for storage in storages.values() if storage.nbytes()]

    def out(self) -> int:
        """Frees the device's memory, and the allocator's; the bytes of the tensors."""
        for storage, host in self._held:
            if not storage.nbytes():
                raise RuntimeError("the tensors are offloaded already")
            host.copy_(_bytes(storage), non_blocking=True)
        self._wait()
        for storage, _ in self._held:
            if storage.resizable():  # of a CPU's, numpy may hold some; they stay
                storage.resize_(0)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.ipc_collect()
            torch.cuda.empty_cache()
        return sum(len(host) for _, host in self._held)

    def back(self) -> None:
        """What `out` took. After an error for want of memory it may be called again."""
        for storage, host in self._held:
            if not storage.nbytes():
                storage.resize_(len(host))
                _bytes(storage).copy_(host, non_blocking=True)
        self._wait()

    @property
    def away(self) -> bool:
        return any(not storage.nbytes() for storage, _ in self._held)

    def host(self, tensor: Tensor) -> Tensor:
        """uint8: the bytes of a contiguous tensor whose memory is away, where they are now."""
        key, begin = tensor.untyped_storage()._cdata, tensor.storage_offset() * tensor.itemsize
        return next(host for storage, host in self._held if storage._cdata == key)[begin : begin + tensor.nbytes]

    def _wait(self) -> None:
        for device in {storage.device for storage, _ in self._held if storage.device.type == "cuda"}:
            torch.cuda.synchronize(device)


def tensors_of(*holders: Any) -> Iterator[Tensor]:
    """Of modules the parameters and buffers, of an optimizer what it steps and its state; None has none."""
    for holder in holders:
        if isinstance(holder, torch.optim.Optimizer):
            yield from (p for group in holder.param_groups for p in group["params"])
            yield from (part for state in holder.state.values() for part in state.values() if torch.is_tensor(part))
        elif holder is not None:
            yield from (*holder.parameters(), *holder.buffers())


def _host_buffer(storage: UntypedStorage) -> Tensor:
    return torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=storage.device.type == "cuda")


def _bytes(storage: UntypedStorage) -> Tensor:
    """uint8, the storage's own memory."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # pyright: ignore
