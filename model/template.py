"""The chat format of models other than V4: the checkpoint's own template, rendered in transformers' sandboxed Jinja.

It has the methods of `Encoding`. A conversation is rendered whole, cut where the model starts and stops writing, and
each piece is tokenized on its own, so that training sees the ids that sampling saw. What a template cannot do here:
tools, and messages that spell one of the tokenizer's added tokens (the text would become that token).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..errors import UserError
from .auto import end_ids, is_v4
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
        self._check(messages, mode)
        whole, start = self._render(messages, mode), 0
        spans: list[tuple[str, bool]] = []
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, written = self._render(messages[:i], mode, header=True), self._render(messages[: i + 1], mode)
            stop = self._stop(written, len(before)) if written.startswith(before) else None
            if stop is not None and whole.startswith(written[:stop]):
                spans += [(whole[start : len(before)], False), (whole[len(before) : stop], True)]
                start = stop
            elif i + 1 == len(messages):
                raise ValueError(f"messages[{i}]: the chat template does not show it as the model would write it")
        if messages[-1]["role"] != "assistant":
            spans.append((whole[start:], False))
        return spans

    def ids(
        self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat"
    ) -> tuple[list[int], list[bool]]:
        """The token ids of a conversation, and for each whether it is trained."""
        ids: list[int] = []
        trained: list[bool] = []
        for text, is_trained in self.spans(messages, mode):
            # A tokenizer may treat the beginning of a text in its own way; an end token before it keeps it a middle.
            new = tokenizer.encode(self.ends[0] + text if ids else text, add_special_tokens=False).ids
            ids += new[1:] if ids else new
            trained += [is_trained] * (len(ids) - len(trained))
        return ids, trained

    def prompt_ids(self, tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], mode: str = "chat") -> list[int]:
        """The token ids up to where the model begins to write. ValueError if no user message comes last."""
        if not messages or messages[-1].get("role") != "user":
            raise ValueError("a prompt must end with a user message")
        return self.ids(tokenizer, messages, mode)[0]

    def parse(self, text: str, mode: str = "chat") -> dict[str, str]:
        """What the model wrote, with its end token: a message {role, content, reasoning_content}.

        Strict: ValueError says what is wrong; nothing is repaired.
        """
        stop = self._stop(text, 0)
        if stop is None:
            raise ValueError(f"the message does not end with {' or '.join(self.ends)}")
        if stop < len(text):
            raise ValueError(f"{len(text) - stop} characters follow the end token")
        end = next(end for end in self.ends if text.endswith(end))
        reasoning, content = "", text[: -len(end)]
        if mode != "chat":
            reasoning, end, content = content.partition(END_THINK)
            if not end:
                raise ValueError(f"the reasoning does not end with {END_THINK}")
            reasoning, content = reasoning.strip().removeprefix("<think>").strip(), content.lstrip("\n")
        return {"role": "assistant", "content": content, "reasoning_content": reasoning}

    def _stop(self, text: str, start: int) -> int | None:
        """Where the first end token from `start` on ends."""
        found = [(at, at + len(end)) for end in self.ends if (at := text.find(end, start)) >= 0]
        return min(found)[1] if found else None

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

    def _check(self, messages: Sequence[Mapping[str, Any]], mode: str) -> None:
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
                if special := next((token for token in added if token in value), None):
                    raise ValueError(f"messages[{i}]: {key} spells the token {special}; take it out")
