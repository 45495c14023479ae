"""The tokenizer: its ids, exact round trips, the spelling of arguments, special tokens in text, files."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amalgam.errors import UserError
from amalgam.model import tokenizer as tok

WORDS = ["Spell", " this", " word", " backward", "<answer>", "</answer>", " +"]
TINY = tok.build(WORDS)
ids = tok.encode_plain


def pieces(text: str) -> list[str]:
    return [TINY.decode([i], skip_special_tokens=False) for i in ids(TINY, text)]


def test_ids_are_specials_then_bytes_then_words():
    assert [TINY.token_to_id(special) for special in tok.SPECIALS] == list(range(15))
    assert (tok.SPECIALS[0], tok.SPECIALS[1]) == ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
    assert ids(TINY, "A") == [15 + ord("A")]
    assert ids(TINY, "é") == [15 + byte for byte in "é".encode()]
    assert ids(TINY, "Spell word") == [15 + 256, 15 + 256 + 2]
    assert TINY.get_vocab_size() == 15 + 256 + len(WORDS)


def test_words_are_one_token_and_all_else_is_spelled():
    assert pieces("Spell this word backward: sword") == [
        *("Spell", " this", " word", " backward", ":"),
        *(" ", "s", "w", "o", "r", "d"),
    ]
    assert pieces("words word") == ["w", "o", "r", "d", "s", " word"]
    assert pieces("12 + 3") == ["1", "2", " +", " ", "3"]


def test_a_words_spelling_does_not_depend_on_what_is_before_it():
    for before in ("", " ", "  ", "\n", "<answer>", "(", "7", ' "'):
        assert pieces(before + "stone")[-5:] == ["s", "t", "o", "n", "e"]


def test_answer_tags_are_one_token_wherever_they_stand():
    for text in ("<answer>5</answer>", "x <answer> 5 </answer>.", "<<answer>></answer>"):
        assert pieces(text).count("<answer>") == pieces(text).count("</answer>") == 1


@given(st.text())
def test_any_text_comes_back(text: str):
    assert TINY.decode(ids(TINY, text), skip_special_tokens=False) == text


@given(st.lists(st.sampled_from([*tok.SPECIALS, *WORDS, "<", "｜", "think>", " ", "é"])).map("".join))
def test_special_strings_in_ordinary_text_are_spelled(text: str):
    assert min(ids(TINY, text), default=15) >= 15
    assert TINY.decode(ids(TINY, text), skip_special_tokens=False) == text


def test_build_refuses_words_that_could_never_be_produced():
    for bad in (" two words", "a", "12", "word ", ""):
        with pytest.raises(ValueError, match="cannot be a word"):
            tok.build([bad])
    with pytest.raises(ValueError, match="cannot be a word"):
        tok.build([" word", " word"])


def test_collect_words_takes_wordings_and_not_arguments():
    texts = {
        "spell": [f"Spell the word {'abcdefghij'[i] * 3}" for i in range(10)],
        "add": [f"Add {i} + {i} n" for i in range(10)] * 3,
    }
    assert tok.collect_words(texts, 9) == [" +", " the", " word", "Add", "Spell"]
    assert tok.collect_words(texts, 2) == [" word", "Spell"]  # what saves most: 4 bytes a text each
    assert tok.collect_words({"x": ["red 1", "red 2", "red 3", "blue 4"]}, 9, share=0.25) == ["red"]


def test_saved_tokenizer_is_the_same_to_tokenizers_and_to_transformers(tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tok.save(TINY, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v4"}))
    text = "<｜begin▁of▁sentence｜>a<｜User｜>Spell this é<｜Assistant｜><think>x</think> <answer>y</answer>"
    expected = TINY.encode(text, add_special_tokens=False).ids
    assert tok.load(tmp_path).encode(text, add_special_tokens=False).ids == expected
    for auto in (AutoTokenizer, PreTrainedTokenizerFast):
        loaded = auto.from_pretrained(tmp_path)
        assert loaded(text)["input_ids"] == expected
        assert loaded.decode(expected) == text
        assert (loaded.bos_token_id, loaded.eos_token_id, len(loaded)) == (0, 1, TINY.get_vocab_size())


def test_check_specials_names_what_is_missing(tmp_path):
    tok.check_specials(TINY)
    tok.save(TINY, tmp_path)
    path = tmp_path / "tokenizer.json"
    text = path.read_text("utf-8").replace("<think>", "<thought>")
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=r"tokenizer.json: special tokens missing: <think>; each"):
        tok.load(tmp_path)


def test_load_names_the_file(tmp_path):
    with pytest.raises(UserError, match="tokenizer.json: no such file"):
        tok.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(UserError, match="tokenizer.json: not a tokenizer"):
        tok.load(tmp_path)
