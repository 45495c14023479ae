"""The training corpus: documents by counter, held-out questions, styles, reasonings, drills, packed files."""

import json
import re
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest

from amalgam.errors import UserError
from amalgam.model import tokenizer
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import ASSISTANT, BOS, END_THINK, EOS, THINK, USER
from amalgam.pipelines import corpus

PRESET = Path(corpus.__file__).parents[1] / "model" / "presets" / "tiny"
SAMPLE = list(corpus.documents(seed=7, start=0, count=1500, heldout=()))
DRILL = re.compile(r"(Copy|Repeat|Reverse( the list)?|Backward|Spell|Join|In (a|de)scending order): ")


def asked(text: str) -> str:
    """What the user says in a document in chat format."""
    return text.split(USER)[1].split(ASSISTANT)[0]


def questions(texts: list[str]) -> set[str]:
    """The tasks' questions of the documents in chat format."""
    return {asked(text) for text in texts if USER in text and not DRILL.match(asked(text))}


def holding(texts: list[str], heldout: set[str]) -> list[int]:
    """The indices of the texts that hold a question, whole, in any style."""
    styles = ("Question: {}\n", "Q: {}\n", "\n\n{}\n", BOS + "{}\n")
    needles = [style.format(question.strip()) for question in heldout for style in styles]
    needles += [USER + question + ASSISTANT for question in heldout]
    return [i for i, text in enumerate(texts) if any(needle in text for needle in needles)]


def test_a_document_depends_on_seed_and_index_alone():
    assert list(corpus.documents(7, 400, 50, ())) == SAMPLE[400:450]
    assert list(corpus.documents(8, 400, 50, ())) != SAMPLE[400:450]
    assert len(set(SAMPLE)) > 0.98 * len(SAMPLE)


def test_no_held_out_question_is_in_any_document():
    rng = Random(1)
    drawn = {corpus.problem(rng, task, frozenset())["question"] for task in corpus.TASKS for _ in range(20)}
    heldout = drawn | questions(SAMPLE)
    there = holding(SAMPLE, heldout)
    assert len(there) > 300 and len({SAMPLE[i].split()[0] for i in there}) >= 4
    without = list(corpus.documents(7, 0, len(SAMPLE), heldout))
    assert not holding(without, heldout)
    assert all(without[i] == SAMPLE[i] for i in range(len(SAMPLE)) if i not in there)


def test_a_task_that_is_held_out_whole_says_so(monkeypatch):
    monkeypatch.setitem(corpus.TASKS, "count_bits", [{"min_n": 5, "max_n": 5}])
    corpus._generator.cache_clear()
    question = corpus.problem(Random(0), "count_bits", frozenset())["question"]
    with pytest.raises(UserError, match="count_bits: 1000 draws in a row are held out"):
        corpus.problem(Random(0), "count_bits", frozenset([question]))
    corpus._generator.cache_clear()


def test_documents_are_whole_and_chat_ones_parse():
    assert all(text.startswith(BOS) and text.endswith(EOS) and text.count(EOS) == 1 for text in SAMPLE)
    chat = [text for text in SAMPLE if USER in text]
    for text in chat:
        mode = "high" if THINK in text else "chat"
        message = Encoding.default().parse(text.split(THINK if mode == "high" else END_THINK, 1)[1], mode)
        assert message["content"].startswith("<answer>") and message["content"].endswith("</answer>")
        assert bool(message["reasoning_content"]) == (mode == "high")
    drills = [text for text in chat if DRILL.match(asked(text))]
    assert 0 < len(drills) < corpus.DRILL_CHAT_SHARE * corpus.DRILL_SHARE * len(SAMPLE)
    problems = (1 - corpus.DRILL_SHARE) * len(SAMPLE)
    assert 0.25 < (len(chat) - len(drills)) / problems < 0.45
    assert 0.05 < sum(THINK in text for text in chat) / problems < 0.15


def test_a_drill_as_a_turn_of_chat_asks_for_its_last_part(monkeypatch):
    plain = [text for text in SAMPLE if DRILL.match(text.removeprefix(BOS))]
    monkeypatch.setattr(corpus, "DRILL_CHAT_SHARE", 1.0)
    chat = dict(zip(SAMPLE, corpus.documents(7, 0, len(SAMPLE), ()), strict=True))
    assert len(plain) > 50
    for text in plain:
        question, answer = text.removeprefix(BOS).removesuffix(EOS).split("\n")[0].rsplit(" -> ", 1)
        assert chat[text] == f"{BOS}{USER}{question}{ASSISTANT}{END_THINK}<answer>{answer}</answer>{EOS}"


def test_the_quickstarts_tasks_are_there_at_their_easiest_alone():
    text = "\n".join(SAMPLE)
    sums = re.findall(r"arithmetic problem: (.*) =", text)
    words = re.findall(r"Spell this word backward \(example: sun -> nus\): (\w+)", text)
    assert len(sums) > 20 and all(re.fullmatch(r"\d [+-] \d", expression) for expression in sums)
    assert len(words) > 20 and {len(word) for word in words} == {3, 4, 5, 6}


def test_every_task_and_drill_is_in_the_mixture():
    text = "".join(SAMPLE)
    assert all(first in text for first in ("State the final", "Solve the following mult", "Spell this word"))
    rng = Random(0)
    for task, levels in corpus.TASKS.items():
        lengths = [len(corpus.problem(rng, task, frozenset())["question"]) for _ in range(20 * len(levels))]
        assert np.mean(lengths) < 400, task
    lines = [drill(rng) for drill in corpus.DRILLS for _ in range(200)]
    assert not [line for line in lines if "\n" in line or "{" in line]


def test_drills_of_sums_and_words_are_right():
    rng = Random(0)
    for _ in range(300):
        left, right = re.sub(r"The sum (.*) is (.*)\.", r"\1 = \2", corpus._drill_sums(rng)).split(" = ")
        assert eval(left) == eval(right)
    for _ in range(600):
        kind, _, line = corpus._drill_words(rng).partition(": ")
        word, *parts = line.split(" -> ")
        spelled, backward = "-".join(word), word[::-1]
        right = {
            "Copy": [word],
            "Repeat": [f"{word} {word} {word}"],
            "Reverse": [backward],
            "Backward": [backward],
            "Spell": [spelled, "-".join(backward), backward][: len(parts)],
            "Join": [word.replace("-", "")],
        }
        assert not parts or (parts == right[kind] and len(word.replace("-", "")) <= 8)


def test_shares_sum_to_one():
    assert sum(corpus.STYLE_SHARES.values()) == pytest.approx(1)
    assert sum(corpus.DRILLS.values()) == pytest.approx(1)


def test_reasonings_are_exact():
    exact = {
        "products": ({"expression": "23 * 45"}, "23 * 40 = 920\n23 * 5 = 115\n920 + 115 = 1035"),
        "gcd": ({"numbers": [8, 12]}, "12 = 1 * 8 + 4\n8 = 2 * 4 + 0\nthe last divisor is 4"),
        "letter_counting": ({"target_letter": "t", "span": ["To", "it"]}, "T-o: 1\ni-t: 2"),
        "word_sequence_reversal": ({"words": ["a", "b"]}, "2. b\n1. a"),
    }
    assert corpus.REASONING.keys() == exact.keys()
    for task, (metadata, text) in exact.items():
        assert corpus.REASONING[task]({"metadata": metadata}) == text


@pytest.mark.parametrize("task", corpus.REASONING)
def test_a_reasoning_leads_to_the_answer(task: str):
    rng = Random(3)
    for _ in range(50):
        entry = corpus.problem(rng, task, frozenset())
        lines = corpus.REASONING[task](entry).split("\n")
        if task == "word_sequence_reversal":
            assert ", ".join(line.split(". ", 1)[1] for line in lines) == entry["answer"]
        else:
            assert lines[-1].split()[-1] == entry["answer"]


def test_the_presets_tokenizer_is_what_the_wordings_give():
    built = corpus.build_tokenizer()
    assert built.get_vocab_size() == 512
    assert built.to_str() == tokenizer.load(PRESET).to_str()
    with pytest.raises(ValueError, match="too few for 4096 entries"):
        corpus.build_tokenizer(4096)


def test_processes_make_the_same_corpus(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "CHUNK", 400)
    preset = tokenizer.load(PRESET)
    tokens, cu_seqlens = corpus.encode(preset, SAMPLE[:500])
    built = corpus.build_corpus(preset, 7, 500, frozenset(), processes=1)
    assert (built[0].dtype, built[1].dtype) == (np.uint16, np.int64)
    np.testing.assert_array_equal(built[0], tokens)
    np.testing.assert_array_equal(built[1], cu_seqlens)
    last = tokens[cu_seqlens[-2] :]
    assert preset.decode(last.tolist(), skip_special_tokens=False) == SAMPLE[499]
    corpus.save_corpus(tmp_path / "c", tokens, cu_seqlens)
    loaded = corpus.load_corpus(tmp_path / "c")
    np.testing.assert_array_equal(loaded[0], tokens)
    np.testing.assert_array_equal(loaded[1], cu_seqlens)


def test_bad_packed_files_are_refused(tmp_path: Path):
    path = tmp_path / "c"
    with pytest.raises(UserError, match="FileNotFoundError"):
        corpus.load_corpus(path)
    path.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    with pytest.raises(UserError, match="SafetensorError"):
        corpus.load_corpus(path)
    tokens = np.zeros(5, np.uint16)
    for ends in ([0, 4], [1, 5], [0, 3, 3, 5], []):
        corpus.save_corpus(path, tokens, np.array(ends, np.int64))
        with pytest.raises(UserError, match="rise from 0 to T"):
            corpus.load_corpus(path)
    corpus.save_corpus(path, tokens.astype(np.int64), np.array([0, 5]))
    with pytest.raises(UserError, match="tokens uint16"):
        corpus.load_corpus(path)


def run_command(monkeypatch, documents: int, heldout: Path, out: Path) -> None:
    arguments = [f"--documents={documents}", "--seed=7", f"--heldout={heldout}", f"--out={out}"]
    monkeypatch.setattr(sys, "argv", ["corpus", *arguments])
    corpus.main()


def test_command_writes_a_corpus(tmp_path: Path, monkeypatch, capsys):
    heldout, out = tmp_path / "heldout.json", tmp_path / "corpus.safetensors"
    heldout.write_text(json.dumps(sorted(questions(SAMPLE[:20]))))
    run_command(monkeypatch, 20, heldout, out)
    tokens, cu_seqlens = corpus.load_corpus(out)
    assert capsys.readouterr().out == f"{out}: 20 documents, {len(tokens):,} tokens\n"
    texts = list(corpus.documents(7, 0, 20, questions(SAMPLE[:20])))
    assert texts != SAMPLE[:20]
    expected = corpus.encode(tokenizer.load(PRESET), texts)
    np.testing.assert_array_equal(tokens, expected[0])
    np.testing.assert_array_equal(cu_seqlens, expected[1])


@pytest.mark.parametrize(
    ("text", "documents", "error"),
    [
        (None, 20, "No such file or directory"),
        ("[1", 20, "want a JSON list of questions"),
        ('{"a": 1}', 20, "want a JSON list of questions"),
        ("[1]", 20, "want a JSON list of questions"),
        ("[]", 0, "want at least 1 document"),
    ],
)
def test_command_refuses_bad_input(tmp_path, monkeypatch, capsys, text: str | None, documents: int, error: str):
    heldout, out = tmp_path / "heldout.json", tmp_path / "corpus.safetensors"
    if text is not None:
        heldout.write_text(text)
    with pytest.raises(SystemExit, match="2"):
        run_command(monkeypatch, documents, heldout, out)
    assert error in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
