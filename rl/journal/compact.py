"""From journals to Parquet: the requests that are finished, and which files nobody needs any more."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...model.shards import flush, write_text
from .format import JournalError, Recorded
from .reading import REMOVED, JournalFile, Life, digits, journals, read_all, removed

_COLUMNS: dict[str, Any] = {
    "request": pa.int64(),
    "group": pa.int64(),
    "prompt_ids": pa.list_(pa.int32()),
    "response_ids": pa.list_(pa.int32()),
    "logprobs": pa.list_(pa.float32()),
    "versions": pa.list_(pa.int32()),
    "finish": pa.string(),
    "error": pa.string(),
}
_ROWS = 256  # of a row group


def compact(folder: Path, out: Path) -> list[Path]:
    """Writes the finished requests of each journal to out/NAME-DIGITS.parquet, and removes the journals that are done.

    A row is a request: `request`, `group`, `prompt_ids`, `response_ids`, `logprobs`, `versions`, `finish`, `error`; if
    recorded, `experts` (int16 [R, L, k]) and `picks` (int32 [R, C, K]), as bytes, their [L, k] and [C, K] in the
    schema's metadata, and `sets`. A request that two journals finished is in the first one's file.

    A journal is done that no writer has open and whose requests are all finished, here or in another file; one stays
    as long as its word is needed that a request is finished which another, not done, has unfinished. Killed at any
    point and called again, it leaves the same rows: a journal goes after its rows are on the disk, and their file has a
    name that no other journal's will have.

    It returns the Parquet files that it wrote. JournalError: another compaction is at work, or a journal is damaged
    (then nothing is changed).
    """
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out) as free:
        if not free:
            raise JournalError(f"{out}: another compaction is at work")
        _remove(folder)  # what a compaction that was killed had done with
        with ExitStack() as locks:
            closed = {path for path in journals(folder) if locks.enter_context(_locked(path))}
            files = [file for file in read_all(folder, keep_finished=True) if file.id]
            finished = {life.key for file in files for life in file.finished}
            written, seen = [], set()
            for file in files:
                mine = [life for life in file.finished if life.key not in seen]
                seen |= {life.key for life in mine}
                target = out / f"{file.path.stem}-{file.id}.parquet"
                if mine or target.exists():  # from before another finished the same
                    _write(target, file.recorded, mine)
                    written.append(target)
            flush(out)
            if done := _done(files, closed, finished):
                write_text(folder / REMOVED, json.dumps([file.id for file in done]))
                _remove(folder)
    return written


def _remove(folder: Path) -> None:
    """Removes the journals that REMOVED names; nobody reads them since it does."""
    ids = removed(folder)
    for path in journals(folder) if ids else ():
        if digits(path) in ids:
            path.unlink()
    flush(folder)
    (folder / REMOVED).unlink(missing_ok=True)


def _done(files: list[JournalFile], closed: set[Path], finished: set[bytes]) -> list[JournalFile]:
    """The journals to remove."""
    done = [f for f in files if f.path in closed and all(life.key in finished for life in f.unfinished)]
    while True:
        stay = [file for file in files if file not in done]
        needed = {life.key for file in stay for life in file.unfinished}
        needed -= {life.key for file in stay for life in file.finished}
        going = [file for file in done if needed.isdisjoint(life.key for life in file.finished)]
        if len(going) == len(done):
            return done
        done = going


def _write(target: Path, recorded: Recorded, lives: list[Life]) -> None:
    """A Parquet file, on the disk and complete before it has its name."""
    schema = pa.schema(
        [
            *_COLUMNS.items(),
            *[(name, pa.binary()) for name in ("experts", "picks") if getattr(recorded, name)],
            *([("sets", pa.list_(pa.list_(pa.int32())))] if recorded.sets else []),
        ],
        {name: json.dumps(getattr(recorded, name)) for name in ("experts", "picks")},
    )
    beside = target.with_name(f".{target.name}.new")
    with pq.ParquetWriter(beside, schema) as writer:
        for start in range(0, len(lives), _ROWS):
            rows = [_row(life, recorded) for life in lives[start : start + _ROWS]]
            writer.write_table(pa.Table.from_pylist([{n: row.get(n) for n in schema.names} for row in rows], schema))
    flush(beside)
    beside.rename(target)


def _row(life: Life, recorded: Recorded) -> dict[str, Any]:
    request, past = life.request, life.past(recorded)
    row: dict[str, Any] = {
        "request": request.id,
        "group": request.group,
        "prompt_ids": request.prompt_ids,
        "response_ids": past.response_ids if past else [],
        "logprobs": past.logprobs if past else [],
        "versions": past.versions if past else [],
        "finish": life.finish,
        "error": life.error,
        "sets": past.sets if past else [],
    }
    decisions = {"experts": past.experts, "picks": past.picks} if past else {"experts": None, "picks": None}
    return row | {name: b"" if rows is None else rows.tobytes() for name, rows in decisions.items()}


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether nobody else holds the lock of a file or folder; if so, it is ours meanwhile."""
    file = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(file)
