"""A journal's bytes. All numbers are little-endian, nothing is pickled, and what is read is checked before it is used.

| part | bytes |
| --- | --- |
| file | magic [8], format version u32, frames: the header, then the others as things happened |
| frame | length u32, crc32 of the payload u32, kind u8, crc32 of these nine bytes u32, payload [length] |
| 1, header | JSON: `file` (16 hex digits, drawn at random), `experts` [L, k], `picks` [C, K] (or null), `sets` |
| 2, begin | id i64, group i64, P u32, J u32, V u32, JSON [J], params' `allowed` [V bits], prompt i32 [P] |
| ... JSON | `noise` (or null), `params`: the other fields of SamplingParams |
| 3, step | n u32, m u32, W u32, B u8, the new tokens' and the fed tokens' columns |
| ... new | [n] each: ids i64, tokens i32, logprobs f32, versions i32; if recorded sets' sizes i32 and the sets i32 |
| ... fed | [m] each: ids i64; if recorded experts i16 [m, L, k] and picks [m, C, W] |
| 4, finish | JSON: `id`, `tokens` (so many of them are the response), `finish`, `error` |

V = 0 is no mask; the bits fill bytes, the lowest first. Of the picks' K columns the W are there that the rows use, in
B bytes each: u16 with 65535 for -1, or i32 where one is too large for that.
"""

import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_type_hints

import numpy as np

from ..trajectory import Finish, Request, SamplingParams

MAGIC, FORMAT = b"\x93AMLGMWL", 1
HEADER, BEGIN, STEP, FINISH = 1, 2, 3, 4
MOST_BYTES = 1 << 30  # of a payload

_START = MAGIC + struct.pack("<I", FORMAT)
_FRAME, _CHECK = struct.Struct("<IIB"), struct.Struct("<I")
_HEAD = _FRAME.size + _CHECK.size
_BEGIN, _STEP = struct.Struct("<qqIII"), struct.Struct("<IIIB")
_MOST_COLUMNS = 1 << 20  # of a token's experts or picks
_NO_PICK = 65535  # -1 in 16 bits

I64, I32, F32, I16, U16 = (np.dtype(code) for code in ("<i8", "<i4", "<f4", "<i2", "<u2"))


class JournalError(RuntimeError):
    """A journal's file cannot be written, or is not what it should be: the message names the file."""


@dataclass(frozen=True)
class Recorded:
    """What a journal has of each token beside its id, log-prob and version."""

    experts: tuple[int, int] | None = None  # L, k
    picks: tuple[int, int] | None = None  # C, K
    sets: bool = False


class Step(NamedTuple):
    """The tokens that a step of the engine drew, and what was decided as it fed earlier ones.

    A request may come in several rows, in its tokens' order.
    """

    ids: np.ndarray  # int64 [n]
    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # float32 [n]
    versions: np.ndarray  # int32 [n]
    sets: Sequence[np.ndarray] | None  # n of int32 [any]
    fed: np.ndarray  # int64 [m]
    experts: np.ndarray | None  # int16 [m, L, k]
    picks: np.ndarray | None  # [m, C, W]; int32, or uint16 with 65535 for -1


def frame(kind: int, parts: Sequence[Any]) -> bytes:
    """A frame of that payload: bytes and contiguous arrays. ValueError if it is too large."""
    payload = b"".join(parts)
    if len(payload) > MOST_BYTES:
        raise ValueError(f"{len(payload)} bytes at once; a journal's frame takes {MOST_BYTES}")
    head = _FRAME.pack(len(payload), zlib.crc32(payload), kind)
    return head + _CHECK.pack(zlib.crc32(head)) + payload


def file_start(file: str, recorded: Recorded) -> bytes:
    """A new file's first bytes."""
    content = {"file": file, "experts": recorded.experts, "picks": recorded.picks, "sets": recorded.sets}
    return _START + frame(HEADER, [json.dumps(content).encode()])


def begin_frame(request: Request) -> bytes:
    """A begin frame; the request's past is not in it."""
    params = {name: getattr(request.params, name) for name in _PARAMS}
    text = json.dumps({"noise": request.noise, "params": params}, allow_nan=False).encode()
    allowed = request.params.allowed
    mask = b"" if allowed is None else np.packbits(allowed, bitorder="little")
    width = 0 if allowed is None else len(allowed)
    sizes = (len(request.prompt_ids), len(text), width)
    return frame(BEGIN, [_BEGIN.pack(request.id, request.group, *sizes), text, mask, request.prompt_ids])


def step_frame(step: Step) -> bytes:
    """A step frame."""
    picks = None if step.picks is None else _narrow(step.picks)
    width, size = (0, 0) if picks is None else (picks.shape[2], picks.itemsize)
    parts: list[Any] = [_STEP.pack(len(step.ids), len(step.fed), width, size)]
    parts += step.ids, step.tokens, step.logprobs, step.versions
    if step.sets is not None:
        parts += np.fromiter(map(len, step.sets), I32, len(step.sets)), *step.sets
    parts.append(step.fed)
    parts += [each for each in (step.experts, picks) if each is not None]
    return frame(STEP, parts)


def finish_frame(request: int, tokens: int, how: Finish, error: str) -> bytes:
    """A finish frame."""
    return frame(FINISH, [json.dumps({"id": request, "tokens": tokens, "finish": how, "error": error}).encode()])


def _narrow(picks: np.ndarray) -> np.ndarray:
    """int32 picks [m, C, K] as they are stored."""
    used = np.flatnonzero((picks >= 0).any((0, 1)))
    kept = picks[..., : used[-1] + 1 if used.size else 0]
    return np.ascontiguousarray(kept, U16 if kept.max(initial=-1) < _NO_PICK else I32)


def widen(picks: np.ndarray, out: np.ndarray) -> None:
    """Picks as they are stored, into int32 `out` [m, C, K] of -1."""
    taken = out[..., : picks.shape[2]]
    taken[:] = picks
    if picks.dtype == U16:
        taken[picks == _NO_PICK] = -1


def read_header(payload: bytes) -> tuple[str, Recorded]:
    """The file's own digits, and what is recorded. ValueError if it is no header, as below."""
    content = _json(payload, {"file": str, "experts": object, "picks": object, "sets": bool})
    shapes = content["experts"], content["picks"]
    if not all(shape is None or _is_shape(shape) for shape in shapes):
        raise ValueError(f"shapes {shapes}")
    experts, picks = (None if shape is None else tuple(shape) for shape in shapes)
    if len(content["file"]) != 16 or set(content["file"]) - set("0123456789abcdef"):
        raise ValueError(f"file {content['file'][:20]!r}")
    return content["file"], Recorded(experts, picks, content["sets"])


def read_begin(payload: bytes) -> Request:
    parts = _Parts(payload)
    request, group, prompt, text, width = parts.unpack(_BEGIN)
    noise, params = _params(parts.take(np.dtype("u1"), text).tobytes())
    bits = parts.take(np.dtype("u1"), -(-width // 8))
    prompt_ids = parts.take(I32, prompt).copy()
    parts.end()
    if prompt_ids.min(initial=0) < 0:
        raise ValueError("a negative token id")
    if width:
        params["allowed"] = np.unpackbits(bits, count=width, bitorder="little").astype(bool)
    return Request(request, group, prompt_ids, SamplingParams(**params), noise=noise)


def read_step(payload: bytes, recorded: Recorded) -> Step:
    parts = _Parts(payload)
    n, m, width, size = parts.unpack(_STEP)
    ids, tokens, logprobs, versions = (parts.take(dtype, n) for dtype in (I64, I32, F32, I32))
    if min(tokens.min(initial=0), versions.min(initial=0)) < 0:
        raise ValueError("a negative token id or version")
    sets = None
    if recorded.sets:
        sizes = parts.take(I32, n)
        if sizes.min(initial=0) < 0:
            raise ValueError("a set of negative size")
        ends = sizes.cumsum(dtype=np.int64)
        sets = np.split(parts.take(I32, int(ends[-1]) if n else 0), ends[:-1])
    fed = parts.take(I64, m)
    if m and not (recorded.experts or recorded.picks):
        raise ValueError("fed tokens, of which this file records nothing")
    experts = parts.take(I16, m, *recorded.experts) if recorded.experts else None
    picks = None
    if recorded.picks:
        layers, most = recorded.picks
        if width > most or size not in (2, 4):
            raise ValueError(f"picks of {width} columns of {size} bytes; the file's have {most}, of 2 or 4")
        picks = parts.take(U16 if size == 2 else I32, m, layers, width)
    parts.end()
    return Step(ids, tokens, logprobs, versions, sets, fed, experts, picks)


def read_finish(payload: bytes) -> tuple[int, int, Finish, str]:
    content = _json(payload, {"id": int, "tokens": int, "finish": str, "error": str})
    if content["finish"] not in get_args(Finish) or content["tokens"] < 0:
        raise ValueError(f"finish {content['finish'][:20]!r} after {content['tokens']} tokens")
    return content["id"], content["tokens"], content["finish"], content["error"]


class Frames:
    """A file's frames up to its torn tail: kind and payload of each. The file may still be growing.

    JournalError for a file of another kind, and for a damaged frame that whole ones follow.
    """

    def __init__(self, path: Path):
        self.path = path
        self.place = 0  # where the frame begins that came last
        self.torn = 0  # bytes of the tail, once the frames are read

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        with self.path.open("rb", 1 << 20) as file:
            size = file.seek(0, 2)
            file.seek(0)
            found = file.read(min(len(_START), size))
            if not _START.startswith(found):
                raise JournalError(f"{self.path}: not a journal of format {FORMAT}: it begins with {found!r}")
            place = len(found)
            while place < size:
                read = _read_head(file.read(min(_HEAD, size - place)))
                if read is None or read[0] > size - place - _HEAD:
                    break
                length, checksum, kind = read
                payload = file.read(length)
                if zlib.crc32(payload) != checksum:
                    break
                self.place = place
                yield kind, payload
                place += _HEAD + length
            self.torn = size - place if place > len(_START) else size
            file.seek(place)
            if place < size and (following := _whole_frame(file.read(size - place))):
                raise JournalError(
                    f"{self.path}: damaged at byte {place}, with whole frames from byte {place + following} on; "
                    "move the file away to go on without it"
                )


def _read_head(data: bytes) -> tuple[int, int, int] | None:
    """Length, crc32 of the payload and kind; None if they are not whole."""
    if len(data) < _HEAD or zlib.crc32(data[: _FRAME.size]) != _CHECK.unpack_from(data, _FRAME.size)[0]:
        return None
    return _FRAME.unpack_from(data)


def _whole_frame(data: bytes) -> int | None:
    """Where a whole frame begins in `data`, behind its first byte.

    A torn tail's own payload may hold anything, but the head before it says how far it would reach.
    """
    head = _read_head(data[:_HEAD])
    first = 1 if head is None else _HEAD + head[0]
    kinds = np.frombuffer(data, np.uint8)[first + _FRAME.size - 1 :]
    for place in (((kinds >= HEADER) & (kinds <= FINISH)).nonzero()[0] + first).tolist():
        read = _read_head(data[place : place + _HEAD])
        if read is not None and place + _HEAD + read[0] <= len(data):
            payload = data[place + _HEAD : place + _HEAD + read[0]]
            if zlib.crc32(payload) == read[1]:
                return place
    return None


class _Parts:
    """A payload, taken apart from its start on. ValueError where it is too short, or too long."""

    def __init__(self, payload: bytes):
        self.payload, self.at = payload, 0

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        return layout.unpack(self._next(layout.size))

    def take(self, dtype: np.dtype, *shape: int) -> np.ndarray:
        return np.frombuffer(self._next(dtype.itemsize * prod(shape)), dtype).reshape(shape)

    def end(self) -> None:
        if self.at != len(self.payload):
            raise ValueError(f"{len(self.payload) - self.at} bytes too many")

    def _next(self, size: int) -> memoryview:
        if size > len(self.payload) - self.at:
            raise ValueError(f"{size} bytes are said to follow byte {self.at} of {len(self.payload)}")
        self.at += size
        return memoryview(self.payload)[self.at - size : self.at]


_PARAMS: dict[str, Any] = {
    each.name: get_type_hints(SamplingParams)[each.name] for each in fields(SamplingParams) if each.name != "allowed"
}


def _params(text: bytes) -> tuple[int | None, dict[str, Any]]:
    """A request's noise and SamplingParams' fields; those that the text has not keep their defaults."""
    both = _json(text, {"noise": object, "params": dict})
    noise, content = both["noise"], both["params"]
    if noise is not None and not _is_of(noise, int):
        raise ValueError(f"noise {str(noise)[:40]!r}")
    for name, value in content.items():
        if name not in _PARAMS or not _is_of(value, _PARAMS[name]):
            raise ValueError(f"{name[:40]!r}: no field of SamplingParams, or not of its type")
        if isinstance(value, list):
            content[name] = tuple(value)
    return noise, content


def _is_of(value: Any, hint: Any) -> bool:
    if get_args(hint):  # tuple[int, ...]
        return isinstance(value, list) and all(_is_of(each, get_args(hint)[0]) for each in value)
    return isinstance(value, (int, float) if hint is float else hint) and not isinstance(value, bool)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and len(shape) == 2 and all(_is_of(n, int) and n > 0 for n in shape) and (
        prod(shape) <= _MOST_COLUMNS
    )  # fmt: skip


def _json(text: bytes, wanted: dict[str, type]) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is too deep") from None
    there = isinstance(content, dict) and content.keys() >= wanted.keys()
    if not there or not all(isinstance(content[name], kind) for name, kind in wanted.items()):
        raise ValueError(f"JSON without {', '.join(wanted)}")
    return content
