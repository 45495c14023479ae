"""`amalgam chat`: a conversation with a checkpoint, in which what it wrote stays as the token ids that it wrote."""

import sys
import time
from io import TextIOWrapper

import numpy as np
import typer

from ..errors import UserError
from ..model.conversation import Conversation
from ..model.template import TemplateConversation, converse
from ..model.tokenizer import DSML, END_THINK
from ..rl.trajectory import Request, SamplingParams
from .speak import Speaker, check_mode, check_temperature, parse_precision

Talk = Conversation | TemplateConversation
_HELP = "commands: /mode MODE, /new (forget the conversation), /exit"


def chat(checkpoint: str, mode: str, temperature: float, max_new_tokens: int, seed: int, precision: str = "") -> None:
    """Reads lines until the end of the input, and prints the answers as they are sampled."""
    check_temperature(temperature)
    speaks = Speaker(checkpoint, parse_precision(precision))
    check_mode(speaks, mode)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # so that a line that is not UTF-8 costs no other line
    speaks.engine  # noqa: B018 - loads the weights before the first question
    typer.echo(f"{checkpoint}, mode {mode}; {_HELP}")
    talk: Talk | None = None
    turn = 0
    while (line := _read()) is not None:
        if not line.startswith("/"):
            try:
                asked = _ask(speaks, talk, line, mode)
            except (ValueError, UserError) as error:
                typer.echo(f"error: {error}")
            else:
                _answer(speaks, asked, turn, temperature, max_new_tokens, seed)
                talk, turn = asked, turn + 1
            continue
        command, _, argument = line.partition(" ")
        if command == "/exit":
            return
        if command == "/new":
            talk = None
        elif command == "/mode" and argument:
            mode = _changed(speaks, mode, argument.strip())
        else:
            typer.echo(_HELP)


def _ask(speaks: Speaker, talk: Talk | None, line: str, mode: str) -> Talk:
    """The conversation with a question more; UserError or ValueError where that cannot be, and `talk` is as it was."""
    question = [{"role": "user", "content": line}]
    fresh = talk is None
    talk = converse(speaks.encoding, speaks.tokenizer, question, mode) if fresh else talk.restart(question, mode)
    if speaks.context is not None and len(talk.ids) + 1 > speaks.context:
        problem = f"more than the model's context, {speaks.context}" + ("" if fresh else "; /new begins anew")
        raise UserError(f"a conversation of {len(talk.ids)} tokens, and an answer, are {problem}")
    return talk


def _answer(speaks: Speaker, talk: Talk, turn: int, temperature: float, max_new_tokens: int, seed: int) -> None:
    """Prints the answer while it is sampled, then what there is to say about it. Ctrl-C ends the answer."""
    room = max_new_tokens if speaks.context is None else min(max_new_tokens, speaks.context - len(talk.ids))
    params = SamplingParams(temperature=temperature, max_new_tokens=room, seed=seed)
    request = Request(turn, turn, np.array(talk.ids, np.int32), params)
    screen, ids, note = Screen(reasons=talk.mode != "chat"), np.zeros(0, np.int32), ""
    began = time.monotonic()
    try:
        for new in speaks.engine.stream(request):
            ids = np.concatenate([ids, new])
            screen.show(speaks.text(ids))
        if ids[-1] not in speaks.end_ids:
            note = ", cut off" if room == max_new_tokens else ", cut off: the context is full"
    except KeyboardInterrupt:
        note = ", stopped"
    rate = len(ids) / (time.monotonic() - began)
    screen.end(speaks.text(ids))
    _remark(f"{len(ids)} tokens, {rate:.1f} tokens/s{note}")
    events = talk.write(ids)
    if calls := talk.messages[-1].get("tool_calls"):
        said = (f"{call['function']['name']}({call['function']['arguments']})" for call in calls)
        _remark(f"calls, which are not run: {', '.join(said)}")
    if events:
        more = f"; and {len(events) - 3} more" if len(events) > 3 else ""
        _remark("; ".join(f"{event.name}: {event.detail}" for event in events[:3]) + more)


class Screen:
    """Prints an answer while it grows. Reasoning and tool calls are dim; no character can steer the terminal."""

    def __init__(self, reasons: bool):
        self.reasons, self.shown = reasons, 0

    def show(self, text: str) -> None:
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # else a character's last bytes are still to come
            self._print(text)

    def end(self, text: str) -> None:
        """Whatever was held back, and a line's end."""
        self._print(text)
        typer.echo()

    def _print(self, text: str) -> None:
        answer = text.find(END_THINK) + len(END_THINK) if self.reasons and END_THINK in text else 0
        if self.reasons and not answer:
            answer = len(text)
        calls = text.find(f"<{DSML}", answer)
        calls = len(text) if calls < 0 else calls
        for begin, end, dim in ((0, answer, True), (answer, calls, False), (calls, len(text), True)):
            if part := text[max(begin, self.shown) : end]:
                typer.echo(typer.style(printable(part), dim=dim) if dim else printable(part), nl=False)
                if end == answer and text.endswith(END_THINK, 0, end):
                    typer.echo()
        self.shown = max(self.shown, len(text))


def printable(text: str) -> str:
    """The text with control characters, but for line ends and tabs, as escapes such as \\x1b."""
    return "".join(c if c in "\n\t" or not _controls(c) else c.encode("unicode_escape").decode() for c in text)


def _controls(character: str) -> bool:
    return ord(character) < 32 or 127 <= ord(character) < 160


def _remark(text: str) -> None:
    typer.echo(typer.style(f"[{printable(text)}]", dim=True))


def _changed(speaks: Speaker, mode: str, wanted: str) -> str:
    try:
        check_mode(speaks, wanted)
    except UserError as error:
        typer.echo(f"error: {error}")
        return mode
    return wanted


def _read() -> str | None:
    """The next line that is not empty; None at the end of the input. A line that no terminal shows is repeated."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401 - gives input() the arrow keys and a history
    while True:
        try:
            line = input("> " if typed else "").strip()
            line.encode()
        except (EOFError, KeyboardInterrupt) as end:
            if typed:
                typer.echo()
            if isinstance(end, KeyboardInterrupt):
                raise
            return None
        except UnicodeError:
            typer.echo("error: the line is not UTF-8")
            continue
        if line:
            if not typed:
                typer.echo(f"> {printable(line)}")
            return line
