"""A pool of the cache's pages, counted by how many hold each. Page 0 is nobody's (model/cache.py)."""

from collections.abc import Iterable


class Pages:
    """`size` pages of `page` tokens, numbered from 1. Several requests may hold a page; the last one frees it."""

    def __init__(self, size: int, page: int):
        self.size, self.page = size, page
        self._free = list(range(size, 0, -1))
        self._holders = [0] * (size + 1)

    @property
    def free(self) -> int:
        return len(self._free)

    def count(self, tokens: int) -> int:
        """How many pages so many tokens of a request take."""
        return -(-tokens // self.page)

    def take(self, count: int) -> list[int]:
        """Free pages, each with one holder; ValueError if there are not so many."""
        if count > len(self._free):
            raise ValueError(f"{count} pages asked for, {len(self._free)} of {self.size} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._holders[page] = 1
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """One more holder of each; ValueError for a page that nobody holds."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free and cannot be shared")
            self._holders[page] += 1

    def drop(self, pages: Iterable[int]) -> None:
        """One holder less of each; ValueError for a page that nobody holds."""
        for page in pages:
            if not self._holders[page]:
                raise ValueError(f"page {page} is free already")
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)

    def alone(self, pages: Iterable[int]) -> int:
        """How many of `pages` have one holder."""
        return sum(self._holders[page] == 1 for page in pages)
