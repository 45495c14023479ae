"""What an engine measures of itself."""

import time

_ENOUGH = 64  # prefilled tokens of a step whose time says something of prefill


class Meter:
    """Counts tokens and times steps. `seconds_per_token`: of prefill, a running mean (before any: our guess)."""

    def __init__(self) -> None:
        self.seconds_per_token = 1e-4
        self._tokens = self._prefilled = 0
        self._last: float | None = None
        self._fresh()

    def first(self, seconds: float) -> None:
        """A request has its first token, so long after it came."""
        self._firsts.append(seconds)

    def step(self, drawn: int, prefilled: int) -> None:
        """A step was read, which drew so many tokens."""
        now = time.monotonic()
        if self._last is not None and prefilled >= _ENOUGH:
            each = (now - self._last) / (prefilled + drawn)
            self.seconds_per_token += 0.2 * (each - self.seconds_per_token)
        self._last = now
        self._tokens += drawn
        self._prefilled += prefilled

    def pause(self) -> None:
        """What comes next did not begin with the last step's end."""
        self._last = None

    def read(self) -> dict[str, float]:
        """Counts of all, rates since the last call."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        found = {
            "tokens": float(self._tokens),
            "prefilled_tokens": float(self._prefilled),
            "tokens_per_second": (self._tokens - self._tokens_before) / seconds,
            "prefilled_tokens_per_second": (self._prefilled - self._prefilled_before) / seconds,
        }
        if self._firsts:
            found["seconds_to_first_token"] = sum(self._firsts) / len(self._firsts)
        self._fresh()
        return found

    def _fresh(self) -> None:
        self._began, self._firsts = time.monotonic(), list[float]()
        self._tokens_before, self._prefilled_before = self._tokens, self._prefilled
