"""The rollout engine's write-ahead log, a token at a time: what a worker that dies had sampled is never sampled again.

Each start of a worker writes a file of its own (`Journal`); any other goes on with what the files of a folder hold
(`recover`), by prefilling prompt and response, or from a snapshot of the cache (`load_snapshot`). Finished requests
end up in Parquet (`compact`). DeepSeek-V4 has such a log (5.2.2 of its report); the format (format.py) is our choice.
"""

from .compact import compact
from .format import JournalError
from .reading import Recovered, recover
from .snapshots import drop_snapshots, load_snapshot, save_snapshot
from .writer import Journal

__all__ = [
    "Journal",
    "JournalError",
    "Recovered",
    "compact",
    "drop_snapshots",
    "load_snapshot",
    "recover",
    "save_snapshot",
]
