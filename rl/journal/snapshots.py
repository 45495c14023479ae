"""A request's state in the cache, saved beside the journal as it is preempted: going on then needs no prefill.

It is of use as long as the weights are those of its version and the journal's last token is the one after what was fed.
What is lost or torn is rebuilt by a prefill, so nothing waits for the disk here.
"""

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .format import JournalError


def save_snapshot(
    folder: Path, request: int, fed: int, version: int, tensors: dict[str, Tensor], meta: dict[str, Any] | None = None
) -> None:
    """The state of a request of which `fed` tokens are in the cache, under the weights of `version`.

    `meta` is JSON of the caller's. It takes the place of the request's older snapshots. JournalError if the file
    cannot be written.
    """
    path = folder / f"{request}-{fed}-{version}.snapshot"
    here = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    checksums = {name: _crc32(tensor) for name, tensor in here.items()}
    beside = folder / f".{path.name}.{os.getpid()}.new"
    try:
        save_file(here, beside, {"crc32": json.dumps(checksums), "meta": json.dumps(meta or {})})
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise JournalError(f"{path}: {error}") from error
    drop_snapshots(folder, request, but=path)


def load_snapshot(
    folder: Path, request: int, fed: int, version: int
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors (on the CPU) and meta of that state; None if there is none. JournalError if it is torn."""
    path = folder / f"{request}-{fed}-{version}.snapshot"
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            found = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        checksums, meta = json.loads(found["crc32"]), json.loads(found["meta"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise JournalError(f"{path}: torn: {error}") from error
    if checksums != {name: _crc32(tensor) for name, tensor in tensors.items()}:
        raise JournalError(f"{path}: torn: a checksum differs")
    return tensors, meta


def drop_snapshots(folder: Path, request: int, but: Path | None = None) -> None:
    """Removes what is saved of a request."""
    for path in folder.glob(f"{request}-*.snapshot"):
        if path != but:
            path.unlink(missing_ok=True)


def _crc32(tensor: Tensor) -> int:
    data: Any = tensor.reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(data)
