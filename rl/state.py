"""The learner's state on disk: fp32 weights and moments as safetensors, and a JSON index with checksums.

A folder holds the last two states saved, in two files that are written in turn. The index is replaced in one
rename after its file is complete and on the disk, so a process that is killed at any moment, or a machine that
loses power, leaves a whole state. A file that was torn later is found by its crc32, and the state before it is
still there (`rewind`). Overwriting a file in place is also faster than making one, and this may happen after
every step. Nothing is pickled.
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from safetensors.torch import load_file
from torch import Tensor

from ..errors import UserError
from ..model.checkpoint import flush

_FILES = ("a.safetensors", "b.safetensors")
_INDEX = "state.json"
_CHUNK_BYTES = 1 << 24

Shapes = dict[str, tuple[int, ...]]


def write_state(folder: Path, step: int, shapes: Shapes, tensors: Iterable[Tensor]) -> None:
    """Saves fp32 `tensors`, one by one in the order of `shapes`, as the state after `step` steps.

    Of the two states that the folder may hold, the newest from before `step` stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / _INDEX
    before = [entry for entry in (_entries(index) if index.exists() else []) if entry["step"] < step]
    kept = sorted(before, key=lambda entry: entry["step"])[-1:]
    file = folder / next(name for name in _FILES if name not in [entry["file"] for entry in kept])
    file.touch()
    crc = 0
    with file.open("r+b") as out:
        for part in _parts(shapes, tensors):
            out.write(part)
            crc = zlib.crc32(part, crc)
        out.truncate()
    flush(file)
    _write_index(folder, [*kept, {"step": step, "file": file.name, "crc32": crc}])


def rewind(folder: Path, steps: Sequence[int]) -> int | None:
    """The last of `steps` after which a state is there and whole; None, and nothing is changed, if there is none.

    The states after it are dropped: their steps are about to be taken again, and what is saved then must not take the
    place of this one before it is complete.
    """
    entries = _entries(folder / _INDEX)
    wanted = sorted((entry for entry in entries if entry["step"] in steps), key=lambda entry: -entry["step"])
    found = next((entry["step"] for entry in wanted if _is_whole(folder, entry)), None)
    if found is not None:
        _write_index(folder, [entry for entry in entries if entry["step"] <= found])
    return found


def read_state(folder: Path, shapes: Shapes, step: int | None = None) -> tuple[int, dict[str, Tensor]]:
    """The step and the tensors of the state after `step` steps, or of the newest.

    Raises UserError if it is missing, torn, or another model's.
    """
    entries = {entry["step"]: entry for entry in _entries(folder / _INDEX)}
    step = max(entries) if step is None else step
    if step not in entries:
        raise UserError(f"{folder / _INDEX}: no state of step {step}; it holds {sorted(entries)}")
    file = folder / entries[step]["file"]
    if not _is_whole(folder, entries[step]):
        raise UserError(f"{file}: missing, torn or altered; remove the stage's folder to begin it again")
    tensors = load_file(file)
    if stray := sorted(tensors.keys() ^ shapes.keys()):
        owner = "the model" if stray[0] in shapes else "this state"
        raise UserError(f"{file}: {stray[0]}: only {owner} has it; the state must be of the same model and optimizer")
    for name, shape in shapes.items():
        if tensors[name].shape != shape:
            raise UserError(f"{file}: {name}: shape {list(tensors[name].shape)}, the model has {list(shape)}")
    return step, tensors


def _parts(shapes: Shapes, tensors: Iterable[Tensor]) -> Iterator[bytes | memoryview]:
    """A safetensors file piece by piece: the header's length, the header (padded to 8 bytes), the tensors."""
    ends = list(accumulate((4 * prod(shape) for shape in shapes.values()), initial=0))
    entries = {
        name: {"dtype": "F32", "shape": shape, "data_offsets": ends[i : i + 2]}
        for i, (name, shape) in enumerate(shapes.items())
    }
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    yield len(header).to_bytes(8, "little") + header
    for tensor in tensors:
        # Tensor.numpy would forbid that the memory is ever offloaded
        yield np.from_dlpack(tensor.detach().cpu().contiguous().reshape(-1)).data


def _entries(index: Path) -> list[dict]:
    try:
        return json.loads(index.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{index}: missing; restore it, or remove the stage's folder to begin it again") from error
    except ValueError as error:
        raise UserError(f"{index}: torn; remove the stage's folder to begin it again") from error


def _write_index(folder: Path, entries: list[dict]) -> None:
    beside = folder / f".{_INDEX}"
    beside.write_text(json.dumps(entries, indent=1) + "\n")
    flush(beside)
    os.replace(beside, folder / _INDEX)
    flush(folder)


def _is_whole(folder: Path, entry: dict) -> bool:
    file, crc = folder / entry["file"], 0
    if not file.is_file():
        return False
    with file.open("rb") as data:
        while chunk := data.read(_CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc == entry["crc32"]
