"""What is wrong with a request, before it costs anything."""

import math

from .trajectory import Request


def request_problem(request: Request, vocabulary: int, has_tokenizer: bool, sets: bool) -> str | None:
    """Why no engine with such a model can run it; None if one can."""
    params, prompt, past = request.params, request.prompt_ids, request.past
    if not (0 <= request.id < 2**63 and 0 <= request.counter < 2**63):
        return "its id, and its noise if it has one, have to be from 0 to 2^63 - 1: they count the noise"
    if not len(prompt):
        return "its prompt is empty"
    if not 0 <= int(prompt.min()) <= int(prompt.max()) < vocabulary:
        return f"its prompt has a token outside the vocabulary of {vocabulary}"
    if params.max_new_tokens < 1:
        return f"max_new_tokens: {params.max_new_tokens}; want at least 1"
    if not (math.isfinite(params.temperature) and (params.temperature == 0 or params.temperature >= 1e-5)):
        return f"temperature: {params.temperature}; want 0, or a finite number from 0.00001 on"
    if params.top_k < 0 or not 0 < params.top_p <= 1 or not 0 <= params.min_p <= 1:
        return (
            f"top_k {params.top_k}, top_p {params.top_p}, min_p {params.min_p}; want top_k from 0 on, top_p above 0 "
            "and up to 1, min_p from 0 to 1"
        )
    if unknown := [token for token in params.stop_ids if not 0 <= token < vocabulary]:
        return f"stop_ids: {unknown[0]} is no token of the vocabulary of {vocabulary}"
    if params.stop and not has_tokenizer:
        return "stop strings need the engine to have a tokenizer"
    if not all(params.stop):
        return "an empty stop string"
    if params.allowed is not None and (params.allowed.shape != (vocabulary,) or not params.allowed.any()):
        return f"allowed: want bool [{vocabulary}], not all of it False"
    if past is not None and not len(past.response_ids) == len(past.logprobs) == len(past.versions):
        return "its past has tokens, log-probs and versions of different lengths"
    if sets and past is not None and len(past.response_ids) != len(past.sets or ()):
        return "the engine writes down sets, and its past does not have one for each token"
    return None
