"""What clients may ask for: the requests of OpenAI's chat and completions API that are built, and the errors' shape.

A key that is not listed here is refused, and so is a value that would have no effect: nobody should believe that a
penalty was applied. Labels alone (LABELS) are taken and have no effect.
"""

import json
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import Field, PositiveInt, ValidationError

from ...settings import Settings
from ..recipe_errors import suggest

MAX_CHOICES = 128  # of one request
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
LABELS = ("user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention", "service_tier")
# Keys that clients send with the value that changes nothing, which is the only one that is built.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "store": (False,),
    "parallel_tool_calls": (True,),
    "modalities": (["text"],),
    "echo": (False,),
    "best_of": (1,),
    "suffix": ("",),
    "top_logprobs": (0,),
}
_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}

Stop = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]


class ApiError(Exception):
    """What a client gets in place of an answer: an HTTP status and, in OpenAI's shape, what is wrong with which key."""

    def __init__(self, status: int, text: str, param: str | None = None, code: str | None = None, **headers: str):
        super().__init__(text)
        self.status, self.text, self.param, self.code = status, text, param, code
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    def body(self) -> dict[str, Any]:
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.text, "type": kind, "param": self.param, "code": self.code}}


class StreamOptions(Settings):
    include_usage: bool = False
    """A last chunk with the tokens that were used."""
    include_obfuscation: bool | None = None
    """OpenAI pads chunks against eavesdroppers; here nothing is padded, which `false` asks for."""


class Sampled(Settings):
    """What both kinds of request say about sampling. None: not given."""

    model: str
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1: all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    max_tokens: PositiveInt | None = None
    """All that the context has room for, if not given."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class ChatRequest(Sampled):
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    response_format: dict[str, Any] | None = None
    max_completion_tokens: PositiveInt | None = None
    logprobs: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None


class CompletionRequest(Sampled):
    prompt: Any
    """A text, its token ids, or a list of either."""
    logprobs: Annotated[int, Field(ge=0, le=0)] | None = None
    """0: of the tokens sampled. Those of others are not kept."""


R = TypeVar("R", bound=Sampled)


def read(kind: type[R], body: bytes) -> R:
    """The request in a body. ApiError names the key."""
    try:
        text = body.decode()
        given = json.loads(text, parse_constant=_no_constant)
        if "\\u" in text:
            json.dumps(given, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON: {' '.join(str(error).split())}") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the body is not a JSON object")
    given = {key: value for key, value in given.items() if value is not None and key not in LABELS}
    for key in [key for key in given if key in _NEUTRAL and key not in kind.model_fields]:
        if given.pop(key) not in _NEUTRAL[key]:
            raise ApiError(400, f"{key}: not built; leave it out", key, "unsupported_parameter")
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        wrong = error.errors()[0]
        path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in wrong["loc"]).lstrip(".")
        raise ApiError(400, f"{path}: {_explain(wrong, kind)}", path) from None


def _explain(wrong: Any, kind: type[Sampled]) -> str:
    if wrong["type"] == "missing":
        return "missing"
    if wrong["type"] == "extra_forbidden":
        known = kind.model_fields if len(wrong["loc"]) == 1 else StreamOptions.model_fields
        return f"unknown or not built; {suggest(str(wrong['loc'][-1]), known)}"
    value = wrong["input"]
    got = {dict: "an object", list: "a list"}.get(type(value)) or json.dumps(
        value[:60] if isinstance(value, str) else value
    )
    return f"{wrong['msg'][0].lower()}{wrong['msg'][1:]}, got {got}"


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")
