"""Converting a checkpoint on disk, shard by shard, in little memory; a conversion that was cut off goes on.

The folder that is written holds `conversion.json`: from what, how, and the SHA-256 of each shard that is finished. A
shard is written under another name, read again from the disk, and renamed. config.json comes last, so that a folder
that is not complete is no checkpoint.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from .config import Weights
from .shards import INDEX, Planned, checksum, flush, tensors_in, write_file, write_index, write_text
from .source import Checkpoint
from .write import BESIDE, SHARD_BYTES, Format, Target, bytes_of, config_json, plan

JOURNAL = "conversion.json"


@dataclass(frozen=True)
class Converted:
    folder: Path
    shards: int
    kept: int  # of them were finished before
    nbytes: int  # of all tensors


def convert(
    source: str | Path,
    target: str | Path,
    format: Format,
    dtype: Weights,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Converted:
    """Writes the checkpoint in folder (or preset) `source` to folder `target`; `write.plan` says what `dtype` means.

    Tensors that already are of the wanted dtype are carried bit for bit, codes and scales. Everything is checked before
    anything is written (`source.Checkpoint`), and what is written is read again and compared. `progress` gets bytes
    done and in all. UserError: bad input, a `target` that holds something else, too little room on the disk.
    """
    checkpoint, target = Checkpoint(source), Path(target)
    shards = plan(checkpoint, format, dtype, shard_bytes)
    config = config_json(checkpoint.config, format, dtype)
    total = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    asked = {"source": str(checkpoint.folder.resolve()), "format": format, "dtype": dtype}
    with _alone(target):
        journal = _Journal(target, {**asked, "state": _state(checkpoint.folder, shards)})
        _check_room(target, {file: shard for file, shard in shards.items() if file not in journal.shards})
        done = kept = 0

        def advance(count: int) -> None:
            nonlocal done
            done += count
            progress(done, total)

        data = bytes_of(checkpoint)
        for file, shard in shards.items():
            if journal.finished(file):
                kept += 1
                advance(sum(tensor.nbytes for tensor in shard))
            else:
                journal.add(file, _write(target / file, shard, data, advance))
        if len(shards) > 1:
            write_index(target, shards)
        for name in BESIDE:
            if (checkpoint.folder / name).is_file():
                shutil.copyfile(checkpoint.folder / name, target / name)
        if (checkpoint.folder / "encoding").is_dir():  # DeepSeek's own, with the published wordings; never executed
            shutil.copytree(checkpoint.folder / "encoding", target / "encoding", dirs_exist_ok=True)
        write_text(target / "config.json", config)
        Checkpoint(target)
    return Converted(target, len(shards), kept, total)


def _write(file: Path, shard: list[Target], data: Callable, advance: Callable[[int], None]) -> str:
    """Its SHA-256."""

    def counted(tensor: Planned) -> Iterator:
        for part in data(tensor):
            yield part
            advance(part.nbytes)

    beside = file.with_name(f".{file.name}")
    digest = write_file(beside, shard, counted)
    if checksum(beside) != digest or not _is_planned(beside, shard):
        raise UserError(f"{beside}: what was read is not what was written; is the disk in order?")
    os.rename(beside, file)
    flush(file.parent)
    return digest


def _is_planned(file: Path, shard: list[Target]) -> bool:
    found = {(name, stored.dtype, stored.shape) for name, stored in tensors_in(file).items()}
    return found == {(tensor.name, tensor.dtype, tensor.shape) for tensor in shard}


class _Journal:
    """What is asked, and which shards are finished."""

    def __init__(self, folder: Path, asked: dict[str, str]):
        self.file, self.asked, self.shards = folder / JOURNAL, asked, {}
        if not self.file.exists():
            if others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
                raise UserError(f"{folder}: holds {others[0]} already; name a folder that is new or empty")
            self._save()
            return
        try:
            content = json.loads(self.file.read_bytes())
            before, self.shards = {key: content[key] for key in asked}, dict(content["shards"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{self.file}: damaged; remove {folder} and convert again") from error
        for key, value in asked.items():
            if before[key] != value:
                what = "the source's files have changed" if key == "state" else f"{key} was {before[key]}, not {value}"
                raise UserError(f"{folder}: an earlier conversion began here, and {what}; name another folder")

    def finished(self, file: str) -> bool:
        """Finished before, and still as it was then."""
        path = self.file.parent / file
        return file in self.shards and path.is_file() and checksum(path) == self.shards[file]

    def add(self, file: str, digest: str) -> None:
        self.shards[file] = digest
        self._save()

    def _save(self) -> None:
        write_text(self.file, json.dumps({**self.asked, "shards": self.shards}, indent=1) + "\n")


def _state(folder: Path, shards: dict[str, list[Target]]) -> str:
    """A digest of the source's files (names, sizes, times of change) and of the plan."""
    digest = hashlib.sha256()
    for file in sorted([folder / "config.json", *folder.glob("*.safetensors"), *folder.glob(INDEX)]):
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\n".encode())
    for file, shard in shards.items():
        digest.update("".join(f"{file} {t.name} {t.dtype} {t.shape}\n" for t in shard).encode())
    return digest.hexdigest()


def _check_room(target: Path, shards: dict[str, list[Target]]) -> None:
    need = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    if need > (free := shutil.disk_usage(target).free):
        raise UserError(f"{target}: needs {need / 1e9:.1f} GB on the disk, {free / 1e9:.1f} GB are free")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and holds it against a second conversion."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}") from error
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(f"{folder}: another conversion is writing there") from error
    finally:
        os.close(descriptor)
