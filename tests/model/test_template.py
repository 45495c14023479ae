"""Chat formats of other models: what their templates say, cut where the model writes, in the ids that sampling sees."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.errors import UserError
from amalgam.model.completion import EVENTS
from amalgam.model.encoding import Encoding
from amalgam.model.template import Template, TemplateConversation, speaker

from .. import other_models
from ..other_models import REASONING, SPECIALS

HELLO = [{"role": "user", "content": "Hi"}]
REPLY = {"role": "assistant", "content": "Hello"}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "2 + 2"}
Conversation = list[dict[str, Any]]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Template:
    return Template.from_checkpoint(other_models.checkpoint(tmp_path_factory.mktemp("t") / "plain"))


@pytest.fixture(scope="module")
def reasoning(tmp_path_factory: pytest.TempPathFactory) -> Template:
    folder = other_models.checkpoint(tmp_path_factory.mktemp("t") / "reasoning", template=REASONING)
    return Template.from_checkpoint(folder)


def test_a_checkpoint_has_its_own_format(plain: Template, tmp_path: Path):
    encoding, tokenizer = speaker(other_models.checkpoint(tmp_path / "m"))
    assert encoding == plain
    assert tokenizer.get_vocab_size() == other_models.VOCABULARY
    from amalgam.model.checkpoint import PRESETS

    assert isinstance(speaker(PRESETS / "tiny")[0], Encoding)


def test_texts_and_spans(plain: Template, reasoning: Template):
    assert plain.modes == ("chat",)
    assert reasoning.modes == ("chat", "high")
    assert plain.encode(HELLO) == "<|start|>user\nHi<|end|>\n<|start|>assistant\n"
    assert plain.spans([*HELLO, REPLY, *HELLO, REPLY]) == [
        ("<|start|>user\nHi<|end|>\n<|start|>assistant\n", False),
        ("Hello<|end|>", True),
        ("\n<|start|>user\nHi<|end|>\n<|start|>assistant\n", False),
        ("Hello<|end|>", True),
    ]
    empty = "<|start|>user\nHi<|end|>\n<|start|>assistant\n<think>\n\n</think>\n\n"
    assert reasoning.spans([*HELLO, REPLY]) == [(empty, False), ("Hello<|end|>", True)]
    high = reasoning.spans([*HELLO, THOUGHT], "high")
    assert high == [(empty.partition("<think>")[0], False), ("<think>\n2 + 2\n</think>\n\n4<|end|>", True)]


def test_a_turn_that_is_shown_without_its_reasoning_is_context_only(reasoning: Template):
    spans = reasoning.spans([*HELLO, THOUGHT, *HELLO, THOUGHT], "high")
    assert [trained for _, trained in spans] == [False, True]
    assert "<|start|>assistant\n4<|end|>" in spans[0][0]
    assert spans[1][0] == "<think>\n2 + 2\n</think>\n\n4<|end|>"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda t: not any(s in t for s in SPECIALS)
)
turns = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=3)


@settings(max_examples=50, deadline=None)
@given(turns=turns, mode=st.sampled_from(["chat", "high"]))
def test_training_sees_the_ids_that_sampling_saw(reasoning: Template, plain: Template, turns: list, mode: str):
    """A prompt's ids begin the ids of the conversation that goes on from it; what is trained parses back."""
    for template in (reasoning, plain) if mode == "chat" else (reasoning,):
        messages: Conversation = []
        for question, thought, answer in turns:
            messages.append({"role": "user", "content": question})
            prompt = template.prompt_ids(template.tokenizer, messages, mode)
            reply = {"role": "assistant", "content": answer}
            if mode == "high":
                reply["reasoning_content"] = thought.strip()
            messages.append(reply)
            ids, trained = template.ids(template.tokenizer, messages, mode)
            assert ids[: len(prompt)] == prompt
            assert trained[len(prompt) :] == [True] * (len(ids) - len(prompt))
            text = template.tokenizer.decode(ids, skip_special_tokens=False)
            assert text == template.encode(messages, mode)
            wrote = template.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=False)
            expected = {"reasoning_content": "", **reply, "content": answer.lstrip("\n") if mode == "high" else answer}
            assert template.parse(wrote, mode) == expected


def test_parse_is_strict(plain: Template, reasoning: Template):
    assert plain.parse("a<|eot|>") == {"role": "assistant", "content": "a", "reasoning_content": ""}
    for template, text, mode, message in [
        (plain, "a", "chat", "does not end with <|end|> or <|eot|>"),
        (plain, "a<|end|>bc", "chat", "2 characters follow the end token"),
        (reasoning, "a<|end|>", "high", "the reasoning does not end with </think>"),
    ]:
        with pytest.raises(ValueError, match=message.replace("|", r"\|")):
            template.parse(text, mode)


@pytest.mark.parametrize(
    ("messages", "mode", "message"),
    [
        ([], "chat", "messages is empty"),
        ([{"role": "tool", "content": "x"}], "chat", r"messages\[0\]: unknown role 'tool'; want one of system, user"),
        ([{"role": "user"}], "chat", r"messages\[0\]: content must be a string"),
        ([*HELLO, {**REPLY, "tool_calls": []}], "chat", r"messages\[1\]: key 'tool_calls' is not built"),
        ([{"role": "user", "content": "a<|eot|>b"}], "chat", r"messages\[0\]: content spells the token <\|eot\|>"),
        ([REPLY], "chat", "the chat template refuses these messages: begin with a question"),
        (HELLO, "high", "the checkpoint's chat template has no mode 'high'; it has chat"),
    ],
)
def test_bad_messages_are_refused(plain: Template, messages: Conversation, mode: str, message: str):
    with pytest.raises(ValueError, match=message):
        plain.ids(plain.tokenizer, messages, mode)


def test_a_prompt_ends_with_a_user_message(plain: Template):
    with pytest.raises(ValueError, match="a prompt must end with a user message"):
        plain.prompt_ids(plain.tokenizer, [*HELLO, REPLY])


def test_a_template_that_hides_the_answer_is_refused(tmp_path: Path):
    hidden = "{% for m in messages %}<|start|>{{ m.role }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    template = Template.from_checkpoint(other_models.checkpoint(tmp_path / "m", template=hidden))
    with pytest.raises(ValueError, match=r"messages\[1\]: the chat template does not show it as the model would write"):
        template.ids(template.tokenizer, [*HELLO, REPLY])


def test_a_template_runs_in_a_sandbox(tmp_path: Path):
    reach = "{{ messages.__class__.__mro__ }}"
    template = Template.from_checkpoint(other_models.checkpoint(tmp_path / "m", template=reach))
    with pytest.raises(ValueError, match="refuses these messages: access to attribute '__class__'"):
        template.encode(HELLO)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json: no such file"),
        (lambda f: (f / "tokenizer.json").write_text("{}"), "tokenizer.json: "),
        (lambda f: (f / "chat_template.jinja").unlink(), "no chat template; want chat_template.jinja"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": 999}'), "it has no token 999"),
        (lambda f: (f / "generation_config.json").write_text('{"eos_token_id": "x"}'), "eos_token_id: 'x'; it must be"),
    ],
)
def test_a_damaged_folder_is_refused_in_one_line(damage, message: str, tmp_path: Path):
    folder = other_models.checkpoint(tmp_path / "m")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        Template.from_checkpoint(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


IDS = st.lists(st.integers(0, other_models.VOCABULARY - 1).filter(lambda i: i not in other_models.END_IDS), max_size=30)


@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.tuples(IDS, st.sampled_from([(), *((end,) for end in other_models.END_IDS)])), max_size=3))
def test_whatever_a_model_writes_stays_as_its_ids(plain: Template, turns: list):
    """Half characters, special tokens and turns that were cut off; the last get the template's end token."""
    conversation = TemplateConversation(plain, HELLO)
    for ids, end in turns:
        before = conversation.ids
        events = conversation.write([*ids, *end])
        assert [event.name for event in events] == ([] if end else ["no_eos"])
        conversation = conversation.restart(HELLO)
        closed = end or other_models.END_IDS[:1]
        between = plain.tokenizer.encode("\n" + plain.encode(HELLO)).ids
        assert conversation.ids == [*before, *ids, *closed, *between]


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.sampled_from([*SPECIALS, "\n", "a"]), max_size=8).map("".join),
    mode=st.sampled_from(["chat", "high"]),
)
def test_the_tolerant_reader_reports_what_the_strict_one_refuses(reasoning: Template, text: str, mode: str):
    message, events = reasoning.parse_tolerant(text, mode)
    assert {event.name for event in events} <= EVENTS.keys()
    try:
        assert (reasoning.parse(text, mode), []) == (message, events)
    except ValueError as error:
        assert str(error) == events[0].detail
