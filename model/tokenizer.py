"""The tokenizer: DeepSeek-V4's special tokens around a vocabulary of bytes and whole words.

The vocabulary is our choice (V4's own has 129,280 entries): every byte is a token, and so is each whole word
of a closed list, together with the space before it (" following"). A pre-token is a run of letters or a
punctuation mark, either with the space before it, or a digit, a white-space character, `<answer>` or
`</answer>`. One that is on the list becomes that token; everything else is spelled byte by byte. So the fixed
wording of a task is short, while spelling and arithmetic see single characters. There are no merges: a word's
spelling never depends on its neighbors. An argument that happens to be on the list ("Spell this word
backward: word") is one token too.

Ids: the special tokens from 0 (BOS 0, EOS 1, as in V4), then the 256 bytes in order, then the words. All here
uses the `tokenizers` library alone.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from ..errors import UserError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"
REMINDER = "<｜latest_reminder｜>"
THINK = "<think>"
END_THINK = "</think>"
DSML = "｜DSML｜"
TASKS = ("action", "query", "authority", "domain", "title", "read_url", "extracted_url")
SPECIALS = (BOS, EOS, USER, ASSISTANT, REMINDER, THINK, END_THINK, DSML, *(f"<｜{task}｜>" for task in TASKS))

_PIECES = r"</?answer>| ?\p{L}+|\p{N}| ?(?!</?answer>)[^\s\p{L}\p{N}]|\s"


@cache
def _byte_symbols() -> tuple[str, ...]:
    """The character that stands for each byte in a byte-level vocabulary: itself if printable."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(others)) for byte in range(256))


def build(words: Iterable[str]) -> Tokenizer:
    """The tokenizer whose whole words are `words` (each one exactly one pre-token of two bytes or more).

    ValueError where a word could never be produced or would stand in the vocabulary twice.
    """
    symbols = _byte_symbols()
    vocabulary = {special: i for i, special in enumerate(SPECIALS)}
    vocabulary |= {symbol: len(SPECIALS) + byte for byte, symbol in enumerate(symbols)}
    for word in words:
        token = "".join(symbols[byte] for byte in word.encode())
        if token in vocabulary or split(word) != [word]:
            raise ValueError(f"{word!r} cannot be a word; want one pre-token that is not yet a token")
        vocabulary[token] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [_splitter(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # As in V4, only BOS and EOS are `special`: decoding with skip_special_tokens keeps `</think>`.
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (BOS, EOS)])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in SPECIALS[2:]])
    return tokenizer


def _splitter() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(Regex(_PIECES), "isolated")


def split(text: str) -> list[str]:
    """The pre-tokens of a text; they join to the text."""
    return [piece for piece, _ in _splitter().pre_tokenize_str(text)]


def collect_words(texts: Mapping[str, Iterable[str]], limit: int, share: float = 0.2) -> list[str]:
    """The closed list: at most `limit` pre-tokens that stand in more than `share` of the texts of one task.

    `texts` maps a task to a sample of its texts. A word in so many of them belongs to the wording, and not to
    an argument. A single letter is never on the list, so that it is the same token wherever it stands. If
    there are more than `limit` words, those stay that save the most bytes over all tasks. Sorted.
    """
    saved: dict[str, float] = {}
    for sample in texts.values():
        pieces = [Counter(split(text)) for text in sample]
        uses, holders = Counter[str](), Counter[str]()
        for counts in pieces:
            uses.update(counts)
            holders.update(counts.keys())
        for word, held in holders.items():
            if held > share * len(pieces) and not _is_single(word):
                saved[word] = saved.get(word, 0) + (len(word.encode()) - 1) * uses[word] / len(pieces)
    return sorted(sorted(saved, key=lambda word: (-saved[word], word))[:limit])


def _is_single(word: str) -> bool:
    return len(word.encode()) == 1 or (len(word.strip()) == 1 and word.strip().isalpha())


def encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of `text` as ordinary text: no special token, even where it holds a special token's string.

    Works for any byte-level tokenizer. In V4's own, most of these tokens are not flagged special, so the
    libraries' switches for special tokens in user text let them through; here each such string is cut after
    its first character, and the parts are encoded on their own. ValueError where that cannot help.
    """
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder()
    if added.keys().isdisjoint(ids):
        return ids
    parts = _cuts(tuple(sorted(token.content for token in added.values()))).split(text)
    ids = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False).ids]
    if not added.keys().isdisjoint(ids):
        raise ValueError("the tokenizer has an added token that cannot be spelled as ordinary text")
    return ids


@cache
def _cuts(strings: tuple[str, ...]) -> re.Pattern[str]:
    """Matches the empty place after the first character of each string; grouped by that character, for speed."""
    rests: dict[str, list[str]] = {}
    for string in strings:
        rests.setdefault(string[0], []).append(re.escape(string[1:]))
    return re.compile("|".join(f"(?<={re.escape(first)})(?={'|'.join(rests[first])})" for first in rests))


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, "utf-8")


def load(folder: str | Path) -> Tokenizer:
    """The tokenizer of a checkpoint's folder, with V4's special tokens checked. UserError names the file."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"{path}: no such file; a checkpoint's folder holds its tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception for anything it cannot read
        raise UserError(f"{path}: not a tokenizer of the `tokenizers` library: {error}") from error
    check_specials(tokenizer, str(path))
    return tokenizer


def check_specials(tokenizer: Tokenizer, where: str = "tokenizer") -> None:
    """UserError unless each of V4's special tokens is exactly one id of its own."""
    missing = []
    for special in SPECIALS:
        token = tokenizer.token_to_id(special)
        if token is None or tokenizer.encode(special, add_special_tokens=False).ids != [token]:
            missing.append(special)
    if missing:
        raise UserError(f"{where}: special tokens missing: {' '.join(missing)}; each must be one token")
