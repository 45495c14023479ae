"""`amalgam serve` over the rollout engine with the tiny preset: the command, and many clients at once."""

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from typer.testing import CliRunner

from amalgam.pipelines.cli import app
from amalgam.pipelines.serve import start_engine
from amalgam.pipelines.serving.protocol import ApiError
from amalgam.pipelines.speak import Speaker
from amalgam.rl.engine import Engine
from amalgam.rl.trajectory import Request, SamplingParams

from .served import Served
from .test_serve import until

SUM = "State the final answer to the following arithmetic problem: {} + {} ="


def messages(i: int) -> list[Any]:
    return [{"role": "user", "content": SUM.format(i % 10, i // 10)}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    speaks = Speaker("tiny")
    engine = start_engine(speaks)
    with Served(engine, speaks, context=engine.context) as served:
        yield served


def test_200_at_once_get_what_each_gets_alone(served: Served):
    """Streamed and whole, with seeds; and what the engine itself gives for the same counters."""
    client = served.client()

    def ask(i: int) -> str:
        settings = {"model": "tiny", "messages": messages(i % 100), "seed": i, "max_tokens": 8, "temperature": 4}
        if i % 2:
            return client.chat.completions.create(**settings).choices[0].message.content
        chunks = list(client.chat.completions.create(**settings, stream=True))
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(200) as pool:
        found = list(pool.map(ask, range(200)))
    assert served.running.count == 0
    speaks = served.speaks
    requests = [
        Request(i, i, speaks.prompt(messages(i % 100), "chat"), SamplingParams(4, 8, seed=i), noise=0)
        for i in range(200)
    ]
    wanted = [speaks.text(t.response_ids) for t in start_engine(speaks).generate(requests)]
    differ = [i for i in range(200) if found[i] != wanted[i]]  # near-ties, which fp32 rounding may turn
    assert len(differ) <= 2 and len(set(found)) > 100
    assert ask(7) == found[7] or 7 in differ


def test_choices_of_a_seed(served: Served):
    def ask(**more: Any) -> list[str]:
        answer = served.client().completions.create(model="tiny", prompt="The", n=4, max_tokens=12, **more)
        assert answer.usage.prompt_tokens == 2
        return [choice.text for choice in answer.choices]

    assert ask(seed=5) == ask(seed=5) != ask(seed=6)
    assert len(set(ask(seed=5))) == 4
    assert ask() != ask()
    assert len(set(ask(temperature=0))) == 1


def test_cut_off_clients_leave_nothing_behind(served: Served):
    def cut(i: int) -> None:
        with served.client().completions.create(model="tiny", prompt="The", max_tokens=3000, stream=True) as stream:
            for _, _chunk in zip(range(i % 4), stream, strict=False):
                pass

    with ThreadPoolExecutor(20) as pool:
        list(pool.map(cut, range(20)))
    until(lambda: served.running.count == 0)
    until(lambda: not served.engine.busy)


def test_a_stop_string_ends_the_engines_request_too(served: Served):
    answer = served.client().chat.completions.create(
        model="tiny", messages=messages(34), temperature=0, stop="</ans", max_tokens=40
    )
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("<answer>7", "stop")
    assert answer.usage.completion_tokens == 3


def test_the_command_with_a_token_of_its_own_until_sigterm(tmp_path: Path):
    code = "from amalgam.pipelines.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", "tiny", "--port", "0"]
    environment = {k: v for k, v in os.environ.items() if k != "AMALGAM_SERVE_TOKEN"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        lines: Any = process.stdout
        (port,) = re.findall(r"^tiny, mode chat, on \w+: http://127\.0\.0\.1:(\d+)/v1\n$", next(lines))
        (token,) = re.findall(r"^token: (\S{32})   \(made for this run; AMALGAM_SERVE_TOKEN or --token", next(lines))
        client: Any = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=token, max_retries=0, timeout=60)
        answer = client.chat.completions.create(model="tiny", messages=messages(34), temperature=0)
        assert answer.choices[0].message.content == "<answer>7</answer>"
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="not-that").models.list()
        stream = client.completions.create(model="tiny", prompt="The", max_tokens=200, stream=True)
        chunks = [next(stream)]
        process.send_signal(signal.SIGTERM)
        assert next(lines).startswith("stopping; 1 requests have 20 s to end")
        with pytest.raises(OSError):
            http.client.HTTPConnection("127.0.0.1", port, timeout=5).request("GET", "/health")
        chunks += stream
        assert chunks[-1].choices[0].finish_reason in ("stop", "length")
        assert process.wait(30) == 0


def test_what_is_open_when_the_time_is_over_is_told(served: Served):
    """What the command does then, called by hand."""
    try:
        stream = served.client().completions.create(model="tiny", prompt="The", max_tokens=4000, stream=True)
        next(stream)
        served.server.stopping = True
        with pytest.raises(openai.InternalServerError, match="the server is stopping"):
            served.client().completions.create(model="tiny", prompt="The")
        served.loop.call_soon_threadsafe(served.running.abort, ApiError(503, "the server is stopping"))
        with pytest.raises(openai.APIError, match="the server is stopping"):
            list(stream)
        until(lambda: not served.engine.busy)
    finally:
        served.server.stopping = False


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--token-file", "nowhere"], "--token-file nowhere: No such file or directory"),
        (["--token-file", "short"], "short: want a token of at least 16 ASCII characters without spaces"),
        (["--mode", "loud"], "--mode loud: unknown mode 'loud'; want one of chat, high, max"),
        (["--host", "192.0.2.1"], "--host 192.0.2.1 --port 8000: Cannot assign requested address"),
        (["--port", "PORT"], "--host 127.0.0.1 --port PORT: Address already in use"),
        (["--precision", "kv=fp3"], "--precision: kv: "),
    ],
)
def test_bad_input_starts_nothing(flags: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(Engine, "__init__")
    Path("short").write_text("0123456789abcde\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        result = CliRunner().invoke(app, ["serve", "tiny", *(flag.replace("PORT", port) for flag in flags)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {message.replace('PORT', port)}")
    assert result.stdout == ""
