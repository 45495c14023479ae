"""A conversation of token ids: it only grows, keeps what the model wrote, and says where the rules would not append."""

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amalgam.model.conversation import Conversation, HistoryRewritten
from amalgam.model.encoding import MODES
from amalgam.model.tokenizer import ASSISTANT, DSML, END_THINK, EOS, SPECIALS, THINK, USER

from .chats import ENCODING, SYSTEM, TINY, TOOL, assistant, call, conversations, result, user
from .test_completion import damaged

# "Question" letter by letter, where the tokenizer has one token for the word.
LETTERS = [TINY.encode(letter).ids[0] for letter in "Question"]


def spelled(text: str) -> list[int]:
    """The ids of what a model writes, special tokens among them."""
    return TINY.encode(text, add_special_tokens=False).ids


def text_of(ids: list[int]) -> str:
    return TINY.decode(ids, skip_special_tokens=False)


def grown(messages: list[dict[str, Any]], mode: str, **options: Any) -> Conversation:
    """A conversation in which the model writes each assistant message as the encoding spells it."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    conversation = Conversation(ENCODING, TINY, messages[: turns[0]], mode, **options)
    for place, following in zip(turns, [*turns[1:], len(messages)], strict=True):
        before, prompt = conversation.messages, conversation.ids
        whole, _ = ENCODING.ids(TINY, [*before, messages[place]], mode, **options)
        assert whole[: len(prompt)] == prompt
        assert conversation.write(whole[len(prompt) :]) == []
        assert conversation.ids == whole
        # The ids that the calls got stand in their results, too.
        names = {old["id"]: new["id"] for old, new in pairs(messages[place], conversation.messages[-1])}
        added = [rename(message, names) for message in messages[place + 1 : following]]
        if added:
            assert conversation.add(added) == conversation.ids[len(whole) :]
            assert conversation.ids[: len(whole)] == whole
    return conversation


def pairs(given: Mapping[str, Any], read: Mapping[str, Any]) -> Any:
    return zip(given.get("tool_calls", []), read.get("tool_calls", []), strict=True)


def rename(message: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    return {**message, "tool_call_id": names[message["tool_call_id"]]} if message["role"] == "tool" else message


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODES))
def test_it_grows_to_the_ids_of_the_whole_conversation(data: st.DataObject, mode: str):
    messages = data.draw(conversations(mode))
    conversation = grown(messages, mode, keep_reasoning=True)
    ids, trained = ENCODING.ids(TINY, conversation.messages, mode, keep_reasoning=True)
    assert (conversation.ids, conversation.trained) == (ids, trained)
    if mode == "chat" or any(message.get("tools") for message in messages):
        assert grown(messages, mode).ids == ids


def test_results_are_sorted_by_the_ids_that_calls_got():
    conversation = Conversation(ENCODING, TINY, [{**SYSTEM, "tools": [TOOL]}, user("q")], "high")
    prompt = list(conversation.ids)
    calls = [call("f", {}), call("g", {})]
    whole, _ = ENCODING.ids(TINY, [*conversation.messages, assistant("", "r", tool_calls=calls)], "high")
    assert conversation.write(whole[len(prompt) :]) == []
    assert [each["id"] for each in conversation.messages[-1]["tool_calls"]] == ["call_0", "call_1"]
    added = conversation.add([result("2", "call_1"), result("1", "call_0")])
    results = "<tool_result>1</tool_result>\n\n<tool_result>2</tool_result>"
    assert text_of(added) == f"{USER}{results}{ASSISTANT}{THINK}"
    assert conversation.ids == whole + added
    assert conversation.trained == [False] * len(prompt) + [True] * (len(whole) - len(prompt)) + [False] * len(added)
    conversation.write(whole[len(prompt) :])
    assert [each["id"] for each in conversation.messages[-1]["tool_calls"]] == ["call_2", "call_3"]


def test_the_models_own_ids_stay_where_the_encoding_would_spell_otherwise():
    conversation = Conversation(ENCODING, TINY, [user("q")])
    own = [*LETTERS, *spelled(EOS)]
    assert own != spelled(f"Question{EOS}") and text_of(own) == f"Question{EOS}"
    assert conversation.write(own) == []
    prompt = len(conversation.ids) - len(own)
    conversation.add([user("more")])
    assert conversation.ids[prompt : prompt + len(own)] == own
    assert conversation.messages[1]["content"] == "Question"


def test_invalid_bytes_and_a_missing_end_stay_as_they_are():
    conversation = Conversation(ENCODING, TINY, [user("q")], keep_reasoning=True)
    own = [len(SPECIALS) + 0xC3, len(SPECIALS) + ord("x")]  # half a character, then x, and no EOS
    assert [event.name for event in conversation.write(own)] == ["no_eos"]
    assert conversation.messages[-1]["content"] == "\N{REPLACEMENT CHARACTER}x"
    assert conversation.messages[-1]["wo_eos"]
    added = conversation.add([user("more")])
    assert conversation.ids[-len(added) - 2 : -len(added)] == own
    assert text_of(added) == f"{USER}more{ASSISTANT}{END_THINK}"


def test_dropped_reasoning_is_refused_and_restarts_with_the_models_own_ids():
    conversation = Conversation(ENCODING, TINY, [SYSTEM, user("q")], "max")
    conversation.write([*spelled(f"because{END_THINK}"), *LETTERS, *spelled(EOS)])
    before = (list(conversation.messages), list(conversation.ids), list(conversation.trained))
    with pytest.raises(HistoryRewritten, match="mode 'max' drops or restores the reasoning of earlier turns"):
        conversation.add([user("more")])
    assert (conversation.messages, conversation.ids, conversation.trained) == before
    fresh = conversation.restart([user("more")])
    messages = [SYSTEM, user("q"), assistant("Question", "because"), user("more")]
    assert text_of(fresh.ids) == ENCODING.encode(messages, "max")
    assert fresh.ids != ENCODING.ids(TINY, messages, "max")[0]
    assert LETTERS in [fresh.ids[i : i + len(LETTERS)] for i in range(len(fresh.ids))]
    assert not any(fresh.trained)
    assert (conversation.messages, conversation.ids, conversation.trained) == before
    fresh.write(spelled(f"so{END_THINK}5{EOS}"))
    assert sum(fresh.trained) == len(spelled(f"so{END_THINK}5{EOS}"))
    # A reasoning that never ended leaves nothing but EOS.
    cut = Conversation(ENCODING, TINY, [user("q")], "high")
    cut.write(spelled(f"because{EOS}"))
    assert text_of(cut.restart([user("more")]).ids) == ENCODING.encode([user("q"), assistant(""), user("more")], "high")


def test_the_answer_to_a_task_has_no_reasoning_and_appends():
    conversation = Conversation(ENCODING, TINY, [user("q", task="action")], "high")
    assert conversation.write(spelled(f"Search{EOS}")) == []
    assert text_of(conversation.add([user("more")])) == f"{USER}more{ASSISTANT}{THINK}"


def test_turns_alternate_and_wrong_messages_change_nothing():
    with pytest.raises(ValueError, match=r"messages\[0\]: a prompt must end with a user message"):
        Conversation(ENCODING, TINY, [SYSTEM])
    conversation = Conversation(ENCODING, TINY, [user("q")])
    with pytest.raises(ValueError, match="the model's turn is open; write"):
        conversation.add([user("more")])
    conversation.write(spelled(f"4{EOS}"))
    with pytest.raises(ValueError, match="the model's turn is not open; add"):
        conversation.write(spelled(f"4{EOS}"))
    before = list(conversation.ids)
    for added, error in (
        ([{"role": "bot"}], r"messages\[2\]: unknown role"),
        ([SYSTEM], r"messages\[2\]: a prompt must end with"),
        ([], r"messages\[1\]: a prompt must end with a user message.*not with role 'assistant'"),
    ):
        with pytest.raises(ValueError, match=error):
            conversation.add(added)
    assert conversation.ids == before


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(MODES))
def test_whatever_the_model_writes_it_goes_on(data: st.DataObject, mode: str):
    """Ids at random, or damaged text: no error, and all of them stay."""
    conversation = Conversation(ENCODING, TINY, [{**SYSTEM, "tools": [TOOL]}, user("q")], mode)
    for _ in range(3):
        ids = data.draw(st.lists(st.integers(0, TINY.get_vocab_size() - 1), max_size=20) | damaged(mode).map(spelled))
        prompt = list(conversation.ids)
        conversation.write(ids)
        assert conversation.ids == prompt + ids
        added = conversation.add([result("1", "call_0"), user("more")])
        assert conversation.ids == prompt + ids + added
    prompt = list(conversation.restart([user("again")]).ids) if conversation.write([]) else []
    assert prompt[: len(conversation.ids)] == conversation.ids  # tools keep all that the model wrote


def test_only_the_new_text_is_tokenized(monkeypatch: pytest.MonkeyPatch):
    from amalgam.model import encoding

    seen: list[str] = []
    plain = encoding.encode_plain
    monkeypatch.setattr(encoding, "encode_plain", lambda t, text: seen.append(text) or plain(t, text))
    conversation = Conversation(ENCODING, TINY, [user("first")])
    conversation.write(spelled(f"answer{EOS}"))
    conversation.add([user("second")])
    assert seen == ["first", "second"]


def test_tools_named_late_restore_the_reasoning():
    talk = [user("a"), assistant("b", "lost"), user("c")]
    conversation = Conversation(ENCODING, TINY, talk, "high")
    conversation.write(spelled(f"r{END_THINK}d{EOS}"))
    late = [{"role": "developer", "content": "Now with tools.", "tools": [TOOL]}]
    with pytest.raises(HistoryRewritten):
        conversation.add(late)
    text = text_of(conversation.restart(late).ids)
    assert f"{THINK}lost{END_THINK}b{EOS}" in text and f"{THINK}r{END_THINK}d{EOS}" in text and DSML in text


def test_a_special_token_that_was_spelled_is_text():
    """With other tokens than its own: it ends no reasoning and begins no calls, and the ids stay as they were."""
    plain = [len(SPECIALS) + byte for byte in f"r{END_THINK}\n\n<{DSML}tool_calls".encode()]
    assert text_of(plain) == f"r{END_THINK}\n\n<{DSML}tool_calls"
    conversation = Conversation(ENCODING, TINY, [user("q")], "high")
    assert [event.name for event in conversation.write([*plain, *spelled(EOS)])] == ["open_reasoning"]
    assert conversation.messages[-1]["reasoning_content"] == text_of(plain)
    assert conversation.messages[-1]["content"] == ""
    assert text_of(conversation.restart([user("more")]).ids) == ENCODING.encode(
        [user("q"), assistant(""), user("more")], "high"
    )
    real = Conversation(ENCODING, TINY, [user("q")])
    value = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n<{DSML}parameter name="a" string="true">'
    end = f"</{DSML}parameter>\n</{DSML}invoke>\n</{DSML}tool_calls>{EOS}"
    assert real.write([*spelled(value), *plain, *spelled(end)]) == []
    assert real.messages[-1]["tool_calls"][0]["function"]["arguments"] == json.dumps(
        {"a": text_of(plain)}, ensure_ascii=False
    )


@pytest.mark.parametrize("tools", [[], [TOOL]])
def test_another_mode_from_here_on_keeps_the_models_own_ids(tools: list):
    conversation = Conversation(ENCODING, TINY, [{**SYSTEM, "tools": tools}, user("q")])
    conversation.write([*LETTERS, *spelled(EOS)])
    thinks = conversation.restart([user("more")], "max")
    answered = assistant("Question", "")
    assert text_of(thinks.ids) == ENCODING.encode([*conversation.messages[:2], answered, user("more")], "max")
    thinks.write([*spelled(f"so{END_THINK}"), *LETTERS, *spelled(EOS)])
    back = thinks.restart([user("end")], "chat")
    messages = [*conversation.messages[:2], answered, user("more"), assistant("Question", "so"), user("end")]
    assert text_of(back.ids) == ENCODING.encode(messages)
    assert sum(back.ids[i : i + len(LETTERS)] == LETTERS for i in range(len(back.ids))) == 2
    assert conversation.mode == "chat" and conversation.restart([user("more")]).mode == "chat"
    with pytest.raises(ValueError, match="unknown mode 'loud'"):
        conversation.restart([user("more")], "loud")
