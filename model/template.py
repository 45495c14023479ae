"""The chat format of models other than V4: the checkpoint's own template, rendered in transformers' sandboxed Jinja.

It has the methods of `Encoding`. A conversation is rendered whole, cut where the model starts and stops writing, and
each piece is tokenized on its own, so that training sees the ids that sampling saw. What a template cannot do here:
tools, and messages that spell one of the tokenizer's added tokens (the text would become that token).
"""

import copy
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UserError
from .auto import end_ids, is_v4
from .completion import Event, strict, tolerant
from .conversation import Conversation
from .dsml import Report
from .encoding import Encoding
from .tokenizer import load as load_v4_tokenizer

END_THINK = "</think>"
_SWITCH = "enable_thinking"  # the variable by which templates of Qwen3, SmolLM3 and others turn reasoning on
_ROLES = ("system", "user", "assistant")
_KEYS = ("role", "content", "reasoning_content")


def speaker(folder: Path) -> tuple["Encoding | Template", Tokenizer]:
    """The chat format and the tokenizer of a checkpoint."""
    if is_v4(folder):
        return Encoding.from_checkpoint(folder), load_v4_tokenizer(folder)
    template = Template.from_checkpoint(folder)
    return template, template.tokenizer


def converse(
    encoding: "Encoding | Template", tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str
) -> "Conversation | TemplateConversation":
    """A conversation in a checkpoint's chat format; `messages` must end where the model's turn comes next."""
    if isinstance(encoding, Encoding):
        return Conversation(encoding, tokenizer, messages, mode)
    return TemplateConversation(encoding, messages, mode)


@dataclass(frozen=True)
class Template:
    """`ends`: the end tokens' strings, of which the model writes one. `modes`: chat, and high if it can reason."""

    source: str
    ends: tuple[str, ...]
    modes: tuple[str, ...]
    tokenizer: Tokenizer = field(compare=False)
    renderer: Any = field(compare=False)  # transformers' tokenizer

    @classmethod
    def from_checkpoint(cls, folder: Path) -> "Template":
        """UserError where the folder has no tokenizer.json, no chat template, or an end token that is none."""
        from transformers import AutoTokenizer

        file = folder / "tokenizer.json"
        if not file.is_file():
            raise UserError(f"{file}: no such file; save the tokenizer with transformers' save_pretrained")
        try:
            tokenizer = Tokenizer.from_file(str(file))
            renderer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except Exception as error:  # both libraries raise many kinds for files that they cannot read
            raise UserError(f"{file}: {' '.join(str(error).split())[:300]}") from error
        if not isinstance(renderer.chat_template, str):
            raise UserError(f"{folder}: no chat template; want chat_template.jinja, as instruct models have it")
        ends = []
        for i in end_ids(folder):
            if (end := tokenizer.id_to_token(i)) is None:
                raise UserError(f"{file}: it has no token {i}, which the checkpoint names in eos_token_id")
            ends.append(end)
        modes = ("chat", "high") if _SWITCH in renderer.chat_template else ("chat",)
        return cls(renderer.chat_template, tuple(ends), modes, tokenizer, renderer)

    def encode(self, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> str:
        """The text of a conversation. After a last user message it ends with the header of the model's turn."""
        return "".join(text for text, _ in self.spans(messages, mode))

    def spans(self, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> list[tuple[str, bool]]:
        """The text in spans of (text, trained). Trained is what the model writes, its end token too.

        An earlier turn that the template shows otherwise than the model wrote it (without its reasoning, say) is
        context only; the last one must stand as written. Nothing follows it. ValueError names the message.
        """
        return [(text, place is not None) for text, place in self._spans(messages, mode)]

    def _spans(
        self, messages: Sequence[Mapping[str, Any]], mode: str, written: Collection[int] = ()
    ) -> list[tuple[str, int | None]]:
        """(text, place of the message that the model writes there). At `written` stands what a model has written."""
        self._check(messages, mode, written)
        whole, start = self._render(messages, mode), 0
        spans: list[tuple[str, int | None]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, shown = self._render(messages[:i], mode, header=True), self._render(messages[: i + 1], mode)
            end = self._end(shown, len(before)) if shown.startswith(before) else None
            if end is not None and whole.startswith(shown[: end[1]]):
                spans += [(whole[start : len(before)], None), (whole[len(before) : end[1]], i)]
                start = end[1]
            elif i + 1 == len(messages):
                raise ValueError(f"messages[{i}]: the chat template does not show it as the model would write it")
        if messages[-1]["role"] != "assistant":
            spans.append((whole[start:], None))
        return spans

    def ids(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat"
    ) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether it is trained."""
        ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in self.spans(messages, mode):
            ids += self._tokenize(text, inside=bool(ids))
            trained += [is_trained] * (len(ids) - len(trained))
        return ids, trained

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def _tokenize(self, text: str, inside: bool) -> list[int]:
        # A tokenizer may treat the beginning of a text in its own way; an end token before it keeps it a middle.
        ids = self.tokenizer.encode(self.ends[0] + text if inside else text, add_special_tokens=False).ids
        return ids[1:] if inside else ids

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> list[int]:
        """The token ids up to where the model begins to write. ValueError if no user message comes last."""
        return self.continued(messages, mode, {})

    def continued(
        self, messages: Sequence[Mapping[str, Any]], mode: str, written: Mapping[int, Sequence[int]]
    ) -> list[int]:
        """`prompt_ids` of a conversation in which the model has written the ids `written`, by the messages' places.

        They stay where the template shows that text, whatever end token it has; a turn that was cut off gets that
        one. Where the template shows the turn otherwise, without its reasoning, say, the ids are those of the text.
        """
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("a prompt must end with a user message")
        ids: list[int] = []
        for text, place in self._spans(messages, mode, written):
            own = list(written.get(-1 if place is None else place, ()))
            ended = bool(own) and self.tokenizer.id_to_token(own[-1]) in self.ends
            end = self._end(text, 0)
            if own and end and text[: end[0]] == self._decode(own[:-1] if ended else own):
                ids += own
                text = "" if ended else text[end[0] :]
            ids += self._tokenize(text, inside=bool(ids)) if text else []
        return ids

    def parse(self, text: str, mode: str = "chat") -> dict[str, Any]:
        """What the model wrote, with its end token: a message {role, content, reasoning_content}.

        Strict: ValueError says what is wrong; nothing is repaired.
        """
        return strict(lambda report: self._read(text, mode, report))

    def parse_tolerant(self, text: str, mode: str = "chat") -> tuple[dict[str, Any], list[Event]]:
        """The message of `parse` as far as it can be read, and what is wrong; it never raises for a text."""
        return tolerant(lambda report: self._read(text, mode, report))

    def _read(self, text: str, mode: str, report: Report) -> dict[str, Any]:
        end = self._end(text, 0)
        if end is None:
            report("no_eos", f"the message does not end with {' or '.join(self.ends)}")
        elif end[1] < len(text):
            report("text_after_eos", f"{len(text) - end[1]} characters follow the end token")
        reasoning, content = "", text if end is None else text[: end[0]]
        if mode != "chat":
            reasoning, end_think, content = content.partition(END_THINK)
            if not end_think:
                report("open_reasoning", f"the reasoning does not end with {END_THINK}")
            reasoning, content = reasoning.strip().removeprefix("<think>").strip(), content.lstrip("\n")
        return {"role": "assistant", "content": content, "reasoning_content": reasoning}

    def _end(self, text: str, start: int) -> tuple[int, int] | None:
        """Where the first end token from `start` on begins and ends."""
        found = [(at, at + len(end)) for end in self.ends if (at := text.find(end, start)) >= 0]
        return min(found) if found else None

    def _render(self, messages: Sequence[Mapping[str, Any]], mode: str, header: bool | None = None) -> str:
        """With the header of the model's turn, by default where no assistant's message comes last."""
        from jinja2 import TemplateError

        if header is None:
            header = messages[-1]["role"] != "assistant"
        shown = [{key: value for key, value in message.items() if value is not None} for message in messages]
        switch = {_SWITCH: mode == "high"} if "high" in self.modes else {}
        try:
            return self.renderer.apply_chat_template(shown, tokenize=False, add_generation_prompt=header, **switch)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error

    def _check(self, messages: Sequence[Mapping[str, Any]], mode: str, written: Collection[int] = ()) -> None:
        if mode not in self.modes:
            raise ValueError(f"the checkpoint's chat template has no mode {mode!r}; it has {', '.join(self.modes)}")
        if not messages:
            raise ValueError("messages is empty; want at least one message")
        added = [token.content for token in self.tokenizer.get_added_tokens_decoder().values()]
        for i, message in enumerate(messages):
            if message.get("role") not in _ROLES:
                raise ValueError(
                    f"messages[{i}]: unknown role {message.get('role')!r}; want one of {', '.join(_ROLES)}"
                )
            if not isinstance(message.get("content"), str):
                raise ValueError(f"messages[{i}]: content must be a string")
            for key, value in message.items():
                if value is None:
                    continue
                if key not in _KEYS or not isinstance(value, str):
                    raise ValueError(f"messages[{i}]: key {key!r} is not built; a message has {', '.join(_KEYS)}")
                if i not in written and (special := next((token for token in added if token in value), None)):
                    raise ValueError(f"messages[{i}]: {key} spells the token {special}; take it out")


class TemplateConversation:
    """`Conversation` in a checkpoint's own template: what the model wrote stays as its ids (see Template.continued)."""

    def __init__(self, template: Template, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> None:
        self.template, self.mode = template, mode
        self.messages: list[Mapping[str, Any]] = list(messages)
        self._written: dict[int, list[int]] = {}
        self.ids = template.continued(messages, mode, {})

    def write(self, ids: Iterable[int]) -> list[Event]:
        """Append what the model wrote, its end token included where it wrote one; returns what is wrong with it."""
        own = [int(i) for i in ids]
        message, events = self.template.parse_tolerant(self.template._decode(own), self.mode)
        self._written = self._written | {len(self.messages): own}
        self.messages = [*self.messages, message]
        self.ids = [*self.ids, *own]
        return events

    def restart(self, messages: Sequence[Mapping[str, Any]], mode: str | None = None) -> "TemplateConversation":
        """A new conversation that goes on with messages, earlier turns as the template shows them then."""
        new = copy.copy(self)
        new.messages, new.mode = [*self.messages, *messages], mode or self.mode
        new.ids = self.template.continued(new.messages, new.mode, self._written)
        return new
