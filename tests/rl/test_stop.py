"""Stop strings over growing text, beside a search in the whole text after every token."""

import random

import pytest
from tokenizers import Tokenizer

from amalgam.model.config import PRESETS
from amalgam.rl.stop import StopText


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(PRESETS / "tiny" / "tokenizer.json"))


def naive(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[int, str] | None:
    """After how many tokens, and the text before."""
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=False).rstrip("\N{REPLACEMENT CHARACTER}")
        found = [at for at in (text.find(stop) for stop in stops) if at >= 0]
        if found:
            return n, text[: min(found)]
    return None


def incremental(tokenizer: Tokenizer, ids: list[int], stops: list[str]) -> tuple[int, str] | None:
    text = StopText(tokenizer, stops)
    for n, token in enumerate(ids, start=1):
        if (before := text.add(token)) is not None:
            return n, before
    return None


def test_as_in_the_whole_text(tokenizer: Tokenizer):
    """Texts of few characters, so that stop strings overlap, and lie across tokens of one to four bytes."""
    rng, hits = random.Random(5), 0
    for _ in range(400):
        alphabet = rng.choice(["ab", "ab \n", "aé𝄞", "the following word 1é"])
        text = "".join(rng.choices(alphabet, k=rng.randint(1, 30)))
        stops = ["".join(rng.choices(alphabet, k=rng.randint(1, 5))) for _ in range(rng.randint(1, 3))]
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        expected = naive(tokenizer, ids, stops)
        assert incremental(tokenizer, ids, stops) == expected, (text, stops)
        hits += expected is not None
    assert 100 < hits < 390


def test_bytes_that_are_no_text_do_not_hide_what_follows(tokenizer: Tokenizer):
    byte = tokenizer.encode("é", add_special_tokens=False).ids[0]  # the first of two bytes
    ids = [byte] * 20 + tokenizer.encode("stop", add_special_tokens=False).ids
    found = incremental(tokenizer, ids, ["stop"])
    assert found is not None and found[0] == len(ids) and found[1].strip("\N{REPLACEMENT CHARACTER}") == ""


def test_special_tokens_count_as_text(tokenizer: Tokenizer):
    end = tokenizer.token_to_id("</think>")
    ids = [*tokenizer.encode("a", add_special_tokens=False).ids, end]
    assert incremental(tokenizer, ids, ["</think>"]) == (2, "a")
