"""Instructions whose following can be verified: IFEval's 25 (arXiv 2311.07911), by checkers of our own.

A problem's entry has them as IFEval's data does: `instruction_id_list` and `kwargs`, one object of arguments for each.
A checker is a function of the response's content and those arguments, and decides by the instruction's own sentence
(our choice): a word may hold an apostrophe or a hyphen, a keyword is a whole word, JSON is an object or a list.
"""

import json
import re
from collections.abc import Callable
from typing import Any

from . import language as languages
from .answers import bounded
from .problem import Problem, Response, Score

_TOKEN = re.compile(r"\w+(?:[-'’]\w+)*")
_SENTENCE = re.compile(r"[.!?。！？]+(?=[\s\"'”’)*_]|$)|\n\s*\n")
_BULLET = re.compile(r"^[ \t]*(?:\*(?!\*)|-(?!-)|•)[ \t]+\S", re.MULTILINE)
_HIGHLIGHT = re.compile(r"(?<!\*)\*(?!\*)([^\n*]+)\*(?!\*)|\*\*([^\n*]+)\*\*")
_RULE = re.compile(r"^[ \t]*\*\*\*[ \t]*$", re.MULTILINE)


def instruction(trajectory: Response, problem: Problem, *, partial: bool = False) -> Score:
    """1 if the content follows every instruction of the problem, else 0; with `partial`, the share that it follows."""
    content = trajectory.content
    if content is None:
        return Score(0.0, False, note="no content to grade")
    bounded(content)
    names, arguments = problem.entry["instruction_id_list"], problem.entry["kwargs"]
    failed = [name for name, given in zip(names, arguments, strict=True) if not follows(content, name, given)]
    value = 1.0 - len(failed) / len(names) if names else 0.0
    return Score(
        value if partial else float(value == 1.0),
        value == 1.0,
        note=f"not followed: {', '.join(failed)}"[:200] if failed else "" if names else "no instructions",
    )


def follows(content: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether a text follows one instruction. Raises: ValueError for an unknown one, TypeError for wrong arguments."""
    if name not in CHECKERS:
        raise ValueError(f"no instruction {name!r}; there are {', '.join(CHECKERS)}")
    return bool(content.strip()) and CHECKERS[name](
        content.strip(), **{key: value for key, value in arguments.items() if value is not None}
    )


def _counts(count: int, relation: str, wanted: int) -> bool:
    match relation:
        case "at least":
            return count >= wanted
        case "less than":
            return count < wanted
    raise ValueError(f'a relation is "at least" or "less than", not {relation!r}')


def _occurrences(text: str, keyword: str) -> int:
    """Whole words, upper and lower case alike."""
    return len(re.findall(rf"(?<!\w){re.escape(keyword)}(?!\w)", text, re.IGNORECASE))


def _paragraphs(text: str) -> list[str]:
    return [part.strip() for part in re.split(r"\n[ \t]*\n", text) if part.strip()]


def _sentences(text: str) -> int:
    return sum(bool(_TOKEN.search(part)) for part in _SENTENCE.split(text))


def _first_word(text: str) -> str:
    match = _TOKEN.search(text)
    return match[0].lower() if match else ""


def _is_json(text: str) -> bool:
    inner = re.sub(r"^```(?:json)?[ \t]*\n|\n?```$", "", text, flags=re.IGNORECASE)
    try:
        return isinstance(json.loads(inner), dict | list)
    except (ValueError, RecursionError):
        return False


def _unquoted(text: str) -> str:
    return text.rstrip().rstrip("\"'”’*").lower()


def _sections(text: str, word: str, count: int) -> bool:
    found = re.findall(rf"^[\s*#]*{re.escape(word)}\s*(\d+)", text, re.MULTILINE | re.IGNORECASE)
    return len(found) >= count


def _postscript(text: str, marker: str) -> bool:
    letters = r"\.?\s*".join(map(re.escape, re.sub(r"[\s.]", "", marker)))
    return re.search(rf"^\s*{letters}\.?.*\w", text, re.MULTILINE | re.IGNORECASE) is not None


def _nth_paragraph(text: str, count: int, place: int, word: str) -> bool:
    paragraphs = _paragraphs(text)
    return len(paragraphs) == count and place <= count and _first_word(paragraphs[place - 1]) == word.lower()


def _two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _rules(text: str, count: int) -> bool:
    parts = [part.strip() for part in _RULE.split(text)]
    return len(parts) == count and all(parts)


def _quoted(text: str) -> bool:
    return len(text) > 2 and (text[0], text[-1]) in {('"', '"'), ("“", "”")}


CHECKERS: dict[str, Callable[..., bool]] = {
    "keywords:existence": lambda text, keywords: all(_occurrences(text, word) for word in keywords),
    "keywords:forbidden_words": lambda text, forbidden_words: not any(_occurrences(text, w) for w in forbidden_words),
    "keywords:frequency": lambda text, keyword, frequency, relation: _counts(
        _occurrences(text, keyword), relation, frequency
    ),
    "keywords:letter_frequency": lambda text, letter, let_frequency, let_relation: _counts(
        text.lower().count(letter.lower()), let_relation, let_frequency
    ),
    "language:response_language": lambda text, language: languages.detect(text) == language,
    "length_constraints:number_words": lambda text, num_words, relation: _counts(
        len(_TOKEN.findall(text)), relation, num_words
    ),
    "length_constraints:number_sentences": lambda text, num_sentences, relation: _counts(
        _sentences(text), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda text, num_paragraphs: _rules(text, num_paragraphs),
    "length_constraints:nth_paragraph_first_word": lambda text, num_paragraphs, nth_paragraph, first_word: (
        _nth_paragraph(text, num_paragraphs, nth_paragraph, first_word)
    ),
    "detectable_content:number_placeholders": lambda text, num_placeholders: (
        len(re.findall(r"\[[^\[\]\n]+\]", text)) >= num_placeholders
    ),
    "detectable_content:postscript": lambda text, postscript_marker: _postscript(text, postscript_marker),
    "detectable_format:number_bullet_lists": lambda text, num_bullets: len(_BULLET.findall(text)) == num_bullets,
    "detectable_format:constrained_response": lambda text: (
        text.strip(" *\"'") in {f"My answer is {said}." for said in ("yes", "no", "maybe")}
    ),
    "detectable_format:number_highlighted_sections": lambda text, num_highlights: (
        sum(bool((one or two).strip()) for one, two in _HIGHLIGHT.findall(text)) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda text, section_spliter, num_sections: _sections(
        text, section_spliter, num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda text: re.search(r"<<[^\n<>]*[^\s<>][^\n<>]*>>", text) is not None,
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": lambda text, prompt_to_repeat: (
        text.lower().startswith(prompt_to_repeat.strip().lower()) and len(text) > len(prompt_to_repeat.strip())
    ),
    "startend:end_checker": lambda text, end_phrase: _unquoted(text).endswith(_unquoted(end_phrase)),
    "startend:quotation": _quoted,
    "change_case:capital_word_frequency": lambda text, capital_frequency, capital_relation: _counts(
        sum(word.isupper() for word in _TOKEN.findall(text)), capital_relation, capital_frequency
    ),
    "change_case:english_capital": lambda text: text.isupper() and languages.detect(text) == "en",
    "change_case:english_lowercase": lambda text: text.islower() and languages.detect(text) == "en",
    "punctuation:no_comma": lambda text: not set(text) & set(",，、،"),
}
