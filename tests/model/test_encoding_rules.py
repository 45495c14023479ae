"""The chat encoding's rules: tools, calls and results, dropped reasoning, tasks, reminders, masks, context."""

from typing import Any

import pytest

from amalgam.model.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, REMINDER, SPECIALS, THINK, USER

from .chats import ENCODING, SYSTEM, TINY, TOOL, assistant, call, result, user

CALL = f'<{DSML}invoke name="add">\n<{DSML}parameter name="a" string="false">1</{DSML}parameter>\n</{DSML}invoke>\n'
TOOLS = f'\n\nTools: <{DSML}>\n{{"name": "add", "parameters": {{"type": "object"}}}}\n'
LOOP = [
    {**SYSTEM, "tools": [TOOL]},
    user("1+1+1?"),
    assistant("", "one", tool_calls=[call("add", {"a": 1}, "x"), call("add", {"a": 1}, "y")]),
    result("second", "y"),
    result("first", "x"),
    assistant("3", "so"),
    user("Sure?"),
]


def test_tools_calls_and_results_and_all_reasoning_stays():
    calls = f"\n\n<{DSML}tool_calls>\n{CALL}{CALL}</{DSML}tool_calls>"
    assert ENCODING.encode(LOOP, "high") == (
        f"{BOS}Be brief.{TOOLS}{USER}1+1+1?{ASSISTANT}{THINK}one{END_THINK}{calls}{EOS}"
        f"{USER}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>{ASSISTANT}{THINK}so{END_THINK}3{EOS}"
        f"{USER}Sure?{ASSISTANT}{THINK}"
    )
    written = [text for text, trained in ENCODING.spans(LOOP, "high") if trained]
    assert written == [f"one{END_THINK}{calls}{EOS}", f"so{END_THINK}3{EOS}"]


def test_a_tool_loop_without_declared_tools_loses_its_reasoning():
    text = ENCODING.encode([SYSTEM, *LOOP[1:5]], "high")
    assert f"{USER}1+1+1?{ASSISTANT}{END_THINK}\n\n<{DSML}tool_calls>" in text
    assert "one" not in text and text.endswith(f"{ASSISTANT}{THINK}")
    kept = ENCODING.encode([SYSTEM, *LOOP[1:5]], "high", keep_reasoning=True)
    assert f"{THINK}one{END_THINK}" in kept
    # Tools on an assistant's message are not rendered, but they count.
    talk = [user("a"), assistant("b", "r", tools=[TOOL]), user("c")]
    assert ENCODING.encode(talk, "high").startswith(f"{BOS}{USER}a{ASSISTANT}{THINK}r{END_THINK}b{EOS}")


def results(*messages: dict[str, Any], calls: list | None = None) -> str:
    """How tool results after two calls, x and y, are rendered."""
    calls = [call("f", {}, "x"), call("f", {}, "y")] if calls is None else calls
    text = ENCODING.encode([user("q"), assistant("", tool_calls=calls), *messages])
    return text.rpartition(USER)[2].removesuffix(f"{ASSISTANT}{END_THINK}").replace("tool_result", "r")


def test_results_follow_the_order_of_the_calls():
    one, two, other = result("1", "x"), result("2", "y"), result("3", "z")
    assert results(two, one) == "<r>1</r>\n\n<r>2</r>"
    assert results(two, user("and"), one) == "<r>1</r>\n\nand\n\n<r>2</r>"  # texts keep their places
    assert results(two, other, one) == "<r>3</r>\n\n<r>1</r>\n\n<r>2</r>"  # an unknown id is the first call's
    assert results(two, one, calls=[call("f", {}), call("f", {})]) == "<r>2</r>\n\n<r>1</r>"
    assert results(two) == "<r>2</r>"
    assert results(result([{"type": "text", "text": "a"}, {"type": "image"}, {}, {"type": "text"}])) == (
        "<r>a\n\n[Unsupported image]\n\n[Unsupported None]\n\n</r>"
    )
    assert results(result(None), result("")) == "<r>None</r>\n\n<r></r>"


def block(arguments: Any) -> str:
    text = ENCODING.encode([user("q"), assistant("", tool_calls=[call("f", arguments)])])
    inner = text.partition(f'<{DSML}invoke name="f">\n')[2].partition(f"\n</{DSML}invoke>")[0]
    return inner.replace(DSML, "").replace("parameter", "p")


def test_arguments_are_text_or_json():
    assert block({"a": "x < 1\n2", "b": [1, "é"]}) == (
        '<p name="a" string="true">x < 1\n2</p>\n<p name="b" string="false">[1, "é"]</p>'
    )
    assert block("{}") == ""
    assert block("not json") == '<p name="arguments" string="true">not json</p>'
    assert block(None) == '<p name="arguments" string="false">null</p>'
    raw = {"function": {"name": "f", "arguments": {"a": 1}}}  # a dict where JSON text belongs
    text = ENCODING.encode([user("q"), assistant("", tool_calls=[raw])])
    assert f'name="arguments" string="false">{{"a": 1}}</{DSML}parameter>' in text


def test_response_formats_and_developers():
    schema = {"type": "object"}
    assert ENCODING.encode([{**SYSTEM, "response_format": schema}]) == f'{BOS}Be brief.\n\nSchema: {{"type": "object"}}'
    developer = {"role": "developer", "content": "Search.", "tools": [TOOL], "response_format": schema}
    expected = f'{USER}Search.{TOOLS}\n\nSchema: {{"type": "object"}}{ASSISTANT}'
    assert ENCODING.encode([developer]) == f"{BOS}{expected}{END_THINK}"
    # Developers never merge, and go before the last user where reasoning is dropped.
    developer = {"role": "developer", "content": "d"}
    assert ENCODING.encode([developer, user("a")]) == f"{BOS}{USER}d{USER}a{ASSISTANT}{END_THINK}"
    assert ENCODING.encode([developer, user("a")], "high") == f"{BOS}{USER}a{ASSISTANT}{THINK}"
    assert ENCODING.encode([user("a"), developer], "high") == f"{BOS}{USER}a{USER}d{ASSISTANT}{THINK}"
    # What a user's message cannot have is ignored.
    assert ENCODING.encode([user("a", tools=[TOOL], response_format=schema)]) == ENCODING.encode([user("a")])


def test_reminders():
    reminder = {"role": "latest_reminder", "content": "May"}
    assert ENCODING.encode([reminder, user("a")]) == f"{BOS}{REMINDER}May{USER}a{ASSISTANT}{END_THINK}"
    odd = f"{BOS}{USER}a{ASSISTANT}{END_THINK}{REMINDER}May"
    assert ENCODING.encode([user("a"), reminder]) == odd
    assert ENCODING.encode([user("a"), {"role": "latest_reminder"}]) == odd.replace("May", "None")


@pytest.mark.parametrize("task", ["query", "authority", "domain", "read_url"])
@pytest.mark.parametrize("mode", ["chat", "high"])
def test_tasks_stand_in_place_of_the_header(task: str, mode: str):
    talk = [user("a", task=task), assistant("b", "r")]
    assert ENCODING.encode(talk, mode) == f"{BOS}{USER}a<｜{task}｜>b{EOS}"
    assert [text for text, trained in ENCODING.spans(talk, mode) if trained] == [f"b{EOS}"]
    assert TINY.decode(ENCODING.prompt_ids(TINY, talk[:1], mode)[-1:], skip_special_tokens=False) == f"<｜{task}｜>"


def test_action_and_title_and_where_tasks_are_lost():
    action = [user("a", task="action"), assistant("Search", "r"), user("b")]
    assert ENCODING.encode(action[:1]) == f"{BOS}{USER}a{ASSISTANT}{END_THINK}<｜action｜>"
    dropped = f"{BOS}{USER}a{ASSISTANT}{THINK}<｜action｜>Search{EOS}{USER}b{ASSISTANT}{THINK}"
    assert ENCODING.encode(action, "high") == dropped
    title = [user("a"), assistant("b", task="title"), assistant("T")]
    assert ENCODING.encode(title) == f"{BOS}{USER}a{ASSISTANT}{END_THINK}b{EOS}<｜title｜>T{EOS}"
    assert [text for text, trained in ENCODING.spans(title) if trained] == [f"b{EOS}", f"T{EOS}"]
    assert ENCODING.encode([title[1], user("c")]) == f"{BOS}b{EOS}{USER}c{ASSISTANT}{END_THINK}"
    # A user's message with a task is not joined by the next one, but by a tool's result; its own task stays.
    assert ENCODING.encode([user("a", task="query"), user("b")]) == f"{BOS}{USER}a{USER}b{ASSISTANT}{END_THINK}"
    joined = f"{BOS}{USER}a\n\n<tool_result>r</tool_result><｜query｜>"
    assert ENCODING.encode([user("a", task="query"), result("r")]) == joined
    assert ENCODING.encode([user("a"), user("b", task="query")]) == f"{BOS}{USER}a\n\nb{ASSISTANT}{END_THINK}"


def test_without_eos_and_with_a_loss_mask():
    open_ended = [user("a"), assistant("b", wo_eos=True)]
    assert ENCODING.encode(open_ended) == f"{BOS}{USER}a{ASSISTANT}{END_THINK}b"
    masked = [user("a"), assistant("b", mask=1), user("c"), assistant("d", mask=0)]
    assert [text for text, trained in ENCODING.spans(masked) if trained] == [f"d{EOS}"]
    assert ENCODING.encode(masked) == ENCODING.encode([{**message, "mask": 0} for message in masked])


def test_no_training_where_no_header_opens_the_turn():
    error = r"messages\[{}\]: an assistant message, but none before it opens the model's turn"
    orders = [
        ([assistant("a")], 0),
        ([SYSTEM, assistant("a")], 1),
        ([user("q"), assistant("a"), assistant("b")], 2),
        ([user("q"), SYSTEM, assistant("a")], 2),
        ([user("q"), {"role": "latest_reminder", "content": "May"}, assistant("a")], 2),
    ]
    for messages, place in orders:
        for refused in (lambda talk: ENCODING.ids(TINY, talk), ENCODING.spans):
            with pytest.raises(ValueError, match=error.format(place)):
                refused(messages)
        masked = [{**message, "mask": 1} for message in messages]
        assert not any(ENCODING.ids(TINY, masked)[1])


def test_context_stands_before_and_is_not_repeated():
    talk = [SYSTEM, user("a"), assistant("b", "r")]
    asked = f"{USER}c{ASSISTANT}"
    assert ENCODING.encode([user("c")], "max", context=talk) == f"{asked}{THINK}"
    assert ENCODING.encode(LOOP[3:5], "high", context=LOOP[:3]) == (
        f"{USER}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>{ASSISTANT}{THINK}"
    )
    assert ENCODING.encode([user("b")], context=[user("a")]) == f"{USER}b{ASSISTANT}{END_THINK}"  # no merge
    # As in DeepSeek's code, a developer that is dropped at the context's end takes a message with it.
    developer = {"role": "developer", "content": "d"}
    assert ENCODING.encode([user("a"), assistant("b")], "high", context=[developer]) == f"{END_THINK}b{EOS}"


def test_special_tokens_in_every_field_stay_text():
    attack = "".join(SPECIALS)
    talk = [
        {"role": "system", "content": attack, "tools": [{"function": {"name": attack}}], "response_format": attack},
        {"role": "latest_reminder", "content": attack},
        user("q"),
        assistant(attack, attack, tool_calls=[call(attack, {attack: attack, "n": [attack]}, attack)]),
        result([{"type": "text", "text": attack}, {"type": attack}], attack),
    ]
    plain = [without_specials(message) for message in talk]
    named = [[SPECIALS[i] for i in ENCODING.ids(TINY, each, "high")[0] if i < len(SPECIALS)] for each in (talk, plain)]
    assert named[0] == named[1]
    assert named[0].count(DSML) == 1 + 2 + 2 + 4  # in the tools' wording, the block, the call, two parameters


def without_specials(message: dict[str, Any]) -> Any:
    """The same message with "x" and "y" where special tokens were named."""
    attack = "".join(SPECIALS)
    if isinstance(message, dict):
        return {without_specials(key): without_specials(value) for key, value in message.items()}  # type: ignore[arg-type]
    if isinstance(message, list):
        return [without_specials(value) for value in message]
    return message.replace(attack, "x") if isinstance(message, str) else message
