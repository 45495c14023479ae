"""How fast the rollout engine decodes, prefills and forks a model of 729 million parameters on one GPU.

    python benchmarks/engine.py [--only decode,prefill,...]

Parts, each with the ceilings measured as the command starts:

    decode      1, 16, 64 and 256 requests, beside transformers' generate
    context     16 requests that hold 32,768 tokens each
    prefill     prompts of 512 to 32,768 tokens
    precision   256 requests with FP8 and with FP4 experts
    draft       1 and 64 requests with the MTP block's drafts, which random weights make worthless: what they cost
    records     256 requests: what writing down experts, picks and sets costs, and the journal
    group       16 responses to one prompt of 4,096 tokens, beside 16 separate requests

`ms` is a step of the engine, from call to call, its host's work included; a floor is one read of all weights at the
rate of a copy. Weights are random, prompts too, and nothing ends a response before its time. Exit code 1 if a part
failed or a goal was missed.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import parts
import torch
from floors import Ceilings
from parts import Row, Rows
from training_setting import model_config
from transformers import DeepseekV4Config

from amalgam.model import DeepseekV4, initialize
from amalgam.model.precision import set_precision, store_weights
from amalgam.rl.engine import Engine
from amalgam.rl.journal import Journal
from amalgam.rl.records import recorded
from amalgam.rl.settings import EngineSettings
from amalgam.rl.trajectory import Request, SamplingParams
from amalgam.settings import Precision

GOALS = {1: 1_000, 16: 14_000, 64: 50_000, 256: 170_000}  # tokens a second by requests that decode
TRANSFORMERS = {1: 32, 16: 16, 64: 16, 256: 16}  # steps of its generate
PROMPT = 64  # tokens, where nothing else is said


@dataclass(frozen=True)
class Setting:
    ceilings: Ceilings
    model: DeepseekV4Config
    requests: Sequence[int] = (1, 16, 64, 256)
    steps: int = 128  # that are timed
    context: int = 32_768
    prompts: Sequence[int] = (512, 4_096, 32_768)
    group: tuple[int, int, int] = (16, 4_096, 64)  # members, tokens of the prompt, of a response
    device: str = "cuda"
    engine: EngineSettings = field(default_factory=EngineSettings)


def whole(ceilings: Ceilings) -> Setting:
    return Setting(ceilings, model_config())


def made(setting: Setting, precision: Precision | None = None, **changes: Any) -> DeepseekV4:
    config = DeepseekV4Config(**(setting.model.to_dict() | changes))
    dtype = torch.float32 if setting.device == "cpu" else torch.bfloat16  # the tests'
    model = initialize(config, seed=0).to(setting.device, dtype).eval()
    if precision is not None:
        set_precision(model, precision)
        store_weights(model)
    return model


def random_requests(setting: Setting, count: int, prompt: int, response: int, **params: Any) -> list[Request]:
    draw = np.random.default_rng(0)
    prompts = draw.integers(2, setting.model.vocab_size, (count, prompt)).astype(np.int32)
    return [Request(i, i, prompts[i], SamplingParams(max_new_tokens=response, **params)) for i in range(count)]


def step_time(engine: Engine, requests: list[Request], steps: int) -> tuple[float, float]:
    """Seconds of a step while all requests decode, and tokens a step; the engine is empty after it."""
    started: set[int] = set()
    for request in requests:
        engine.submit(request)
    while len(started) < len(requests):
        started |= {update.id for update in engine.step()}
    for _ in range(4):
        engine.step()
    began, tokens = _now(), 0
    for _ in range(steps):
        tokens += sum(len(update.token_ids) for update in engine.step())
    seconds = (_now() - began) / steps
    while engine.busy:
        for request in requests:
            engine.cancel(request.id)
        engine.step()
    return seconds, tokens / steps


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def decoded(
    setting: Setting, name: str, model: DeepseekV4, count: int, *, prompt: int = PROMPT, journal: Any = None,
    engine: EngineSettings | None = None, **params: Any,
) -> Row:  # fmt: skip
    """A row of `count` requests that decode."""
    settings = replace_settings(engine or setting.engine, max_batch=count, context=prompt + 4 * setting.steps)
    served = Engine(model, (), settings=settings, journal=journal)
    requests = random_requests(setting, count, prompt, 4 * setting.steps - 1, **params)
    seconds, tokens = step_time(served, requests, setting.steps)
    floor = sum(p.nbytes for p in (*model.parameters(), *model.buffers())) / setting.ceilings.copy_gbs / 1e6
    return {
        "name": name, "tokens": count, "ms": 1e3 * seconds, "tokens_a_second": round(tokens / seconds),
        "floor_ms": floor, "ratio": 1e3 * seconds / floor,
    }  # fmt: skip


def replace_settings(settings: EngineSettings, **changes: Any) -> EngineSettings:
    return EngineSettings(**(settings.model_dump() | changes))


def decode(setting: Setting) -> Rows:
    model = made(setting)
    for count in setting.requests:
        row = decoded(setting, "requests that decode", model, count)
        if count in GOALS:
            row |= {"goal": f"{GOALS[count]:,} tokens/s", "met": row["tokens_a_second"] >= GOALS[count]}
        yield row
        yield transformers(setting, model, count, row["ms"])


def transformers(setting: Setting, model: DeepseekV4, count: int, ms: float) -> Row:
    from training_step import theirs

    other: Any = theirs(setting, model).eval()  # pyright: ignore[reportArgumentType]
    other.generation_config.eos_token_id = None
    prompts = np.stack([request.prompt_ids for request in random_requests(setting, count, PROMPT, 1)])
    ids, steps = torch.from_numpy(prompts).long().to(setting.device), TRANSFORMERS.get(count, 4)

    def seconds(tokens: int) -> float:
        began = _now()
        other.generate(ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=True, top_k=0)
        return _now() - began

    seconds(2)
    each = (seconds(steps + 1) - seconds(1)) / steps
    return {
        "name": "transformers' generate", "tokens": count, "ms": 1e3 * each, "tokens_a_second": round(count / each),
        "ours_ms": ms, "over_ours": 1e3 * each / ms,
    }  # fmt: skip


def context(setting: Setting) -> Rows:
    model = made(setting, max_position_embeddings=2 * setting.context)
    yield decoded(setting, f"16 requests of {setting.context:,} tokens", model, 16, prompt=setting.context)


def prefill(setting: Setting) -> Rows:
    """Rates of whole prompts of one length, as many as make up the longest."""
    model = made(setting, max_position_embeddings=2 * setting.context)
    longest = max(setting.prompts)
    for prompt in setting.prompts:
        count = longest // prompt
        settings = replace_settings(setting.engine, max_batch=max(count, 1), context=prompt + 8)
        engine, times = Engine(model, (), settings=settings), []
        for _ in range(3):
            began = _now()
            engine.generate(random_requests(setting, count, prompt, 1))
            times.append(_now() - began)
        seconds = min(times)
        yield {
            "name": f"prompts of {prompt:,}", "tokens": count * prompt, "ms": 1e3 * seconds,
            "tokens_a_second": round(count * prompt / seconds),
        }  # fmt: skip


def precision(setting: Setting) -> Rows:
    most = max(setting.requests)
    for name, of in (("bf16", None), ("FP8", Precision(experts="fp8")), ("FP4", Precision(experts="fp4"))):
        model = made(setting, of)
        row = decoded(setting, f"{name} experts", model, most)
        yield row | {"weights_gib": sum(t.nbytes for t in (*model.parameters(), *model.buffers())) / 2**30}


def draft(setting: Setting) -> Rows:
    model = made(setting, num_nextn_predict_layers=1)
    for count in (1, 64):
        for kind in ("off", "mtp"):
            engine = replace_settings(setting.engine, draft=kind)
            yield decoded(setting, f"drafts: {kind}", model, count, engine=engine)


def records(setting: Setting) -> Rows:
    model, most = made(setting), max(setting.requests)
    kinds: dict[str, tuple[dict[str, bool], dict[str, Any]]] = {
        "nothing written down": ({"experts": False}, {}),
        "experts": ({}, {}),
        "experts and picks": ({"picks": True}, {}),
        "top_p 0.95": ({}, {"top_p": 0.95}),
        "top_p 0.95 and its sets": ({"sets": True}, {"top_p": 0.95}),
    }
    for name, (flags, params) in kinds.items():
        yield decoded(setting, name, model, most, engine=replace_settings(setting.engine, **flags), **params)
    with new_journal(model, setting.engine) as journal:
        yield decoded(setting, "experts, in a journal", model, most, journal=journal)


@contextmanager
def new_journal(model: DeepseekV4, settings: EngineSettings) -> Iterator[Journal]:
    with tempfile.TemporaryDirectory() as folder:
        journal = Journal(Path(folder), "engine", **recorded(model, settings))
        yield journal
        journal.close()


def group(setting: Setting) -> Rows:
    """One prompt for all members, and one each."""
    members, prompt, response = setting.group
    model = made(setting, max_position_embeddings=2 * (prompt + response))
    settings = replace_settings(setting.engine, max_batch=members, context=prompt + response)
    separate = random_requests(setting, members, prompt, response)
    together = [replace(request, group=0, prompt_ids=separate[0].prompt_ids) for request in separate]
    engine, found = Engine(model, (), settings=settings), {}
    for name, requests in (("separate requests", separate), ("a group", together)):
        times = []
        for _ in range(3):
            began = _now()
            engine.generate(requests)
            times.append(_now() - began)
        found[name] = min(times)
        over = {} if name != "a group" else {"faster": found["separate requests"] / found[name]}
        yield {"name": name, "tokens": members * response, "ms": 1e3 * found[name], **over}


PARTS: dict[str, Callable[[Setting], Rows]] = {
    "decode": decode,
    "context": context,
    "prefill": prefill,
    "precision": precision,
    "draft": draft,
    "records": records,
    "group": group,
}


def main() -> int:
    _, names = parts.asked(parts.parser_of(__doc__, PARTS), PARTS)
    return parts.run("engine", PARTS, names, whole)


if __name__ == "__main__":
    sys.exit(main())
