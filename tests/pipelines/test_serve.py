"""The HTTP endpoint over an engine that writes what it is told, driven by the official client."""

import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

from amalgam.model.config import PRESETS
from amalgam.model.template import speaker
from amalgam.model.tokenizer import ASSISTANT, BOS, DSML, END_THINK, EOS, USER
from amalgam.pipelines.speak import Speaker
from amalgam.rl.trajectory import Request

from .. import other_models
from .served import TOKEN, Scripted, Served

ENCODING, TINY = speaker(PRESETS / "tiny")
HI = [{"role": "user", "content": "hi"}]
ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALL = f'<{DSML}invoke name="add">\n<{DSML}parameter name="a" string="false">1</{DSML}parameter>\n</{DSML}invoke>\n'
BLOCK = f"\n\n<{DSML}tool_calls>\n{CALL}{CALL.replace('1', '2')}</{DSML}tool_calls>"


def spelled(text: str) -> list[int]:
    return TINY.encode(text, add_special_tokens=False).ids


def writes(text: str, **more: Any) -> Scripted:
    return Scripted(lambda request: spelled(text), **more)


def ask(client: Any, messages: list[Any] = HI, **more: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def post(served: Served, path: str, body: bytes | None, **headers: str) -> tuple[int, Any, Any]:
    """Status, the answer's JSON, its headers; by hand, for what the official client would not send."""
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    given = {"Authorization": f"Bearer {TOKEN}"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body, given)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text[:1] == b"{" else text.decode(), response.headers


def until(true: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def test_a_chat_and_the_same_as_a_stream():
    with Served(writes(f"so it is{END_THINK}4 é漢😀{EOS}")) as served:
        client = served.client()
        more: dict[str, Any] = {"reasoning_effort": "high", "logprobs": True, "seed": 3, "temperature": 0.5}
        answer = ask(client, **more)
        (choice,) = answer.choices
        assert (choice.message.content, choice.message.reasoning_content) == ("4 é漢😀", "so it is")
        assert (choice.finish_reason, choice.message.tool_calls) == ("stop", None)
        ids = spelled(f"so it is{END_THINK}4 é漢😀{EOS}")
        prompt = ENCODING.prompt_ids(TINY, HI, "high")
        assert answer.usage.model_dump(exclude_none=True) == {
            "prompt_tokens": len(prompt), "completion_tokens": len(ids), "total_tokens": len(prompt) + len(ids),
        }  # fmt: skip
        assert [p.logprob for p in choice.logprobs.content] == [-0.25 * i for i in ids]
        assert choice.logprobs.content[-1].token == EOS and bytes(choice.logprobs.content[0].bytes) == b"s"
        chunks = list(ask(client, stream=True, stream_options={"include_usage": True}, **more))
        assert chunks[-1].usage == answer.usage and chunks[-1].choices == []
        parts = [chunk.choices[0] for chunk in chunks[:-1]]
        assert "".join(part.delta.content or "" for part in parts) == "4 é漢😀"
        assert "".join(getattr(part.delta, "reasoning_content", "") for part in parts) == "so it is"
        assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["stop"]
        assert [p for part in parts if part.logprobs for p in part.logprobs.content] == choice.logprobs.content
        assert len({chunk.id for chunk in chunks}) == 1 and parts[0].delta.role == "assistant" and len(parts) > 8
        asked = served.engine.seen
        assert all(r.prompt_ids.tolist() == prompt for r in asked)
        assert all((r.params.seed, r.params.temperature, r.counter) == (3, 0.5, 0) for r in asked)
        assert asked[0].id != asked[1].id


def test_200_requests_at_once_get_each_its_own_answer():
    def echo(request: Request) -> list[int]:
        return [*request.prompt_ids[2:-2].tolist(), 1]  # what stands between BOS, User and Assistant, </think>

    with Served(Scripted(echo, pace=3)) as served, served.client() as client:

        def one(i: int) -> str:
            messages = [{"role": "user", "content": f"number {i} é"}]
            if i % 2:
                return ask(client, messages).choices[0].message.content
            return "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, messages, stream=True))

        with ThreadPoolExecutor(200) as pool:
            assert list(pool.map(one, range(200))) == [f"number {i} é" for i in range(200)]
        assert served.running.count == 0


def test_tools_there_and_back():
    """A call whole and streamed; its result goes into the next prompt as the encoding has it."""
    with Served(writes(f"Let me see.{BLOCK}{EOS}")) as served:
        client = served.client()
        choice = ask(client, tools=[ADD]).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", "Let me see.")
        calls = choice.message.tool_calls
        assert [(c.type, c.function.name, c.function.arguments) for c in calls] == [
            ("function", "add", '{"a": 1}'), ("function", "add", '{"a": 2}'),
        ]  # fmt: skip
        assert len({c.id for c in calls}) == 2
        system = {"role": "system", "content": "", "tools": [ADD]}
        assert served.engine.seen[0].prompt_ids.tolist() == ENCODING.prompt_ids(TINY, [system, *HI])
        with client.chat.completions.stream(model="tiny", messages=HI, tools=[ADD]) as stream:
            final = stream.get_final_completion().choices[0]
        assert [c.function.arguments for c in final.message.tool_calls] == ['{"a": 1}', '{"a": 2}']
        assert (final.finish_reason, final.message.content) == ("tool_calls", "Let me see.")
        results = [{"role": "tool", "tool_call_id": c.id, "content": str(i)} for i, c in enumerate(calls)][::-1]
        ask(client, [*HI, choice.message, *results], tools=[ADD])
        said = choice.message.model_dump(include={"role", "content", "tool_calls"})
        wanted = ENCODING.prompt_ids(TINY, [system, *HI, said, *results])
        assert served.engine.seen[-1].prompt_ids.tolist() == wanted
        assert "0</tool_result>\n\n<tool_result>1" in TINY.decode(wanted, skip_special_tokens=False)
        text = ask(client, tools=[ADD], tool_choice="none").choices[0]
        assert (text.finish_reason, text.message.content) == ("stop", f"Let me see.{BLOCK}")
        assert served.engine.seen[-1].prompt_ids.tolist() == ENCODING.prompt_ids(TINY, HI)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_call_that_the_model_has_to_make(choice: Any):
    head = f'\n\n<{DSML}tool_calls>\n<{DSML}invoke name="' + ("" if choice == "required" else 'add">\n')
    with Served(writes((BLOCK + EOS).removeprefix(head))) as served:
        message = ask(served.client(), tools=[ADD], tool_choice=choice).choices[0].message
        assert [c.function.arguments for c in message.tool_calls] == ['{"a": 1}', '{"a": 2}']
        shown = TINY.decode(served.engine.seen[0].prompt_ids.tolist(), skip_special_tokens=False)
        assert shown.endswith(f"{USER}hi{ASSISTANT}{END_THINK}{head}")


def test_a_call_that_cannot_be_read_is_told():
    with Served(writes(f"a{BLOCK.replace('>1<', '>}<')}{EOS}")) as served:
        choice = ask(served.client(), tools=[ADD]).choices[0]
        assert [c.function.arguments for c in choice.message.tool_calls] == ['{"a": 2}']
        assert choice.problems == ["bad_json: parameter 'a' with string=\"false\" is not JSON: '}'"]


def test_choices_share_a_prompt_and_a_stop_string_ends_them():
    def write(request: Request) -> list[int]:
        return spelled(f"{request.counter}: one END two")

    with Served(Scripted(write, pace=2)) as served:
        client = served.client()
        answer = ask(client, n=3, stop=["nothing", "END"], max_tokens=40)
        assert [(c.message.content, c.finish_reason) for c in answer.choices] == [
            (f"{i}: one ", "stop") for i in range(3)
        ]
        assert len({r.group for r in served.engine.seen}) == 1 and len({r.id for r in served.engine.seen}) == 3
        assert answer.usage.prompt_tokens == len(ENCODING.prompt_ids(TINY, HI))
        assert served.engine.seen[0].params.stop == ("nothing", "END")
        texts = ["", "", ""]
        for chunk in ask(client, n=3, stop="END", stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert texts == [f"{i}: one " for i in range(3)]
        until(lambda: not served.engine.busy)  # what the engine had not ended was cancelled
        assert ask(client, max_tokens=2).choices[0].finish_reason == "length"


def test_completions():
    with Served(writes(f" 4{EOS}")) as served:
        client = served.client()
        answer = client.completions.create(model="tiny", prompt="2 + 2 =", logprobs=0, extra_body={"top_k": 5})
        assert (answer.choices[0].text, answer.choices[0].finish_reason) == (" 4", "stop")
        assert answer.choices[0].logprobs.tokens == [" ", "4", EOS]
        assert served.engine.seen[0].prompt_ids.tolist() == spelled(f"{BOS}2 + 2 =")
        assert served.engine.seen[0].params.top_k == 5
        client.completions.create(model="tiny", prompt=[5, 6, 7])
        assert served.engine.seen[1].prompt_ids.tolist() == [5, 6, 7]
        answer = client.completions.create(model="tiny", prompt=["a", f"{BOS}b"], n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [r.prompt_ids.tolist() for r in served.engine.seen[2:]] == [spelled(f"{BOS}{t}") for t in "aabb"]
        assert answer.usage.prompt_tokens == 4
        chunks = list(client.completions.create(model="tiny", prompt="a", stream=True))
        assert all(choice.logprobs is None for each in [answer, *chunks] for choice in each.choices)
        assert "".join(chunk.choices[0].text for chunk in chunks) == " 4"


def test_without_a_seed_each_request_has_its_own():
    with Served(writes(EOS)) as served:
        for _ in range(2):
            ask(served.client(), n=2)
        seeds = [r.params.seed for r in served.engine.seen]
        assert seeds[0] == seeds[1] != seeds[2] == seeds[3]
        assert [r.counter for r in served.engine.seen] == [0, 1, 0, 1]


SCHEMA = {"type": "object", "required": ["x"]}


@pytest.mark.parametrize(
    ("change", "messages", "mode"),
    [
        ({}, HI, "chat"),
        ({"reasoning_effort": "none"}, HI, "chat"),
        ({"reasoning_effort": "medium"}, HI, "high"),
        ({"reasoning_effort": "xhigh"}, HI, "max"),
        (
            {"messages": [{"role": "developer", "content": "Be brief."}, *HI], "reasoning_effort": "high"},
            [{"role": "system", "content": "Be brief."}, *HI],
            "high",
        ),
        (
            {"messages": [{"role": "user", "name": "x", "content": [{"type": "text", "text": t} for t in "ab"]}]},
            [{"role": "user", "content": "a\n\nb"}],
            "chat",
        ),
        ({"response_format": {"type": "text"}}, HI, "chat"),
        (
            {"response_format": {"type": "json_object"}},
            [{"role": "system", "content": "", "response_format": {"type": "object"}}, *HI],
            "chat",
        ),
        (
            {
                "messages": [{"role": "system", "content": "S"}, *HI],
                "tools": [ADD],
                "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
            },
            [{"role": "system", "content": "S", "tools": [ADD], "response_format": SCHEMA}, *HI],
            "chat",
        ),
    ],
)
def test_the_prompt_is_the_encodings(bad: Served, change: dict[str, Any], messages: list[Any], mode: str):
    ask(bad.client(), **({"messages": HI} | change))
    assert bad.engine.seen[-1].prompt_ids.tolist() == ENCODING.prompt_ids(TINY, messages, mode)


def test_the_command_gives_the_mode_and_a_request_the_sampling():
    with Served(writes(EOS), mode="high") as served:
        more = {"top_k": 7, "min_p": 0.25, "user": "me", "frequency_penalty": 0}
        ask(served.client(), top_p=0.5, max_completion_tokens=9, seed=2**63 - 1, extra_body=more)
        ask(served.client(), extra_body={"top_k": -1})
        first, second = (r.params for r in served.engine.seen)
        assert served.engine.seen[0].prompt_ids.tolist() == ENCODING.prompt_ids(TINY, HI, "high")
        assert (first.top_p, first.top_k, first.min_p, first.max_new_tokens, first.seed) == (0.5, 7, 0.25, 9, 2**63 - 1)
        assert (second.top_p, second.top_k, second.min_p, second.temperature) == (1.0, 0, 0.0, 1.0)
        assert second.max_new_tokens == 4096 - len(ENCODING.prompt_ids(TINY, HI, "high"))


def test_another_model_by_its_own_template(tmp_path: Path):
    """Its end of reasoning is text; it has no tools, and no third mode."""
    speaks = Speaker(str(other_models.checkpoint(tmp_path / "other", template=other_models.REASONING)))
    text = "<think>\nso\n</think>\n\n4 é"
    ids = [*speaks.tokenizer.encode(text, add_special_tokens=False).ids, other_models.END_IDS[1]]
    with Served(Scripted(lambda request: ids, other_models.END_IDS), speaks, context=512) as served:
        client = served.client()
        for stream in (False, True):
            answer = ask(client, reasoning_effort="high", stream=stream)
            parts = [c.choices[0].delta for c in answer] if stream else [answer.choices[0].message]
            assert "".join(part.content or "" for part in parts) == "4 é"
            assert "".join(getattr(part, "reasoning_content", "") for part in parts) == "so"
        assert served.engine.seen[-1].prompt_ids.tolist() == speaks.prompt(HI, "high").tolist()
        assert ask(client).choices[0].message.content == text
        client.completions.create(model="tiny", prompt="a")
        assert served.engine.seen[-1].prompt_ids.tolist() == speaks.tokenizer.encode("a").ids
        for change, message in [
            ({"tools": [ADD]}, "tools: not built for this model"),
            ({"response_format": {"type": "json_object"}}, "response_format: not built for this model"),
            ({"reasoning_effort": "max"}, "reasoning_effort: mode max is not built for this model; it has chat, high"),
            ({"messages": [*HI, {"role": "assistant", "content": "x"}]}, "a prompt must end with a user message"),
        ]:
            with pytest.raises(openai.BadRequestError, match=message):
                ask(client, **change)


def test_models_health_and_metrics():
    with Served(writes(EOS)) as served:
        assert [model.id for model in served.client().models.list()] == ["tiny"]
        assert served.client().models.retrieve("tiny").owned_by == "amalgam"
        with pytest.raises(openai.NotFoundError, match="'gpt' is not here; this server has 'tiny'"):
            served.client().models.retrieve("gpt")
        status, health, _ = post(served, "/health", None, Authorization="")
        assert (status, health) == (200, {"status": "ok"})
        status, text, _ = post(served, "/metrics", None)
        assert status == 200 and "\namalgam_engine_tokens_per_second 12.5\n" in text
        assert 'amalgam_responses_total{status="404"} 1\n' in text


@pytest.mark.parametrize(
    ("path", "headers", "status", "message"),
    [
        ("/v1/chat/completions", {"Authorization": ""}, 401, "no valid token"),
        ("/v1/chat/completions", {"Authorization": f"Bearer {TOKEN}x"}, 401, "no valid token"),
        ("/v1/chat/completions", {"Authorization": "Bearer \xe9"}, 401, "no valid token"),
        ("/v1/chat/completions", {"Authorization": f"Basic {TOKEN}"}, 401, "no valid token"),
        ("/metrics", {"Authorization": ""}, 401, "no valid token"),
        ("/nowhere", {"Authorization": ""}, 401, "no valid token"),
        ("/nowhere", {}, 404, "Not Found"),
        ("/v1/models", {}, 405, "Method Not Allowed"),
        ("/v1/chat/completions", {"Origin": "http://localhost"}, 403, "a web page asks"),
        ("/v1/chat/completions", {"Host": "evil.example:80"}, 403, "the Host header is neither"),
        ("/v1/chat/completions", {"Host": "127.0.0.1.evil.example"}, 403, "the Host header is neither"),
        ("/v1/chat/completions", {"Content_Length": str(2**25)}, 413, "the body is larger than 16777216 bytes"),
    ],
)
def test_who_is_refused(path: str, headers: dict[str, str], status: int, message: str):
    with Served(writes(EOS)) as served:
        found, body, _ = post(served, path, b"{" if status != 413 else b"{" * 2**25, **headers)
        assert found == status and body["error"]["message"].startswith(message)
        assert served.engine.seen == []


def test_the_official_client_without_the_token_is_refused():
    with Served(writes(EOS)) as served:
        with pytest.raises(openai.AuthenticationError):
            ask(served.client(api_key="another-token-than-that"))
        assert served.engine.seen == []


def user(content: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"temperature": -1}, "temperature", "temperature: input should be greater than or equal to 0, got -1"),
        ({"temperature": "1"}, "temperature", 'temperature: input should be a valid number, got "1"'),
        ({"tempreature": 1}, "tempreature", "tempreature: unknown or not built; did you mean 'temperature'?"),
        ({"seed": -4}, "seed", "seed: input should be greater than or equal to 0, got -4"),
        ({"stop": ["a", ""]}, "stop[1]", 'stop[1]: string should have at least 1 character, got ""'),
        ({"n": 129}, "n", "n: input should be less than or equal to 128, got 129"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs: not built; leave it out"),
        ({"presence_penalty": 0.5}, "presence_penalty", "presence_penalty: not built; leave it out"),
        ({"reasoning_effort": "loud"}, "reasoning_effort", "reasoning_effort: input should be 'none', "),
        ({"stream_options": {}}, "stream_options", "stream_options: want it with stream alone"),
        ({"max_tokens": 3, "max_completion_tokens": 3}, "max_tokens", "max_tokens: max_completion_tokens is given too"),
        ({"max_tokens": 5000}, "max_tokens", "a prompt of 6 tokens and max_tokens 5000 are more than a request ma"),
        (user("x" * 5000), None, "a prompt of 5004 tokens and an answer are more than a request may have here, 4096"),
        (user("x" * 3500), None, "request "),
        ({"messages": []}, "messages", "messages: list should have at least 1 item"),
        ({"messages": [{"role": "robot"}]}, "messages[0].role", "messages[0].role: 'robot' is no role; want one of"),
        ({"messages": [{"role": "user"}]}, "messages", "messages[0]: content must be a string, got NoneType"),
        ({"messages": [*HI, {"role": "assistant"}]}, "messages", "messages[1]: a prompt must end with a user message"),
        ({"messages": [HI[0] | {"task": "title"}]}, "messages[0].task", "messages[0].task: not built; a message has"),
        (user([{"type": "image_url"}]), "messages[0].content[0]", 'messages[0].content[0]: want {"type": "text"'),
        ({"tools": [{"type": "function"}]}, "tools[0]", 'tools[0]: want {"type": "function", "function": {"name"'),
        ({"tools": [ADD, ADD]}, "tools[1].function.name", "tools[1].function.name: 'add': want a name of its own"),
        ({"tool_choice": "required"}, "tool_choice", "tool_choice: 'required': tools has none"),
        ({"tool_choice": {"type": "x"}}, "tool_choice", "tool_choice: want auto, none, required or"),
        (
            {"tools": [ADD], "tool_choice": "required", "reasoning_effort": "high"},
            "tool_choice",
            "tool_choice: a call that the model has to make is built for reasoning_effort none alone, not for mode h",
        ),
        ({"response_format": {"type": "json_schema"}}, "response_format", 'response_format: want {"type": "text"}'),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}, "strict": True}}},
            "response_format.json_schema.strict",
            "response_format.json_schema.strict: not built: the model is told the schema, and nothing constrains",
        ),
        ({"model": None}, "model", "model: missing"),
    ],
)
def test_bad_input_names_the_field(bad: Served, change: dict[str, Any], param: str | None, message: str):
    status, body, _ = post(bad, "/v1/chat/completions", json.dumps({"model": "tiny", "messages": HI} | change).encode())
    assert (status, body["error"]["type"]) == (400, "invalid_request_error")
    assert body["error"]["message"].startswith(message), body
    assert body["error"]["param"] == param


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt: want a text, its token ids, or a list of texts or of lists of ids"),
        ({"prompt": [5, 512]}, "prompt: 512 is no token's id; they are 0 to 511"),
        ({"prompt": ["a", 3]}, "prompt: want a text, or token ids, at least one"),
        ({"prompt": ["a"] * 65, "n": 2}, "prompt: 65 prompts, n 2: want at most 128 choices"),
        ({"echo": True}, "echo: not built; leave it out"),
        ({"logprobs": 3}, "logprobs: input should be less than or equal to 0, got 3"),
        ({"model": "gpt"}, "model: 'gpt' is not here; this server has 'tiny'"),
    ],
)
def test_bad_completions(bad: Served, change: dict[str, Any], message: str):
    body = json.dumps({"model": "tiny", "prompt": "a"} | change).encode()
    status, found, _ = post(bad, "/v1/completions", body)
    assert (status, found["error"]["message"]) == (404 if "model" in change else 400, message)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body is not JSON: Expecting value"),
        (b"[]", "the body is not a JSON object"),
        (b"\xff", "the body is not JSON: 'utf-8' codec can't decode"),
        (b'{"seed": NaN}', "the body is not JSON: NaN is no JSON"),
        (b'{"model": "\\ud800"}', "the body is not JSON: 'utf-8' codec can't encode"),
        (b"[" * 10**6, "the body is not JSON: "),
    ],
)
def test_bodies_that_are_no_request(bad: Served, body: bytes, message: str):
    status, found, _ = post(bad, "/v1/chat/completions", body)
    assert status == 400 and found["error"]["message"].startswith(message)


@pytest.fixture(scope="module")
def bad() -> Any:
    with Served(writes(EOS)) as served:
        yield served


def test_too_many_waiting_are_told_to_come_again():
    with Served(writes(EOS), max_waiting=3) as served:
        served.engine.going.clear()
        with ThreadPoolExecutor(3) as pool:
            waiting = [pool.submit(ask, served.client()) for _ in range(3)]
            until(lambda: served.running.count == 3)
            body = json.dumps({"model": "tiny", "messages": HI}).encode()
            status, error, headers = post(served, "/v1/chat/completions", body)
            assert (status, error["error"]["code"], headers["Retry-After"]) == (429, "too_many_waiting", "2")
            served.engine.going.set()
            assert [w.result(20).choices[0].finish_reason for w in waiting] == ["stop"] * 3
        assert ask(served.client()).choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_is_cancelled_and_the_others_go_on(stream: bool):
    with Served(Scripted(lambda request: spelled("a" * 1000))) as served:
        served.engine.going.clear()
        body = json.dumps({"model": "tiny", "messages": HI, "n": 2, "stream": stream}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
        connection.request("POST", "/v1/chat/completions", body, {"Authorization": f"Bearer {TOKEN}"})
        until(lambda: len(served.engine.seen) == 2)
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(ask, served.client())
            until(lambda: len(served.engine.seen) == 3)
            connection.sock.close() if not stream else connection.getresponse().close()
            connection.close()
            until(lambda: sorted(served.engine.cancelled) == sorted(r.id for r in served.engine.seen[:2]))
            assert "\namalgam_waiting_requests 1\n" in post(served, "/metrics", None)[1]
            served.engine.going.set()
            assert other.result(20).usage.completion_tokens == 1000
        assert served.running.count == 0


def test_a_stream_that_is_closed_by_the_official_client():
    with Served(Scripted(lambda request: spelled("a" * 3000))) as served:
        with ask(served.client(), stream=True) as stream:
            assert sum(1 for _, _ in zip(range(5), stream, strict=False)) == 5
        until(lambda: served.engine.cancelled == [served.engine.seen[0].id])


def test_a_request_that_fails_or_takes_too_long_ends_alone():
    def write(request: Request) -> list[int]:
        return [*spelled("ab"), -1] if request.counter else spelled("ab" + EOS)

    with Served(Scripted(write), request_seconds=0.3) as served:
        client = served.client()
        with pytest.raises(openai.InternalServerError, match="the request failed: NaN logits"):
            ask(client, n=2)
        with pytest.raises(openai.APIError, match="the request failed: NaN logits"):
            list(ask(client, n=2, stream=True))
        assert ask(client).choices[0].message.content == "ab"
        served.engine.going.clear()
        for stream in (True, False):
            with pytest.raises(openai.APIError, match="no whole answer in --request-seconds 0.3"):
                list(ask(client, stream=stream))
        until(lambda: len(served.engine.cancelled) >= 2)
        assert served.running.count == 0


def test_a_bug_is_a_500_whose_traceback_is_in_the_log(caplog: pytest.LogCaptureFixture):
    speaks = Speaker("tiny")
    speaks.prompt = lambda messages, mode: 1 // 0  # type: ignore[method-assign]
    with Served(writes(EOS), speaks) as served, pytest.raises(openai.InternalServerError, match="the server has a bug"):
        ask(served.client())
    assert "ZeroDivisionError" in caplog.text


def test_the_engine_fails():
    engine = writes(EOS)
    engine.step = lambda: 1 // 0  # type: ignore[method-assign]
    with Served(engine) as served:
        with pytest.raises(openai.InternalServerError, match="the engine has failed; the server ends"):
            ask(served.client())
        until(served.running.broken.done)
        assert isinstance(served.running.broken.exception(), ZeroDivisionError)
