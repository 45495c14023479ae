"""The plain log line by line, the live block on a terminal, and the table within 100 columns."""

import io
import re
import threading

import pytest

from amalgam.pipelines.console import Console


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@pytest.fixture
def terminal(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    return Terminal()


def plain(stream):
    """Lines without their time of day."""
    return [re.sub(r"^\d\d:\d\d:\d\d  ", "", line) for line in stream.getvalue().splitlines()]


def test_a_plain_log_has_a_line_at_the_start_now_and_then_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, every=10, clock=clock)
    line = console.stage("grpo-a", "grpo", steps=100, start=20)
    for step in range(21, 101):  # one step a second, but the first one takes 5
        clock.now += 5 if step == 21 else 1
        line.update(step, reward=step / 100, tokens_per_second=1204.4, phase="train")
    line.done("reward 1")
    assert plain(stream) == [
        "grpo-a (grpo) starts: 100 steps, going on after 20",
        "grpo-a  26/100  reward 0.26  1,204 tok/s  phase train  1:14 left",
        *[f"grpo-a  {s}/100  reward {s / 100:.4g}  1,204 tok/s  phase train  {left // 60}:{left % 60:02} left"
          for s in range(36, 97, 10) for left in [100 - s]],
        "grpo-a done in 1:24: reward 1",
    ]  # fmt: skip
    assert all(re.match(r"\d\d:\d\d:\d\d  grpo-a", line) for line in stream.getvalue().splitlines())


def test_a_plain_log_keeps_a_long_line_whole_and_reads_no_markup():
    stream = io.StringIO()
    console = Console(stream)
    console.print("[bold]" + "x" * 300 + " :smile: <answer>[/red]")
    assert stream.getvalue() == "[bold]" + "x" * 300 + " :smile: <answer>[/red]\n"


def test_a_terminal_shows_a_line_for_each_running_stage(terminal):
    console = Console(terminal)
    first, second = console.stage("sft-a", "sft", 10), console.stage("sft-b", "sft", 20)
    threads = [threading.Thread(target=line.update, args=(7,), kwargs={"loss": 0.25}) for line in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    terminal.truncate(0)
    assert console._block is not None
    console._block.refresh()
    shown = terminal.getvalue()
    assert re.search(r"sft-a.*7/10.*loss 0\.25", shown) and re.search(r"sft-b.*7/20.*loss 0\.25", shown)
    first.done()
    assert console._block is not None
    second.done("held-out loss 0.3")
    assert console._block is None and "sft-b done in 0:00: held-out loss 0.3" in terminal.getvalue()


def test_the_block_is_drawn_while_another_thread_ends_a_stage(terminal):
    console = Console(terminal)
    console.stage("average", "average", steps=0)
    assert console._block is not None
    drawing = threading.Thread(target=console._block.refresh, daemon=True)
    with console._lock:  # as it is held in done(), which then waits for the drawing to end
        drawing.start()
        drawing.join(timeout=10)
        drawn = not drawing.is_alive()
    assert drawn
    console.close()


def test_close_gives_the_terminal_back(terminal):
    with pytest.raises(KeyError), Console(terminal) as console:
        console.stage("sft-a", "sft", 10)
        assert "\x1b[?25l" in terminal.getvalue()  # hides the cursor
        raise KeyError
    assert terminal.getvalue().rindex("\x1b[?25h") > terminal.getvalue().rindex("\x1b[?25l")


def results(domains):
    models = ["base", "a-model-with-quite-a-long-name-and-then-some", "merged"]
    return [
        {"model": model, "domain": domain, "correct": 1000 * (i + 1), "total": 3072}
        for i, model in enumerate(models)
        for domain in domains
    ]


@pytest.mark.parametrize(
    "domains",
    [["one"], ["arithmetic", "strings"], ["a", "b", "c", "d", "e"], ["long-name-" * 6, "other-name-" * 6]],
)
def test_the_table_fits_a_log_and_is_ascii(domains):
    stream = io.StringIO()
    Console(stream).table(results(domains))
    text = stream.getvalue()
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert text.count("3000/3072  97.7%* [97.1, 98.1]") == len(domains)  # the best model of each column
    assert text.count("1000/3072  32.6%  [30.9, 34.2]") == len(domains)
    assert text.count("mean") == (len(domains) > 1)


def test_the_table_of_an_unfinished_run_leaves_out_what_is_not_there():
    stream = io.StringIO()
    rows = results(["x", "y"])[:-1]
    Console(stream).table(rows)
    (line,) = (line for line in stream.getvalue().splitlines() if "merged" in line)
    assert [cell.strip() for cell in line.strip("| ").split("|")][2:] == ["-", "-"]
    assert "65.1%*" in stream.getvalue()  # the best mean is among models that have all domains


def test_failed_grades_are_summed_up():
    stream = io.StringIO()
    console = Console(stream)
    console.failures({"grpo-a": {}})
    assert stream.getvalue() == ""
    console.failures({"grpo-a": {"ValueError: x": 1, "timeout after 5 s": 12}, "merged": {"timeout after 5 s": 2}})
    assert stream.getvalue().splitlines() == [
        "15 answers counted as wrong because their grading failed:",
        "  grpo-a: 12 x timeout after 5 s",
        "  grpo-a: 1 x ValueError: x",
        "  merged: 2 x timeout after 5 s",
    ]
