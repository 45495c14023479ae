"""Safetensors files: where each tensor of a folder lies, reading a part of one, writing a file piece by piece.

The library checks a file's header; the bytes are read and written here, so that neither a whole file nor a whole tensor
has to fit in memory (a mapped file would count as resident too).
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
}
PIECE = 16 * 2**20  # bytes read or written at once
_MOST_INDEX_BYTES = 100_000_000  # safetensors' own limit for a header; V4-Pro's index has 12 MB


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor of a file that is to be written."""

    name: str
    dtype: str  # a key of DTYPES
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor in a file, or one of the equal pieces of it, at `offset` bytes from the file's start."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def __str__(self) -> str:
        return f"{self.file}: {shown(self.name)}"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def piece(self, part: int, shape: tuple[int, ...]) -> "Stored":
        size = math.prod(shape) * DTYPES[self.dtype].itemsize
        return Stored(self.file, self.name, self.dtype, shape, self.offset + part * size)

    def read(self, rows: slice) -> Tensor:
        """Rows of it (the first dimension), on the CPU."""
        start, stop, _ = rows.indices(self.shape[0])
        row = self.nbytes // self.shape[0]
        part = self._bytes(start * row, (stop - start) * row).view(DTYPES[self.dtype])
        return part.view(stop - start, *self.shape[1:])

    def pieces(self) -> Iterator[Tensor]:
        """All its bytes, uint8, some at a time."""
        for start in range(0, self.nbytes, PIECE):
            yield self._bytes(start, min(PIECE, self.nbytes - start))

    def _bytes(self, start: int, size: int) -> Tensor:
        buffer = bytearray(size)
        view, done = memoryview(buffer), 0
        try:
            with self.file.open("rb", buffering=0) as stream:
                while done < size:
                    count = os.preadv(stream.fileno(), [view[done:]], self.offset + start + done)
                    if count == 0:
                        raise UserError(f"{self}: cut short while it was read")
                    done += count
        except OSError as error:
            raise UserError(f"{self}: {error.strerror}") from error
        return torch.frombuffer(buffer, dtype=torch.uint8)


def shown(name: str) -> str:
    """A tensor's name as a file gives it, for an error's one line."""
    return name if name.isprintable() and len(name) < 200 else ascii(name[:200])


def tensors_of(folder: Path) -> tuple[Path, dict[str, Stored]]:
    """The file that lists a checkpoint's tensors, model.safetensors or the index of its shards, and where each lies."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.is_file():
            raise UserError(f"{single}: missing; a checkpoint's folder holds {SINGLE}, or shards and {INDEX}")
        return single, tensors_in(single)
    if single.exists():
        raise UserError(f"{folder}: holds {SINGLE} and {INDEX}; remove the one that is not the model")
    return index, _sharded(index)


def tensors_in(file: Path) -> dict[str, Stored]:
    """Where each tensor of a file lies. The library has checked that they fill it, without gap or overlap."""
    result: dict[str, Stored] = {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            with file.open("rb") as stream:
                offset = 8 + int.from_bytes(stream.read(8), "little")
            for name in tensors.offset_keys():
                part = tensors.get_slice(name)
                dtype, shape = part.get_dtype(), tuple(part.get_shape())
                if dtype not in DTYPES:
                    raise UserError(f"{file}: {shown(name)}: dtype {dtype}; want one of {', '.join(DTYPES)}")
                result[name] = Stored(file, name, dtype, shape, offset)
                offset += result[name].nbytes
    except SafetensorError as error:
        raise UserError(f"{file}: cut short or not safetensors: {error}") from error
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from error
    return result


def _sharded(index: Path) -> dict[str, Stored]:
    names = _weight_map(index)
    files: dict[str, set[str]] = {}
    for tensor, file in names.items():
        files.setdefault(file, set()).add(tensor)
    for file, tensors in files.items():
        if Path(file).name != file or not file.endswith(".safetensors"):
            raise UserError(
                f"{index}: {shown(min(tensors))}: {file!r} is no name of a .safetensors file in this folder"
            )
        if not os.path.isfile(index.parent / file):
            raise UserError(f"{index.parent / file}: missing; {index.name} places {shown(min(tensors))} there")
    result: dict[str, Stored] = {}
    for file, tensors in sorted(files.items()):
        found = tensors_in(index.parent / file)
        if missing := tensors - found.keys():
            raise UserError(f"{index.parent / file}: {shown(min(missing))}: missing, but {index.name} places it there")
        if unlisted := found.keys() - tensors:
            other = names.get(min(unlisted))
            place = f"places it in {other}" if other else "does not name it"
            raise UserError(f"{index.parent / file}: {shown(min(unlisted))}: {index.name} {place}")
        result |= found
    return result


def _weight_map(index: Path) -> dict[str, str]:
    if index.stat().st_size > _MOST_INDEX_BYTES:
        raise UserError(f"{index}: larger than any index, {_MOST_INDEX_BYTES} bytes")
    try:
        content = json.loads(index.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{index}: not JSON: {error}") from error
    names = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(names, dict) or not names:
        raise UserError(f"{index}: weight_map: missing; want an object with a file for every tensor")
    for tensor, file in names.items():
        if not isinstance(file, str):
            raise UserError(f"{index}: weight_map: {shown(tensor)}: {json.dumps(file)}; want a file's name")
    return names


def write_index(folder: Path, files: Mapping[str, Sequence[Planned]]) -> None:
    """The index of the shards `files`, as transformers writes it."""
    names = {tensor.name: file for file, tensors in files.items() for tensor in tensors}
    size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors)
    content = {"metadata": {"total_size": size}, "weight_map": dict(sorted(names.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")


def write_file(file: Path, tensors: Sequence[Planned], data: Callable[[Planned], Iterator[Tensor]]) -> str:
    """Writes `file` in the order of `tensors`, then waits for the disk. The SHA-256 of what was written.

    `data` gives a tensor's numbers as contiguous tensors of the planned dtype or uint8. Larger dtypes have to come
    first, so that every tensor is aligned (readers map the file).
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        offsets = [offset, offset := offset + tensor.nbytes]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with file.open("wb") as stream:

        def write(content: bytes | memoryview) -> int:
            digest.update(content)
            return stream.write(content)

        write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            written = sum(write(part.view(-1).view(torch.uint8).numpy().data) for part in data(tensor))
            if written != tensor.nbytes:
                raise RuntimeError(f"{file}: {tensor.name}: {written} bytes, planned were {tensor.nbytes}")
        stream.flush()
        os.fsync(stream.fileno())
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk: a power cut undoes what is not."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """The whole new content or the old, whatever happens: written beside, to the disk, and renamed."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text, "utf-8")
    flush(beside)
    os.rename(beside, path)
    flush(path.parent)


def checksum(file: Path) -> str:
    """The SHA-256 of a file as it is on the disk: what the system remembers of it is dropped first."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        while piece := stream.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()
