"""The base model's training text: a broad mixture of reasoning-gym tasks and procedural drills.

Document i of a seed is a function of (seed, i, held-out questions) alone, so any part of the corpus can be
made anywhere, in any order. A task's question that is held out is drawn again before it is rendered, whatever
the style. The mixture, its shares and its wordings are our choice.

What the base sees of the quickstart's tasks, in their own wording with the answers: chain_sum with two
1-digit terms, spell_backward with words of 3 to 6 letters. Sums of 2-digit terms it sees in other wordings
(drills, basic_arithmetic), made-up words of up to 8 letters reversed as drills, longer ones reversed never.
Only the questions that the caller names are held out; those that another recipe holds out may be here.

    python -m amalgam.pipelines.corpus --documents 99999 --seed 0 --heldout QUESTIONS.json --out FILE

writes packed token ids (safetensors) for a machine without reasoning-gym; QUESTIONS.json is a list of the
held-out questions.
"""

import argparse
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer

from ..errors import UserError
from ..model.encoding import Encoding
from ..model.tokenizer import BOS, EOS, SPECIALS, build, collect_words, load
from ..rewards.domains import RANGES, make_dataset

DRILL_SHARE = 0.45  # of the documents; the others hold problems
DRILL_CHAT_SHARE = 0.1  # of those whose first drill is "X -> Y": one turn of chat, X asked and Y answered
STYLE_SHARES = {  # of the documents with problems; the first three are plain text
    "Question: {question}\nAnswer: {answer}": 0.25,
    "Q: {question}\nA: {answer}": 0.2,
    "{question}\n{answer}": 0.2,
    "chat": 0.25,  # one turn in V4's chat format, the answer in <answer> tags
    "high": 0.1,  # the same with reasoning, for the tasks in REASONING
}
MAX_PROBLEMS = 3  # of one task, in one plain document: 1 to this many, evenly

# reasoning-gym's tasks that have short prompts and take well under a millisecond, at one or two difficulties.
TASKS: dict[str, list[dict[str, Any]]] = {
    # The quickstart's two at their easiest: its base knows their wording, and the rest is its experts' work.
    "chain_sum": [{"max_terms": 2, "max_digits": 1}],
    "spell_backward": [{"max_word_len": 6}],
    "products": [{"max_digits": 1}, {"max_digits": 2}],
    "basic_arithmetic": [{"max_terms": 3, "max_digits": 2, "allow_negation": False}],
    "gcd": [{"max_value": 20}, {"max_value": 100}],
    "lcm": [{"max_value": 12}, {"max_value": 30}],
    "prime_factorization": [{"max_value": 50}, {"max_value": 500}],
    "fraction_simplification": [{"max_value": 20, "max_factor": 10, "styles": ("plain",)}],
    "complex_arithmetic": [{"operations_weights": [0.45, 0.45, 0.1, 0.0]}],
    "simple_equations": [{"max_terms": 2, "max_value": 20}],
    "number_sequence": [{"min_value": -20, "max_value": 20, "max_complexity": 1}, {"max_complexity": 2}],
    "number_filtering": [{"max_numbers": 5, "max_decimals": 0}],
    "base_conversion": [{"max_base": 10, "max_value": 100}, {"max_value": 255}],
    "count_bits": [{"max_n": 63}, {"max_n": 1023}],
    "syllogism": [{}],
    "letter_counting": [{"min_words": 1, "max_words": 3}, {"min_words": 3, "max_words": 8}],
    "word_sorting": [{"min_words": 2, "max_words": 3}, {"min_words": 3, "max_words": 5}],
    "caesar_cipher": [{"min_words": 1, "max_words": 6, "max_rotation": 3}, {"min_words": 1, "max_words": 8}],
    "word_sequence_reversal": [{"min_words": 2, "max_words": 4}, {"min_words": 3, "max_words": 6}],
    "sentence_reordering": [{"min_words_in_sentence": 3, "max_words_in_sentence": 6}],
}

CHUNK = 4096  # documents of one piece of work
CHUNK_SECONDS = 600
REDRAWS = 1000


def documents(seed: int, start: int, count: int, heldout: Collection[str]) -> Iterator[str]:
    """`count` documents of a seed from `start` on, from BOS to EOS, none with a question of `heldout`."""
    questions = frozenset(heldout)
    for index in range(start, start + count):
        yield document(seed, index, questions)


def document(seed: int, index: int, heldout: frozenset[str]) -> str:
    """Document `index` of a seed: drills of one kind or problems of one task, a few as text or one as chat."""
    rng = Random(f"{seed}/{index}")
    if rng.random() < DRILL_SHARE:
        drill = rng.choices(list(DRILLS), list(DRILLS.values()))[0]
        lines = [drill(rng) for _ in range(rng.randint(1, 4))]
        question, arrow, answer = lines[0].rpartition(" -> ")
        if arrow and rng.random() < DRILL_CHAT_SHARE:
            return _turn(question, {"content": f"<answer>{answer}</answer>"}, "chat")
        return BOS + "\n".join(lines) + EOS
    style = rng.choices(list(STYLE_SHARES), list(STYLE_SHARES.values()))[0]
    task = rng.choice(list(REASONING if style == "high" else TASKS))
    if style in ("chat", "high"):
        entry = problem(rng, task, heldout)
        answer = {"content": f"<answer>{entry['answer']}</answer>"}
        if style == "high":
            answer["reasoning_content"] = REASONING[task](entry)
        return _turn(entry["question"], answer, style)
    entries = [problem(rng, task, heldout) for _ in range(rng.randint(1, MAX_PROBLEMS))]
    return BOS + "\n\n".join(style.format(**{**e, "question": e["question"].strip()}) for e in entries) + EOS


def _turn(question: str, answer: dict[str, str], mode: str) -> str:
    return Encoding.default().encode([{"role": "user", "content": question}, {"role": "assistant", **answer}], mode)


def problem(rng: Random, task: str, heldout: frozenset[str]) -> dict[str, Any]:
    """A problem of the task at one of its difficulties, as reasoning-gym's entry, that is not held out."""
    for _ in range(REDRAWS):
        generator = _generator(task, rng.randrange(len(TASKS[task])))
        entry = generator[rng.randrange(*RANGES["corpus"])]
        if entry["question"] not in heldout and entry["question"].strip() not in heldout:
            return entry
    raise UserError(f"corpus: {task}: {REDRAWS} draws in a row are held out; hold out fewer or widen TASKS")


@cache
def _generator(task: str, level: int) -> Any:
    return make_dataset(task, TASKS[task][level], seed=0, size=1)


# --- reasoning, for the tasks where a short one is easy to write: reasoning-gym's entry -> text


def _reason_product(entry: dict[str, Any]) -> str:
    a, b = (int(factor) for factor in entry["metadata"]["expression"].split(" * "))
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(b)))]
    steps = [f"{a} * {part} = {a * part}" for part in reversed(parts)]
    return "\n".join([*steps, " + ".join(str(a * part) for part in reversed(parts)) + f" = {a * b}"])


def _reason_gcd(entry: dict[str, Any]) -> str:
    a, b = sorted(entry["metadata"]["numbers"], reverse=True)
    lines = []
    while b:
        lines.append(f"{a} = {a // b} * {b} + {a % b}")
        a, b = b, a % b
    return "\n".join([*lines, f"the last divisor is {a}"])


def _reason_letters(entry: dict[str, Any]) -> str:
    letter, total, lines = entry["metadata"]["target_letter"], 0, []
    for word in entry["metadata"]["span"]:
        total += word.lower().count(letter)
        lines.append(f"{'-'.join(word)}: {total}")
    return "\n".join(lines)


def _reason_reversal(entry: dict[str, Any]) -> str:
    words = entry["metadata"]["words"]
    return "\n".join(f"{i}. {words[i - 1]}" for i in range(len(words), 0, -1))


REASONING: dict[str, Callable[[dict[str, Any]], str]] = {
    "products": _reason_product,
    "gcd": _reason_gcd,
    "letter_counting": _reason_letters,
    "word_sequence_reversal": _reason_reversal,
}

# --- drills: one line of procedural text each; the words they spell are random letters, English only by chance

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
_PEOPLE = "Anna Ben Clara David Emma Felix Grace Henry".split()
_THINGS = (
    "apple bag ball bell bird boat book bottle bowl box bread chair clock cloud coat coin cup desk door field "
    "fish flower garden glass hat house key lamp leaf letter map moon mountain paper pen picture ring river "
    "road rope ship shoe spoon star stone street table train tree wall watch wheel window".split()
)
_COLORS = "black blue brown gray green red white yellow".split()
_SIZES = "big small old new".split()
_VERBS = "sees takes finds likes holds sells".split()

_WORD_LINES = (
    "Copy: {word} -> {word}",
    "Repeat: {word} -> {word} {word} {word}",
    "Reverse: {word} -> {backward}",
    "Reverse: {spelled} -> {spelled_backward}",
    "Backward: {word} -> {backward}",
    "Spell: {word} -> {spelled}",
    "Spell: {word} -> {spelled} -> {spelled_backward} -> {backward}",
    "Join: {spelled} -> {word}",
    "The word {word} has {size} letters.",
    "Letter {place} of {word} is {letter}.",
    "The letter {letter} appears {times} times in {word}.",
)
_LIST_LINES = (
    "Reverse the list: {items} -> {backward}",
    "In ascending order: {items} -> {ascending}",
    "In descending order: {items} -> {descending}",
    "The first of {items} is {first}.",
    "The last of {items} is {last}.",
    "The list {items} has {size} items.",
)
_NUMBER_LINES = (
    "{high} is greater than {low}.",
    "{low} is smaller than {high}.",
    "Which is greater, {a} or {b}? {high}",
    "{after} comes after {a}.",
    "The number {name} is {small}.",
)
_SUM_LINES = ("{expression} = {value}", "The sum {expression} is {value}.", "{value} = {expression}")
_SENTENCES = ("{who} {verb} {what}.", "{who} {verb} {what}. Who {verb} {what}? {who}.")


def _made_up(rng: Random, longest: int) -> str:
    return "".join(rng.choices(_LETTERS, k=rng.randint(1, longest)))


def _drill_words(rng: Random) -> str:
    word = _made_up(rng, 8)
    place = rng.randrange(len(word))
    return rng.choice(_WORD_LINES).format(
        word=word,
        backward=word[::-1],
        spelled="-".join(word),
        spelled_backward="-".join(reversed(word)),
        size=len(word),
        place=place + 1,
        letter=word[place],
        times=word.count(word[place]),
    )


def _drill_lists(rng: Random) -> str:
    size = rng.randint(2, 5)
    words = [_made_up(rng, 4) for _ in range(size)]
    items: list[Any] = rng.choice((rng.sample(range(100), size), rng.sample(_LETTERS, size), words))
    ordered = sorted(items)
    lists = {"items": items, "backward": items[::-1], "ascending": ordered, "descending": ordered[::-1]}
    texts = {name: ", ".join(map(str, values)) for name, values in lists.items()}
    return rng.choice(_LIST_LINES).format(**texts, first=items[0], last=items[-1], size=size)


def _drill_numbers(rng: Random) -> str:
    a, b = rng.sample(range(10 ** rng.randint(1, 3) + 1), 2)
    small = rng.randrange(len(_NUMBERS))
    numbers = {"a": a, "b": b, "low": min(a, b), "high": max(a, b), "after": a + 1, "small": small}
    return rng.choice(_NUMBER_LINES).format(**numbers, name=_NUMBERS[small])


def _drill_sums(rng: Random) -> str:
    terms = [rng.randrange(10 ** rng.randint(1, 2)) for _ in range(rng.choice((2, 3)))]
    expression, value = str(terms[0]), terms[0]
    for term in terms[1:]:
        sign = rng.choice("+-")
        expression, value = f"{expression} {sign} {term}", value + (term if sign == "+" else -term)
    return rng.choice(_SUM_LINES).format(expression=expression, value=value)


def _drill_runs(rng: Random) -> str:
    start, step, size = rng.randint(-20, 200), rng.choice((1, 1, 1, 2, 3, 5, 10)), rng.randint(4, 12)
    first = rng.randrange(len(_LETTERS) - 4)
    run: list[Any] = rng.choice(
        (
            [start + step * i for i in range(size)],
            list(_LETTERS[first : first + size]),
            [_DAYS[(first + i) % 7] for i in range(size)],
        )
    )
    return rng.choice((" ", ", ")).join(map(str, run if rng.random() < 0.5 else run[::-1]))


def _drill_sentences(rng: Random) -> str:
    what = f"the {rng.choice(_SIZES)} {rng.choice(_COLORS)} {rng.choice(_THINGS)}"
    return rng.choice(_SENTENCES).format(who=rng.choice(_PEOPLE), verb=rng.choice(_VERBS), what=what)


DRILLS = {  # and their shares
    _drill_words: 0.25,
    _drill_sums: 0.4,
    _drill_lists: 0.1,
    _drill_numbers: 0.1,
    _drill_runs: 0.1,
    _drill_sentences: 0.05,
}

# --- the tokenizer, and packed files


def wordings(samples: int = 200) -> dict[str, list[str]]:
    """Texts by task, for the tokenizer's closed list: questions, reasonings, the words of drills and styles."""
    rng = Random("wordings")
    texts: dict[str, list[str]] = {}
    for task in TASKS:
        entries = [problem(rng, task, frozenset()) for _ in range(samples)]
        texts[task] = [entry["question"] for entry in entries]
        if task in REASONING:
            texts[f"{task} (reasoning)"] = [REASONING[task](entry) for entry in entries]
    lines = "\n".join([*_WORD_LINES, *_LIST_LINES, *_NUMBER_LINES, *_SUM_LINES, *_SENTENCES, *_PEOPLE])
    words = " ".join(_DAYS + _NUMBERS + _THINGS + _COLORS + _SIZES + _VERBS)
    texts["drills"] = [re.sub(r"{\w+}", "0", lines) + " " + words]
    texts["styles"] = ["Question: Answer: <answer></answer>"]
    return texts


def build_tokenizer(size: int = 512) -> Tokenizer:
    """The tiny preset's tokenizer of exactly `size` entries: special tokens, bytes and whole words."""
    words = collect_words(wordings(), size - len(SPECIALS) - 256)
    tokenizer = build(words)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the wordings have only {len(words)} whole words, too few for {size} entries")
    return tokenizer


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents: tokens uint16 [T], cu_seqlens int64 [B+1]. Special tokens are all of the format."""
    rows = [row.ids for row in tokenizer.encode_batch(list(texts), add_special_tokens=False)]
    return np.array(list(chain(*rows)), np.uint16), np.cumsum([0, *map(len, rows)], dtype=np.int64)


def build_corpus(
    tokenizer: Tokenizer,
    seed: int,
    count: int,
    heldout: Collection[str],
    processes: int = 2,
    check: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` documents of a seed, packed; any number of processes gives the same.

    `check` is called before each piece of `CHUNK` documents is awaited, and may raise to end it all.
    """
    if tokenizer.get_vocab_size() > 2**16 or count < 1:
        raise UserError("corpus: want at least 1 document, and a tokenizer of at most 65,536 entries")
    chunks = [(start, min(CHUNK, count - start)) for start in range(0, count, CHUNK)]
    shared = (tokenizer.to_str(), seed, frozenset(heldout))
    workers = min(processes, len(chunks))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_process, (shared,))
    try:
        jobs = [pool.submit(_chunk, *chunk) for chunk in chunks]
        parts = []
        for job in jobs:
            check()
            parts.append(job.result(CHUNK_SECONDS))
    except TimeoutError as error:
        raise TimeoutError(f"corpus: {CHUNK} documents were not ready after {CHUNK_SECONDS} s") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    lengths = np.concatenate([np.diff(cu_seqlens) for _, cu_seqlens in parts])
    return np.concatenate([tokens for tokens, _ in parts]), np.cumsum([0, *lengths], dtype=np.int64)


_shared: tuple[str, int, frozenset[str]]  # in a worker process: tokenizer, seed, held-out questions


def _start_process(shared: tuple[str, int, frozenset[str]]) -> None:
    global _shared
    _shared = shared
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _chunk(start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    tokenizer, seed, heldout = _shared
    return encode(Tokenizer.from_str(tokenizer), documents(seed, start, count, heldout))


def save_corpus(path: str | Path, tokens: np.ndarray, cu_seqlens: np.ndarray) -> None:
    """Write a packed corpus as safetensors, renamed into place."""
    beside = Path(f"{path}.new")
    save_file({"tokens": tokens, "cu_seqlens": cu_seqlens}, beside)
    beside.replace(path)


def load_corpus(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """tokens uint16 [T] and cu_seqlens int64 [B+1] of a packed corpus. UserError names the file."""
    try:
        tensors = load_file(path)
        tokens, cu_seqlens = tensors["tokens"], tensors["cu_seqlens"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path}: {error!r}; want safetensors with tokens and cu_seqlens") from error
    dtypes, shapes = (tokens.dtype, cu_seqlens.dtype), (tokens.ndim, cu_seqlens.ndim)
    ends = cu_seqlens[[0, -1]].tolist() if shapes == (1, 1) and len(cu_seqlens) else None
    if dtypes != (np.uint16, np.int64) or ends != [0, len(tokens)] or (np.diff(cu_seqlens) <= 0).any():
        raise UserError(f"{path}: want tokens uint16 [T], cu_seqlens int64 [B+1] that rise from 0 to T")
    return tokens, cu_seqlens


def _read_questions(path: Path) -> list[str]:
    try:
        questions = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; want a JSON list of questions") from error
    if not isinstance(questions, list) or not all(isinstance(question, str) for question in questions):
        raise UserError(f"{path}: want a JSON list of questions")
    return questions


def main() -> None:
    """Write a packed corpus in the ids of the tiny preset's tokenizer."""
    parser = argparse.ArgumentParser(prog="python -m amalgam.pipelines.corpus", description=main.__doc__)
    parser.add_argument("--documents", type=int, required=True, help="how many")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--heldout", type=Path, required=True, help="JSON list of questions to leave out")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    options = parser.parse_args()
    try:
        heldout = _read_questions(options.heldout)
        tokenizer = load(Path(__file__).parents[1] / "model" / "presets" / "tiny")
        tokens, cu_seqlens = build_corpus(tokenizer, options.seed, options.documents, heldout)
    except UserError as error:
        parser.error(str(error))
    save_corpus(options.out, tokens, cu_seqlens)
    print(f"{options.out}: {options.documents:,} documents, {len(tokens):,} tokens")


if __name__ == "__main__":
    main()
