"""Which language a text is in: by its letters' script, and among those of one script by frequent words.

Small on purpose. It tells scripts apart surely, and the languages listed here if the text has some sentences.
"""

import re
import unicodedata
from collections import Counter

# ISO 639-1 code -> the scripts that it is written in, as the first word of its letters' Unicode names.
SCRIPTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys("en de fr es it pt nl sv fi pl tr vi id ro cs sw".split(), ("LATIN",)),
    **dict.fromkeys("ru uk bg".split(), ("CYRILLIC",)),
    **dict.fromkeys("ar fa ur".split(), ("ARABIC",)),
    **dict.fromkeys("hi mr ne".split(), ("DEVANAGARI",)),
    "zh": ("CJK",),
    "ja": ("HIRAGANA", "KATAKANA", "CJK"),
    "ko": ("HANGUL",),
    "el": ("GREEK",),
    "he": ("HEBREW",),
    "th": ("THAI",),
    "bn": ("BENGALI",),
    "ta": ("TAMIL",),
    "te": ("TELUGU",),
    "kn": ("KANNADA",),
    "gu": ("GUJARATI",),
    "pa": ("GURMUKHI",),
    "ml": ("MALAYALAM",),
}
# Frequent words, few of them shared.
_WORDS = {
    "en": "the and of to is in that it was for with as are this be have not you",
    "de": "der die und das ist nicht ein eine zu den mit von auf für sich dem auch es wird",
    "fr": "le la les et des est une un que dans qui pour pas sur ce avec sont plus au",
    "es": "el la los las y que una es en por con para del se no su como más pero",
    "it": "il lo la gli e che di un una è per non con sono del della come più anche",
    "pt": "o os as e que um uma é não para com do da em por mais se como também",
    "nl": "de het een en van is dat niet op zijn voor met die te aan ook er maar",
    "sv": "och att det är som en på för med den av inte till ett har om jag",
    "fi": "ja on ei se että oli mutta kuin hän ovat tämä myös joka",
    "pl": "i w nie na się z że jest do to jak ale po co od przez",
    "tr": "ve bir bu için ile da de çok olarak daha gibi ama olan ne",
    "vi": "và là của có không được cho một những các này trong với người",
    "id": "dan yang di ini itu dengan untuk tidak dari dalam adalah akan pada",
    "ro": "și în de la nu este că o un pentru cu mai din care pe",
    "cs": "a se na je že to s v do jako ale by jsou která pro",
    "sw": "na ya wa kwa ni katika la za kuwa hii si cha",
    "ru": "и в не на что он как это но по из у за от же",
    "uk": "і в не на що він як це але з та до й від є ці",
    "bg": "и в не на че той като това но за от да се с е",
    "ar": "في من على أن إلى هذا التي ما لا مع هو كان",
    "fa": "در و به از که این را با است برای آن می",
    "ur": "کے میں کی ہے اور سے کا کو پر نے کہ یہ",
    "hi": "के में है की और से का को पर ने कि यह हैं",
    "mr": "आणि आहे या तो ही हे च्या होते मध्ये आहेत",
    "ne": "छ र को मा हो यो पनि गरेको छन् थियो",
}  # fmt: skip
_FREQUENT = {code: frozenset(words.split()) for code, words in _WORDS.items()}
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def words(text: str) -> list[str]:
    """The words that are made of letters, combining marks within them."""
    joined = "".join("a" if unicodedata.category(letter) in ("Mn", "Mc") else letter for letter in text)
    return [text[match.start() : match.end()] for match in _WORD.finditer(joined)]


def script(word: str) -> str:
    """The script of a word's first letter: "LATIN", "CJK" ..."""
    return unicodedata.name(word[0], "UNKNOWN").split()[0]


def share(text: str, code: str) -> float:
    """The share of a text's words in the scripts of a language; 1 where there are no words."""
    if code not in SCRIPTS:
        raise ValueError(f"no language {code!r} is known; there are {', '.join(sorted(SCRIPTS))}")
    found = [script(word) for word in words(text)]
    return sum(each in SCRIPTS[code] for each in found) / len(found) if found else 1.0


def detect(text: str) -> str | None:
    """The ISO 639-1 code of a text's language, or None for a text without words or in an unknown script."""
    found = words(text)
    scripts = Counter(script(word) for word in found)
    if not scripts:
        return None
    if scripts["HIRAGANA"] + scripts["KATAKANA"]:
        scripts["HIRAGANA"] += scripts.pop("CJK", 0)  # Japanese writes in all three, Chinese in one
    likeliest = scripts.most_common(1)[0][0]
    codes = [code for code, names in SCRIPTS.items() if names[0] == likeliest]
    if len(codes) < 2:
        return codes[0] if codes else "ja" if likeliest == "KATAKANA" else None
    lowered = [word.lower() for word in found]
    return max(codes, key=lambda code: sum(word in _FREQUENT[code] for word in lowered))
