"""What a person sees of a running run: a live line a stage on a terminal, now and then a short line in a log.

Stages may run at once, so every call may come from any thread. Text that models wrote is printed as it is,
never read as markup.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.box import ASCII2, SIMPLE_HEAD
from rich.console import Console as Rich
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .statistics import wilson

LOG_WIDTH = 100
CELL_WIDTH, MEAN_WIDTH, BORDER = 31, 6, 3  # "1234/1234  12.3%* [12.3, 12.3]", "12.3%*", "| " and " "
MODEL_WIDTH = 16  # the least that is left to the models' names, which fold


class Console:
    """Close it, or use it in a `with`: the terminal must be given back before a traceback is printed.

    `every`: seconds between two lines of one stage in a plain log.
    """

    def __init__(
        self, stream: TextIO | None = None, every: float = 10.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._rich = Rich(file=stream, highlight=False, markup=False, emoji=False)
        self.live = self._rich.is_terminal
        if not self.live:
            self._rich = Rich(file=stream, highlight=False, markup=False, emoji=False, width=LOG_WIDTH)
        self._every, self._clock = every, clock
        self._lock = threading.RLock()
        self._stages: list[StageLine] = []
        self._block: Live | None = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Take the live block away and give the terminal back."""
        with self._lock:
            self._stages.clear()
            self._show()

    def stage(self, name: str, kind: str, steps: int, start: int = 0) -> StageLine:
        """A line for a stage of `steps` steps, of which `start` were finished before (a run that goes on)."""
        line = StageLine(self, name, kind, steps, start)
        again = f", going on after {start}" if start else ""
        self._log(f"{name} ({kind}) starts: {steps} steps{again}")
        with self._lock:
            self._stages.append(line)
            self._show()
        return line

    def print(self, text: str = "") -> None:
        self._rich.print(text, soft_wrap=True)

    def table(self, results: Sequence[Mapping[str, Any]]) -> None:
        """Models x domains from rows {"model", "domain", "correct", "total"}, in the order of the rows."""
        counts = {(row["model"], row["domain"]): (row["correct"], row["total"]) for row in results}
        models, domains = _unique(row["model"] for row in results), _unique(row["domain"] for row in results)
        means = {m: _mean([counts[m, d] for d in domains]) for m in models if all((m, d) in counts for d in domains)}
        room = self._rich.width - MEAN_WIDTH - 3 * BORDER
        at_once = max(1, (room - MODEL_WIDTH) // (CELL_WIDTH + BORDER))  # further domains go to a table below
        for first in range(0, len(domains), at_once):
            block = domains[first : first + at_once]
            last = first + at_once >= len(domains)
            table = Table(box=SIMPLE_HEAD if self.live else ASCII2, padding=(0, 1), pad_edge=False)
            table.add_column("model", overflow="fold", max_width=max(8, room - len(block) * (CELL_WIDTH + BORDER)))
            for domain in block:
                table.add_column(domain, justify="right", overflow="fold", width=CELL_WIDTH)
            if with_mean := last and len(domains) > 1:
                table.add_column("mean", justify="right", width=MEAN_WIDTH)
            best = {d: max(_share(counts[m, d]) for m in models if (m, d) in counts) for d in block}
            for model in models:
                cells = [_cell(counts.get((model, d)), best[d]) for d in block]
                if with_mean:
                    cells.append(_percent(means[model], max(means.values())) if model in means else "-")
                table.add_row(model, *cells)
            self._rich.print(table)
        self.print("correct of total, percent, [95 % interval]; * the best of its column")

    def failures(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Grades that failed (the scorer hung or raised), as {model or stage: {what happened: how often}}."""
        total = sum(sum(notes.values()) for notes in counts.values())
        if total == 0:
            return
        self.print(f"{total} answers counted as wrong because their grading failed:")
        for name, notes in counts.items():
            for note, number in sorted(notes.items(), key=lambda item: -item[1]):
                self.print(f"  {name}: {number} x {note}")

    def _log(self, text: str) -> None:
        self.print(f"{time.strftime('%H:%M:%S')}  {text}")

    def _ended(self, line: StageLine) -> None:
        with self._lock:
            if line in self._stages:
                self._stages.remove(line)
            self._show()

    def _show(self) -> None:
        """The block is there exactly while a stage runs: what is printed in between stays in order."""
        if not self.live:
            return
        if self._stages and self._block is None:
            self._block = Live(get_renderable=self._lines, console=self._rich, transient=True, refresh_per_second=4)
            self._block.start()
        elif not self._stages and self._block is not None:
            self._block.stop()
            self._block = None

    def _lines(self) -> Table:
        # No lock here: the block's own thread draws under the block's lock, and _show takes that under ours.
        grid = Table.grid(padding=(0, 2))
        for line in tuple(self._stages):
            bar = ProgressBar(total=line.steps, completed=line.step, width=16, complete_style="cyan")
            grid.add_row(Text(line.name, style="bold"), bar, f"{line.step}/{line.steps}", Text(line.text()))
        return grid


class StageLine:
    """A running stage on the console; made by `Console.stage`."""

    def __init__(self, console: Console, name: str, kind: str, steps: int, start: int) -> None:
        self.name, self.kind, self.steps, self.step = name, kind, steps, start
        self._console, self._shown = console, {}
        self._began = self._logged = console._clock()
        self._rate_from: tuple[int, float] | None = None

    def update(self, step: int, **shown: float | str) -> None:
        """`step` steps are finished; `shown` stands beside it.

        `tokens_per_second` is written as tok/s: sampled tokens, or trained ones where a stage does not sample. Prompts
        count in neither.
        """
        now = self._console._clock()
        if self._rate_from is None:  # the first step pays for warming up: time left is reckoned from its end
            self._rate_from = (step, now)
        self.step, self._shown = step, shown
        if not self._console.live and (now - self._logged >= self._console._every):
            self._logged = now
            self._console._log(f"{self.name}  {step}/{self.steps}  {self.text()}")

    def done(self, summary: str = "") -> None:
        took = _clock_text(self._console._clock() - self._began)
        self._console._ended(self)
        self._console._log(f"{self.name} done in {took}" + (f": {summary}" if summary else ""))

    def text(self) -> str:
        """The shown values and the time left, such as "reward 0.412  1,204 tok/s  2:31 left"."""
        parts = [_value_text(key, value) for key, value in self._shown.items()]
        step, since = self._rate_from or (self.step, 0.0)
        if self.step > step:
            each = (self._console._clock() - since) / (self.step - step)
            parts.append(f"{_clock_text(each * (self.steps - self.step))} left")
        return "  ".join(parts)


def _value_text(key: str, value: float | str) -> str:
    if key == "tokens_per_second":
        return f"{float(value):,.0f} tok/s"
    return f"{key.replace('_', ' ')} {value if isinstance(value, str) else f'{value:.4g}'}"


def _clock_text(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _unique(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _share(count: tuple[int, int]) -> float:
    return count[0] / count[1]


def _mean(counts: list[tuple[int, int]]) -> float:
    return sum(map(_share, counts)) / len(counts)


def _percent(share: float, best: float) -> str:
    return f"{100 * share:.1f}%{'*' if share == best else ' '}"


def _cell(count: tuple[int, int] | None, best: float) -> str:
    if count is None:
        return "-"
    low, high = wilson(*count)
    return f"{count[0]}/{count[1]} {_percent(_share(count), best):>7} [{100 * low:4.1f}, {100 * high:4.1f}]"
