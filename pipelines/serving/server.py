"""The HTTP server: routes, who may use them, and what becomes of a request.

Every response but /health's needs the token. What a browser sends on behalf of a page is refused: it has an Origin, and
on loopback a page that rebinds its name to this machine has a Host of its own. Where a client goes away, its requests
are cancelled in the engine.
"""

import asyncio
import hmac
import ipaddress
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from ..speak import Speaker
from .answers import Answer, Delta
from .prompts import Job, chat_job, completion_job
from .protocol import ApiError, ChatRequest, CompletionRequest, Sampled, read
from .responses import Response, Rows
from .running import Running

MAX_BODY = 16 * 2**20  # bytes
METRICS_SECONDS = 30.0  # that the engine may take to come to the end of a step
_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
_log = logging.getLogger("amalgam.serve")

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Server:
    """`name`: the model's, to clients. `context`: most tokens of a prompt and its answer. `mode`: that of chats without
    a reasoning_effort. `local`: bound to loopback.
    """

    def __init__(
        self,
        speaks: Speaker,
        running: Running,
        *,
        name: str,
        context: int,
        token: str,
        mode: str,
        local: bool,
        request_seconds: float,
    ) -> None:
        self._speaks, self._running = speaks, running
        self._name, self._token, self._mode, self._local = name, token.encode(), mode, local
        self._context, self._seconds = context, request_seconds
        self._preparing = ThreadPoolExecutor(1, "prompts")  # a long prompt's tokenization must not hold up the others
        self._statuses = Counter[int]()
        self.stopping = False

    def app(self) -> web.Application:
        app = web.Application(client_max_size=MAX_BODY, middlewares=[self._guard])
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._completions)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{name:.+}", self._model)
        app.router.add_get("/health", self._health)
        app.router.add_get("/metrics", self._metrics)
        return app

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuses who may not ask, and gives every error OpenAI's shape."""
        try:
            self._check(request)
            response = await handler(request)
        except ConnectionError:
            raise  # nobody is there to be told
        except Exception as error:
            wrong = _shaped(error)
            response = web.json_response(wrong.body(), status=wrong.status, headers=_HEADERS | wrong.headers)
        self._statuses[response.status] += 1
        return response

    def _check(self, request: web.Request) -> None:
        if "Origin" in request.headers:
            raise ApiError(403, "a web page asks, by its Origin header; browsers are not served")
        if self._local and not _is_here(request.headers.get("Host", "")):
            raise ApiError(403, "the Host header is neither localhost nor an address")
        if request.path == "/health":
            return
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = token.strip().encode("utf-8", "surrogateescape")
        if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._token):
            raise ApiError(
                401,
                "no valid token; send the header Authorization: Bearer TOKEN with the one that the server has",
                code="invalid_api_key",
                WWW_Authenticate="Bearer",
            )

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response(
            {"status": "stopping" if self.stopping else "ok"}, status=503 if self.stopping else 200
        )

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]}, headers=_HEADERS)

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._described(), headers=_HEADERS)

    def _described(self) -> dict[str, Any]:
        return {"id": self._name, "object": "model", "created": 0, "owned_by": "amalgam"}

    def _check_model(self, name: str) -> None:
        if name != self._name:
            raise ApiError(
                404, f"model: {name!r} is not here; this server has {self._name!r}", "model", "model_not_found"
            )

    async def _metrics(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(METRICS_SECONDS):
                found = await self._running.metrics()
        except TimeoutError:
            raise ApiError(503, f"waited {METRICS_SECONDS:g} s for the engine to end its step") from None
        lines = [f"# TYPE amalgam_{name} gauge\namalgam_{name} {value:g}" for name, value in found.items()]
        lines.append("# TYPE amalgam_responses_total counter")
        lines += [f'amalgam_responses_total{{status="{s}"}} {n}' for s, n in sorted(self._statuses.items())]
        return web.Response(text="\n".join(lines) + "\n", headers=_HEADERS)

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        asked = read(ChatRequest, await request.read())
        return await self._answer(request, asked, lambda: chat_job(self._speaks, self._context, asked, self._mode))

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        asked = read(CompletionRequest, await request.read())
        return await self._answer(request, asked, lambda: completion_job(self._speaks, self._context, asked))

    async def _answer(
        self, request: web.Request, asked: ChatRequest | CompletionRequest, prepare: Callable[[], Job]
    ) -> web.StreamResponse:
        """Whole, or as a stream whose errors are its last event."""
        self._check_model(asked.model)
        if self.stopping:
            raise ApiError(503, "the server is stopping")
        if asked.stream_options and not asked.stream:
            raise ApiError(400, "stream_options: want it with stream alone", "stream_options")
        stream = web.StreamResponse(headers=_HEADERS | {"Content-Type": "text/event-stream; charset=utf-8"})
        try:
            async with asyncio.timeout(self._seconds):
                job = await asyncio.get_running_loop().run_in_executor(self._preparing, prepare)
                kind = "chat.completion" if isinstance(asked, ChatRequest) else "text_completion"
                wants_logprobs = asked.logprobs is not None and asked.logprobs is not False
                response = Response(kind, self._name, self._speaks.tokenizer, job, wants_logprobs)
                answers = [Answer(self._speaks, job, asked.stop or ()) for _ in job.requests]
                async with self._running.run(job.requests) as updates:
                    if not asked.stream:
                        return await _whole(response, answers, updates)
                    await stream.prepare(request)
                    await _stream(stream, response, answers, updates, asked)
        except TimeoutError:
            error: Exception = ApiError(
                504, f"no whole answer in --request-seconds {self._seconds:g}", code="timeout", X_Should_Retry="false"
            )
        except ConnectionError:
            raise
        except Exception as raised:
            error = raised
        else:
            await stream.write_eof()
            return stream
        if not stream.prepared:
            raise error
        await stream.write(_event(_shaped(error).body()))
        await stream.write_eof()
        return stream


async def _whole(
    response: Response, answers: list[Answer], updates: AsyncIterator[tuple[int, Any]]
) -> web.StreamResponse:
    parts: list[list[Delta]] = [[] for _ in answers]
    rows = [Rows() for _ in answers]
    async for place, update in updates:
        if answers[place].finish is None:
            parts[place] += _fed(answers[place], update)
            rows[place].add(update.token_ids, update.logprobs)
            if all(answer.finish for answer in answers):
                break
    return web.json_response(response.whole(answers, parts, rows), headers=_HEADERS, dumps=_dumps)


async def _stream(
    stream: web.StreamResponse,
    response: Response,
    answers: list[Answer],
    updates: AsyncIterator[tuple[int, Any]],
    asked: Sampled,
) -> None:
    for place in range(len(answers) if response.is_chat else 0):
        await stream.write(_event(response.first(place)))
    async for place, update in updates:
        if answers[place].finish is None:
            deltas = _fed(answers[place], update)
            row = Rows().add(update.token_ids, update.logprobs)
            if chunk := response.chunk(place, answers[place], deltas, row):
                await stream.write(_event(chunk))
            if all(answer.finish for answer in answers):
                break
    if asked.stream_options and asked.stream_options.include_usage:
        await stream.write(_event(response.last(answers)))
    await stream.write(b"data: [DONE]\n\n")


def _fed(answer: Answer, update: Any) -> list[Delta]:
    """The parts that an update adds. ApiError where the engine gave the request up."""
    end: Any = update.finished
    if end is None:
        return answer.feed(update.token_ids, None)
    if end.finish == "failed":
        raise ApiError(500, f"the request failed: {end.error}", X_Should_Retry="false")
    if end.finish == "cancelled":
        raise ApiError(503, "the request was cancelled")
    return answer.feed(update.token_ids, end.finish)


def _shaped(error: Exception) -> ApiError:
    """Any error as a client may see it; what nobody foresaw goes to the log, with its traceback."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ApiError(413, f"the body is larger than {MAX_BODY} bytes")
    if isinstance(error, web.HTTPException):
        return ApiError(error.status, error.reason)
    _log.error("a request failed", exc_info=error)
    return ApiError(500, "the server has a bug; its log has the traceback", X_Should_Retry="false")


def _event(body: dict[str, Any]) -> bytes:
    return f"data: {_dumps(body)}\n\n".encode()


def _dumps(body: Any) -> str:
    return json.dumps(body, ensure_ascii=False)


def _is_here(header: str) -> bool:
    """Whether a Host header has no name that somebody else could let lead here: localhost, or an address as it is."""
    name, colon, port = header.rpartition(":")
    name = name if colon and port.isdigit() else header
    try:
        return name.lower() == "localhost" or bool(ipaddress.ip_address(name.removeprefix("[").removesuffix("]")))
    except ValueError:
        return False
