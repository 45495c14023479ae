"""What the scheduler (scheduler.py) says to the device: a request as it sees it, a step, and the moves before it."""

from dataclasses import dataclass, field
from typing import NamedTuple

Key = tuple[str, int]  # of what is saved in host memory: ("request", id) or ("group", group)


class Clear(NamedTuple):
    """Empties a slot."""

    slot: int


class Place(NamedTuple):
    """The slot's pages from the place `first` of its row of the table on."""

    slot: int
    first: int
    pages: list[int]


class Fork(NamedTuple):
    """Copies a slot's state to others."""

    source: int
    targets: list[int]


class CopyPage(NamedTuple):
    source: int
    target: int


class Scrub(NamedTuple):
    """Zeros for what may not be finite: 0 times that would be no 0 for the next owner."""

    slots: list[int]
    pages: list[int]


class Save(NamedTuple):
    """Copies a slot's state, of a request of `length` tokens, and the contents of pages to host memory."""

    key: Key
    slot: int
    pages: list[int]
    length: int


class Load(NamedTuple):
    """Brings back what was saved: the state to a slot, the contents to as many pages."""

    key: Key
    slot: int
    pages: list[int]


class Forget(NamedTuple):
    key: Key


Move = Clear | Place | Fork | CopyPage | Scrub | Save | Load | Forget


@dataclass(eq=False)
class Entry:
    """What the scheduler knows of a request; times are orders of arrival."""

    id: int
    group: int
    prompt: int  # tokens
    known: int  # tokens of prompt and response, the one to be drawn by the planned step too
    limit: int  # the most there can be
    order: int = -1
    fed: int = 0  # tokens that the cache holds once the planned step is done
    most: int = 0  # that were ever fed
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    saved: int = 0  # bytes in host memory, if swapped

    @property
    def shared(self) -> int:
        """Tokens that a group's members have in common."""
        return self.prompt - 1

    @property
    def decodes(self) -> bool:
        return self.known - self.fed == 1 and self.fed > 0

    @property
    def fresh(self) -> bool:
        """Whether it can start from its group's prompt."""
        return self.fed == 0 and self.shared > 0


class Chunk(NamedTuple):
    """Tokens `start` ... `stop` - 1 of a request; `draws`: they are the last ones known, so its next one is drawn."""

    entry: Entry
    start: int
    stop: int
    draws: bool


@dataclass
class Plan:
    """A step: first the moves, in order, then what is fed."""

    moves: list[Move] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decodes: list[tuple[Entry, int]] = field(default_factory=list)  # and the position of the token that is fed


class Hold(NamedTuple):
    """A group's prompt, for members that wait."""

    pages: list[int]
    bytes: int
