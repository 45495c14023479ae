"""Tokens to parts of an answer: however its ids come, all parts together are what the encoding reads."""

import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from amalgam.model.config import PRESETS
from amalgam.model.conversation import read_ids
from amalgam.model.template import Template, speaker
from amalgam.model.tokenizer import DSML, END_THINK, EOS, SPECIALS, THINK, encode_plain
from amalgam.pipelines.serving.answers import Answer, Delta, held_back
from amalgam.pipelines.serving.prompts import Job

ENCODING, TINY = speaker(PRESETS / "tiny")
SPEAKS: Any = SimpleNamespace(encoding=ENCODING, tokenizer=TINY, end_ids=(1,))
CALL = f'<{DSML}invoke name="f">\n<{DSML}parameter name="x" string="false">1</{DSML}parameter>\n</{DSML}invoke>\n'
BLOCK = f"\n\n<{DSML}tool_calls>\n{CALL}</{DSML}tool_calls>"


def spelled(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False).ids


def fed(ids: list[int], finish: str, seed: int, job: Job, stop: tuple[str, ...] = ()) -> tuple[Answer, list[Delta]]:
    """The answer and its parts, the ids in random chunks."""
    rng, answer, deltas, ids = random.Random(seed), Answer(SPEAKS, job, stop), [], list(ids)
    while answer.finish is None:
        new, ids = ids[: (n := rng.choice([1, 1, 2, 5]))], ids[n:]
        deltas += answer.feed(np.array(new, np.int32), None if ids else finish)
    return answer, deltas


def joined(deltas: list[Delta], kind: str) -> str:
    return "".join(delta.value for delta in deltas if delta.kind == kind)


def calls(deltas: list[Delta]) -> list[dict[str, Any]]:
    return [call for delta in deltas if delta.kind == "tool_calls" for call in delta.value]


def random_ids(rng: random.Random) -> list[int]:
    """Text with all that is nearly a tool block, an end of reasoning, or a character."""
    parts: list[list[int]] = []
    for _ in range(rng.randrange(12)):
        kind = rng.randrange(7)
        if kind == 0:
            parts.append([len(SPECIALS) + byte for byte in rng.choice(["é", "漢", "😀", "a"]).encode()])
        elif kind == 1:
            parts.append([len(SPECIALS) + rng.randrange(256) for _ in range(rng.randrange(4))])
        elif kind == 2:
            parts.append(encode_plain(TINY, rng.choice([END_THINK, DSML, f"\n\n<{DSML}tool_calls", "</thi"])))
        elif kind == 3:
            parts.append(spelled(rng.choice([END_THINK, DSML, THINK, f"\n\n<{DSML}tool_", f"\n\n<{DSML}{DSML}"])))
        elif kind == 4:
            parts.append(
                spelled(rng.choice(["\n", "\n\n", "\n\n<", "\n\n\n<", "<", "tool_calls", f"<{DSML}tool_calls"]))
            )
        elif kind == 5:
            parts.append(spelled(rng.choice([BLOCK, BLOCK[:-9], BLOCK.replace("1", "}"), CALL])))
        else:
            parts.append(spelled(rng.choice(["so", " following", "7", "?"])))
    return [i for part in parts for i in part if i != 1]


@pytest.mark.parametrize("thinks", [False, True])
def test_v4_parts_are_what_the_encoding_reads(thinks: bool):
    found = [0, 0, 0, 0]
    for seed in range(400):
        ids = random_ids(random.Random(seed)) + spelled(EOS)
        answer, deltas = fed(ids, "stop", seed, Job([], thinks=thinks, calls=True))
        message, events = read_ids(TINY, ids, thinks)
        assert joined(deltas, "reasoning_content") == message["reasoning_content"]
        assert joined(deltas, "content") == message["content"]
        assert calls(deltas) == message.get("tool_calls", [])
        assert answer.finish == ("tool_calls" if calls(deltas) else "stop")
        assert answer.count == len(ids)
        if answer.problems:
            assert answer.problems == [": ".join(e) for e in events if e.name not in ("no_eos", "special_token")]
        there = (message["reasoning_content"], message["content"], calls(deltas), answer.problems)
        found = [count + bool(each) for count, each in zip(found, there, strict=True)]
        assert all(delta.value for delta in deltas)
    reasoning, *others = found
    assert (reasoning > 20) == thinks and min(others) > 5


def test_without_tools_a_block_is_text():
    _, deltas = fed(spelled(f"a{BLOCK}{EOS}"), "stop", 0, Job([]))
    assert [joined(deltas, "content"), calls(deltas)] == [f"a{BLOCK}", []]


def test_an_opening_that_the_prompt_has_is_part_of_the_call():
    head = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f">\n'
    ids = spelled((BLOCK + EOS).removeprefix(head))
    answer, deltas = fed(ids, "stop", 0, Job([], calls=True, opening=spelled(head)))
    assert calls(deltas) == [{"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]
    assert (answer.finish, answer.count) == ("tool_calls", len(ids))


def test_a_character_in_two_tokens_comes_whole_and_half_a_one_at_the_end():
    answer, (wave,) = Answer(SPEAKS, Job([]), ()), [[len(SPECIALS) + byte for byte in "😀".encode()]]
    got = [[d.value for d in answer.feed(np.array([i], np.int32), None)] for i in [*wave, *spelled("a"), *wave[:2]]]
    assert got == [[], [], [], ["😀"], ["a"], [], []]
    assert answer.feed(np.zeros(0, np.int32), "length") == [Delta("content", "\N{REPLACEMENT CHARACTER}")]
    assert answer.finish == "length"


def test_an_answer_ends_before_its_first_stop_string():
    """However tokens cut it, beside a naive search. The first is the one that is complete first: nothing follows it."""
    ended = 0
    for seed in range(400):
        rng = random.Random(seed)
        ids = random_ids(rng) + spelled("".join(rng.choice("ab é") for _ in range(12)))
        whole = TINY.decode(ids, skip_special_tokens=False)
        stop = tuple("".join(rng.choice("ab é<") for _ in range(rng.randint(1, 3))) for _ in range(rng.randint(1, 3)))
        stop += tuple(whole[at : at + 4] for at in [rng.randrange(len(whole))] if rng.random() < 0.3)
        until = next((whole[:n] for n in range(len(whole) + 1) if any(s in whole[:n] for s in stop)), whole)
        at = min((until.find(s) for s in stop if s in until), default=None)
        answer, deltas = fed(ids, "length", seed, Job([], is_text=True), stop)
        assert joined(deltas, "content") == whole[:at]
        assert answer.finish == ("length" if at is None else "stop")
        ended += at is not None
    assert 50 < ended < 395


@pytest.mark.parametrize(
    ("text", "wanted", "count"), [("ab", "bc", 1), ("aa", "aab", 2), ("ab", "c", 0), ("", "ab", 0)]
)
def test_what_is_held_back(text: str, wanted: str, count: int):
    assert held_back(text, wanted) == count


@pytest.mark.parametrize("thinks", [False, True])
def test_another_models_parts_are_what_its_template_reads(thinks: bool):
    """Its end of reasoning is text, and spaces around the reasoning go."""
    template = Template("", ("<end>",), ("chat", "high"), TINY, None)
    speaks: Any = SimpleNamespace(encoding=template, tokenizer=TINY, end_ids=(1,))
    pieces = [" ", "\n", THINK, "<thi", "nk>", END_THINK, "</th", "ink>", "a", " b", "<", "\n\n", "é"]
    for seed in range(600):
        rng = random.Random(seed)
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(10)))
        ids, answer, deltas = encode_plain(TINY, text), Answer(speaks, Job([], thinks=thinks), ()), []
        while answer.finish is None:
            new, ids = ids[: (n := rng.choice([1, 2, 5]))], ids[n:]
            deltas += answer.feed(np.array(new, np.int32), None if ids else "length")
        message, _ = template.parse_tolerant(text, "high" if thinks else "chat")
        assert joined(deltas, "reasoning_content") == message["reasoning_content"], text
        assert joined(deltas, "content") == message["content"], text
