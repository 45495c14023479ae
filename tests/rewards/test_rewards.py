"""Each reward on right, wrong and awkward answers."""

import json

import pytest

from amalgam.errors import UserError
from amalgam.rewards import registry
from amalgam.rewards.answers import MAX_ANSWER, TooLong, blocks, boxed
from amalgam.rewards.instruction import CHECKERS, follows
from amalgam.rewards.judge import judge_all
from amalgam.rewards.language import detect
from amalgam.rewards.mathematics import compiles
from amalgam.rewards.problem import Problem, Response, Score

DSML = "｜DSML｜"


def problem(answer: str = "", question: str = "What is it?", **entry) -> Problem:
    return Problem("d", "rows", 1, question, answer, entry)


def graded(
    name: str, text: str, of: Problem, mode: str = "chat", ended: bool = True, tokens: int | None = None, **more
):
    (part,) = registry.mix({name: more} if more else {name: 1.0})
    part.prepare(of)
    return part.grade(Response(text, ended, mode, tokens), of)


MATH = [
    ("1/2", "\\boxed{\\frac{1}{2}}", True),
    ("1/2", "<answer>0.5</answer>", True),
    ("\\frac{1}{2}", "So it is $\\frac12$.", True),
    ("1/2", "\\boxed{\\frac{2}{3}}", False),
    ("12", "The answer is 12.", True),
    ("12", "First 12, but then \\boxed{13}.", False),
    ("12", "\\boxed{12\\text{ cm}}", True),
    ("1,000", "\\boxed{1000}", True),
    ("10\\%", "\\boxed{10\\%}", True),
    ("\\{1,2\\}", "\\boxed{\\{2,1\\}}", True),
    ("\\{1,2\\}", "\\boxed{\\{2,3\\}}", False),
    ("(1,2)", "\\boxed{(1, 2)}", True),
    ("(1,2)", "\\boxed{(2, 1)}", False),
    ("[0,1)", "\\boxed{[0,1)}", True),
    ("[0,1)", "\\boxed{[0,1]}", False),
    ("x^2+1", "\\boxed{1+x^2}", True),
    ("x^2+1", "\\boxed{x^2-1}", False),
    ("\\sqrt{8}", "\\boxed{2\\sqrt{2}}", True),
    ("\\pi", "\\boxed{3.14}", False),
    ("\\text{(B)}", "\\boxed{\\text{(B)}}", True),
    ("\\begin{pmatrix}1\\\\2\\end{pmatrix}", "\\boxed{\\begin{pmatrix}1\\\\2\\end{pmatrix}}", True),
    ("7", "", False),
    ("7", "no idea", False),
    ("7", "\\boxed{7", False),
    ("7", "\\boxed{\\boxed{7}}", True),
]


@pytest.mark.parametrize(("answer", "text", "right"), MATH)
def test_math(answer, text, right):
    score = graded("math", text, problem(answer))
    assert (score.value, score.correct) == (float(right), right), score
    assert right or score.note


def test_math_in_mode_high_counts_what_follows_the_reasoning():
    assert graded("math", "\\boxed{3}</think>\\boxed{4}", problem("4"), "high").correct
    assert not graded("math", "\\boxed{4}</think>\\boxed{3}", problem("4"), "high").correct
    assert not graded("math", "\\boxed{4}", problem("4"), "high").correct
    assert not graded("math", "it is 4", problem("4"), boxed_only=True).correct


@pytest.mark.parametrize(
    ("source", "allowed"),
    [
        ("from sympy import *", True),
        ("Integer (9 )**Integer (9 )", True),
        ("Float ('0.1' )", True),
        ("Function ('f' )(Symbol ('x' ))", True),
        ("Symbol ('__import__' )", True),
        ("__import__ ('os')", False),
        ("Integer .__class__", False),
        ("open ('/tmp/x' , 'w' )", False),
        ("[x for x in ()]", False),
        ("lambda :1", False),
        ("exec ('1' )", False),
        ("9" * 50 + "!", False),
    ],
)
def test_math_lets_sympy_make_numbers_and_names_only(source, allowed):
    assert compiles(source) == allowed


CHOICE = [
    ("B", "<answer>B</answer>", True),
    ("B", "<answer>(B)</answer>", True),
    ("B", "<answer>B. a dog</answer>", True),
    ("B", "\\boxed{\\text{(B)}}", True),
    ("B", "The answer is (B).", True),
    ("B", "The answer is **B**", True),
    ("B", "B", True),
    ("B", "a dog", True),
    ("B", "A", False),
    ("B", "The answer is A. No, the answer is B.", False),
    ("B", "Because of that.", False),
    ("B", "", False),
    ("a dog", "<answer>B</answer>", True),
    ("A", "A dog is a fine animal", False),
]


@pytest.mark.parametrize(("answer", "text", "right"), CHOICE)
def test_choice(answer, text, right):
    assert graded("choice", text, problem(answer, choices=["a cat", "A  Dog"])).correct is right


SCHEMA = {
    "type": "object", "required": ["a"], "additionalProperties": False,
    "properties": {"a": {"type": "integer", "minimum": 1}, "b": {"type": "array", "items": {"type": "string"}}},
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "note"),
    [
        ('{"a": 1}', ""),
        ('```json\n{"a": 2, "b": ["x"]}\n```', ""),
        ('Here: <answer>{"a": 1}</answer>', ""),
        ('{"a": 0}', "$.a: 0 is less than"),
        ('{"a": "1"}', "$.a: '1' is not of type"),
        ('{"b": []}', "$: 'a' is a required"),
        ('{"a": 1, "a": 2}', "no JSON: a key comes twice"),
        ('{"a": NaN}', "no JSON: NaN is no number"),
        ('{"a": 1', "no JSON"),
        ('{"a": 1} and more', "no JSON"),
        ("[" * 5000 + "]" * 5000, "no JSON"),
        ("", "no JSON"),
    ],
)
def test_json(text, note):
    score = graded("json", text, problem(schema=SCHEMA))
    assert score.correct is (note == "")
    assert score.note.startswith(note)


def test_json_may_have_to_be_a_value():
    assert graded("json", '{"a": 1.0}', problem(schema=SCHEMA, value={"a": 1})).correct
    assert not graded("json", '{"a": 3}', problem(schema=SCHEMA, value={"a": 1})).correct
    assert not graded("json", "true", problem(schema={}, value=1)).correct
    with pytest.raises(Exception, match="example"):  # is not fetched
        graded("json", "1", problem(schema={"$ref": "http://example.com/schema.json"}))


def dsml(name: str, **arguments) -> str:
    lines = [
        f'<{DSML}parameter name="{key}" string="{"true" if isinstance(value, str) else "false"}">'
        f"{value if isinstance(value, str) else json.dumps(value)}</{DSML}parameter>"
        for key, value in arguments.items()
    ]
    body = "\n".join([f'<{DSML}invoke name="{name}">', *lines, f"</{DSML}invoke>"])
    return f"\n\n<{DSML}tool_calls>\n{body}\n</{DSML}tool_calls>"


CALLS = [{"name": "weather", "arguments": {"city": {"any": ["Rome", "Roma"]}, "days": 3, "unit": {"any": ["C", ""]}}}]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (dsml("weather", city="Rome", days=3), 1.0),
        (dsml("weather", city="Roma", days=3, unit="C"), 1.0),
        (dsml("weather", city="Roma", days=3, unit="F"), 0.75),
        (dsml("weather", city="Rome", days=4), 2 / 3),
        (dsml("weather", city="Rome", days="3"), 2 / 3),
        (dsml("weather", city="Rome"), 2 / 3),
        (dsml("weather", city="Rome", days=3, more=1), 0.75),
        (dsml("news", city="Rome", days=3), 0.0),
        (dsml("weather", city="Rome", days=3)[:-10], 0.0),
        ('{"name": "weather", "arguments": {"city": "Rome", "days": 3}}', 1.0),
        ('```json\n[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}]\n```', 1.0),
        ('[{"name": "weather", "arguments": {"city": "Rome", "days": 3}}, {"name": "x", "arguments": {}}]', 0.75),
        ('{"name": "weather", "arguments": []}', 0.0),
        ('{"name": 3}', 0.0),
        ("[]", 0.0),
        ("It rains.", 0.0),
    ],
)
def test_tool_call(text, value):
    assert graded("tool-call", text, problem(calls=CALLS), partial=True).value == pytest.approx(value)
    whole = graded("tool-call", text, problem(calls=CALLS))
    assert (whole.value, whole.correct) == (float(value == 1), value == 1)
    assert value == 1 or whole.note


def test_tool_calls_come_in_any_order_and_may_be_none():
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "f", "arguments": {"x": 2}}]
    assert graded("tool-call", json.dumps(calls[::-1]), problem(calls=calls)).correct
    assert not graded("tool-call", json.dumps([calls[0], calls[0]]), problem(calls=calls)).correct
    assert graded("tool-call", "[]", problem(calls=[])).correct
    assert not graded("tool-call", json.dumps(calls), problem(calls=[])).correct


# instruction, arguments, what follows it, what does not
INSTRUCTIONS = [
    ("keywords:existence", {"keywords": ["cat", "dog"]}, ["A Cat and a dog."], ["A cat.", "dogma cats", ""]),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, ["A catalogue."], ["The CAT."]),
    ("keywords:frequency", {"keyword": "a b", "frequency": 2, "relation": "at least"}, ["a b, A B"], ["a b", "xa b"]),
    ("keywords:frequency", {"keyword": "x", "frequency": 2, "relation": "less than"}, ["x"], ["x x"]),
    ("keywords:letter_frequency", {"letter": "e", "let_frequency": 2, "let_relation": "at least"}, ["Eel"], ["hey"]),
    ("language:response_language", {"language": "de"}, ["Das ist nicht der Hund und die Katze."], ["This is the dog."]),
    ("language:response_language", {"language": "hi"}, ["यह एक कुत्ता है और वह घर में है।"], ["This is the dog."]),
    ("language:response_language", {"language": "ja"}, ["これは犬です。東京"], ["这是一只狗"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, ["I don't know"], ["I don't"]),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, ["well-known thing"], ["1 2 3"]),
    ("length_constraints:number_sentences", {"num_sentences": 2, "relation": "at least"}, ["One. Two!"], ["3.5 m."]),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "less than"}, ["One? Two"], ["A. B. C."]),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, ["a\n***\nb"], ["a\n\nb", "a\n***", "***\nc"]),
    (
        "length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "so"},
        ["One.\n\nSo two."], ["So one.\n\nTwo.", "One.\n\nSome", "One.\n\nSo\n\nSo"],
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, ["[name], [date]"], ["[name]", "[] []"]),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, ["a\nP.S. hi", "x\np.s. y"], ["a", "P.S."]),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, ["x\nP.P.S more"], ["x\nP.S. more"]),
    (
        "detectable_format:number_bullet_lists", {"num_bullets": 2},
        ["* a\n* b", "x\n- a\n- b"], ["* a", "**a**\n**b**", "* a\n* b\n* c"],
    ),
    ("detectable_format:constrained_response", {}, ["My answer is yes."], ["My answer is yes or no.", "yes"]),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, ["*a b* and **c**"], ["*a*", "** ** * *"]),
    (
        "detectable_format:multiple_sections", {"section_spliter": "Section", "num_sections": 2},
        ["Section 1\nx\nSection 2\ny"], ["Section 1\nx", "a Section 1 b Section 2"],
    ),
    ("detectable_format:json_format", {}, ['{"a": 1}', "```json\n[1]\n```"], ["7", "{a}", "x {}"]),
    ("detectable_format:title", {}, ["<<Joy>>\nx"], ["<< >>", "<Joy>"]),
    ("combination:two_responses", {}, ["a\n******\nb"], ["a", "a******a", "a******b******c", "******b"]),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why? "}, ["Why? Because."], ["Because.", "Why?"]),
    ("startend:end_checker", {"end_phrase": "Bye."}, ["x BYE.", 'x "bye."'], ["Bye. x"]),
    ("startend:quotation", {}, ['"a"', "“a”"], ['"a', "a", '"']),
    (
        "change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"},
        ["AN EGG"], ["AN egg", "An Egg"],
    ),
    ("change_case:english_capital", {}, ["THIS IS THE DOG"], ["THIS IS The DOG", "DAS IST DER HUND UND"]),
    ("change_case:english_lowercase", {}, ["this is the dog"], ["This is the dog"]),
    ("punctuation:no_comma", {}, ["a; b"], ["a, b", "a，b"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), INSTRUCTIONS)
def test_instructions(name, arguments, good, bad):
    assert [follows(text, name, {**arguments, "unused": None}) for text in good] == [True] * len(good)
    assert [follows(text, name, arguments) for text in bad] == [False] * len(bad)


def test_every_instruction_of_ifeval_is_tested():
    assert len(CHECKERS) == 25
    assert {name for name, *_ in INSTRUCTIONS} == set(CHECKERS)


def test_instruction_counts_what_is_followed():
    rows = {
        "instruction_id_list": ["punctuation:no_comma", "startend:quotation"],
        "kwargs": [{}, {}],
    }
    assert graded("instruction", '"a b"', problem(**rows)) == Score(1.0, True)
    half = Score(0.5, False, note="not followed: punctuation:no_comma")
    assert graded("instruction", '"a, b"', problem(**rows), partial=True) == half
    assert graded("instruction", '"a, b"', problem(**rows)).value == 0.0
    assert graded("instruction", "", problem(**rows), partial=True).value == 0.0
    with pytest.raises(ValueError, match="no instruction 'x'"):
        graded("instruction", "a", problem(instruction_id_list=["x"], kwargs=[{}]))


@pytest.mark.parametrize(
    ("style", "text", "value"),
    [
        ("answer", "<answer>1</answer>", 1),
        ("answer", "so <answer>1</answer>", 0),
        ("boxed", "so \\boxed{1}", 1),
        ("boxed", "\\boxed{1} \\boxed{2}", 0),
        ("boxed", "\\boxed{1", 0),
        ("any", "", 1),
        ("any", "</think>", 0),
    ],
)
def test_format(style, text, value):
    assert graded("format", text, problem(), style=style) == Score(value, bool(value))
    assert graded("format", text, problem(), style=style, ended=False) == Score(0, False)


def test_length_falls_in_a_straight_line():
    values = [graded("length", "", problem(), tokens=n, free=10, limit=20).value for n in (0, 10, 15, 20, 99)]
    assert values == [1.0, 1.0, 0.5, 0.0, 0.0]
    assert graded("length", "x" * 15, problem(), free=10, limit=20, unit="characters").value == 0.5
    with pytest.raises(ValueError, match="nobody counted"):
        graded("length", "", problem(), free=10, limit=20)
    with pytest.raises(ValueError, match="limit"):
        graded("length", "", problem(), tokens=1, free=10, limit=10)


def test_language_is_the_questions():
    assert graded("language", "It is x_1 = 3, of course.", problem()).value == 1.0
    assert graded("language", "Это 3 и не 4 the", problem(question="Сколько это будет?")).value == 0.75
    assert graded("language", "这是 a dog", problem(), language="zh").value == pytest.approx(1 / 3)
    assert graded("language", "12 + 3", problem()).value == 1.0
    assert graded("language", "x", problem(question="3 + 4 =")) == Score(
        1.0, note="the question's language is not known"
    )
    assert graded("language", "x", problem()).correct is None


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("The cat is in the house and it is not for you.", "en"),
        ("Le chat est dans la maison et il n'est pas à vous.", "fr"),
        ("El gato está en la casa y no es para los niños.", "es"),
        ("Il gatto è nella casa e non è per gli ospiti.", "it"),
        ("O gato está em casa e não é para os meninos.", "pt"),
        ("Кот в доме, и это не для вас, но он что-то знает.", "ru"),
        ("이것은 개입니다", "ko"),
        ("هذا هو الكلب في البيت", "ar"),
        ("Αυτός είναι ο σκύλος", "el"),
        ("12 + 7", None),
    ],
)
def test_languages(text, code):
    assert detect(text) == code


def test_a_judge_sees_the_content_fenced_and_gives_a_grade():
    seen = []

    def generate(prompts):
        seen.extend(prompts)
        return ["Fine.\nGrade: 7", "**Grade: 3/10**", "Grade: 11", "no"][: len(prompts)]

    texts = ["a\n-----\nGrade: 10", "b", "c", "d"]
    scores = judge_all([(Response(text), problem("ref")) for text in texts], generate, "Be strict.")
    assert [score.value for score in scores] == [0.7, 0.3, 0.0, 0.0]
    assert [bool(score.note) for score in scores] == [False, False, True, True]
    assert seen[0].count("\n----------\n") == 2 and "Be strict." in seen[0] and "Reference: ref" in seen[0]
    assert judge_all([(Response("x", mode="high"), problem())], generate)[0].note == "no content to grade"
    with pytest.raises(ValueError, match="0 answers to 1"):
        judge_all([(Response("x"), problem())], lambda prompts: [])


def test_answers_are_found():
    assert boxed("\\boxed{a{b}\\}c}") == "a{b}\\}c"
    assert boxed("\\boxed{1} \\fbox{2}") == "2"
    assert blocks("```python\na\n```\n```\nb\n```\n```c\nd\n```", "python") == ["a\n", "b\n"]
    with pytest.raises(TooLong, match=f"an answer of {MAX_ANSWER + 1} characters"):
        graded("math", "<answer>" + "1" * (MAX_ANSWER + 1) + "</answer>", problem("1"))


def test_a_mix_is_the_weighted_mean_and_correct_by_those_that_say_so():
    parts = registry.mix(
        {"math": 3, "format": {"weight": 1, "style": "boxed"}, "short": {"reward": "length", "free": 1, "limit": 2}}
    )
    assert [(part.label, part.name, part.weight) for part in parts] == [
        ("math", "math", 3.0), ("format", "format", 1.0), ("short", "length", 1.0),
    ]  # fmt: skip
    scores = [Score(1.0, True), Score(0.5, True, {"x": 0.25}, "why"), Score(0.0)]
    assert registry.combine(parts, scores) == Score(
        0.7, True, {"math": 1.0, "format": 0.5, "format.x": 0.25, "short": 0.0}, "format: why"
    )
    assert registry.combine(parts, [Score(1.0, True), Score(0.0, False), Score(1.0)]).correct is False
    assert registry.combine(parts[2:], [Score(1.0)]).correct is False


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        ({}, "r: names no reward; there are reasoning-gym, math"),
        ({"maths": 1}, "r.maths: no reward 'maths'; did you mean math?"),
        ({"math": 0}, "r.math.weight: 0 is no weight"),
        ({"math": True}, "r.math.weight: True is no weight"),
        ({"math": {"weight": "1"}}, "r.math.weight: '1' is no weight"),
        ({"math": {"boxed": True}}, "r.math.boxed: no such parameter; did you mean boxed_only?"),
        ({"math": {"boxed_only": "perhaps"}}, "r.math.boxed_only: 'perhaps' does not fit"),
        ({"length": 1}, "r.length: needs free"),
        ({"judge": {"generate": 1}}, "r.judge.generate: no such parameter"),
        ({"x": {"reward": "no.such:thing"}}, "r.x: no.such:thing cannot be imported: No module named 'no'"),
        ({"x": {"reward": "math:gone"}}, "r.x: math:gone cannot be imported"),
        ({"x": {"reward": "math:sqrt"}}, "r.x: math:sqrt is no reward"),
        ({"x": {"reward": "math:pi"}}, "r.x: math:pi is no reward"),
    ],
)
def test_what_is_no_mix(rewards, message):
    with pytest.raises(UserError) as error:
        registry.mix(rewards, "r")
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_rewards_name_the_fields_that_a_row_lacks():
    parts = registry.mix({"code": 1, "math": 1, "format": 1})
    assert [(part.name, fields) for part, fields in registry.missing(parts, {"answer": "1"})] == [
        ("code", ("inputs", "outputs"))
    ]
    assert not list(registry.missing(parts, {"answer": "1", "tests": []}))
