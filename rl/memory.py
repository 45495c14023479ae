"""The most memory that a process had resident since a moment of one's choice: Linux's high-water mark, set back."""

import resource
import threading
import weakref
from pathlib import Path

_RESET, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_lock = threading.Lock()
_spans: "weakref.WeakSet[Span]" = weakref.WeakSet()


class Span:
    """Counts from when it is made. Spans of one process may overlap: its stages run in threads.

    `since_start`: the mark could not be set back here, so that `peak` is that of the process's whole life.
    """

    def __init__(self):
        with _lock:
            for span in _spans:
                span._bytes = max(span._bytes, _high_water())
            self._bytes, self.since_start = 0, not _set_back()
            _spans.add(self)

    def peak(self) -> int:
        """Bytes."""
        with _lock:
            self._bytes = max(self._bytes, _high_water())
            return self._bytes


def _set_back() -> bool:
    try:
        _RESET.write_text("5")
    except OSError:
        return False
    return "VmHWM:" in _STATUS.read_text()


def _high_water() -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
