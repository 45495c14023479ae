"""A checkpoint that answers: what `amalgam chat` and `amalgam generate` have in common."""

import math
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from ..errors import UserError
from ..model import end_ids, load
from ..model.auto import check_config, context_length
from ..model.checkpoint import check_weights
from ..model.config import resolve
from ..model.template import speaker
from ..rl.engine import Engine
from ..rl.settings import EngineSettings
from ..settings import FULL, Precision
from .recipe_errors import explain, message
from .yaml_lines import Document, Origin

ROWS_AT_ONCE = 64  # of a file: they decode together, and are written together


class Speaker:
    """A checkpoint that answers, on a GPU if there is one.

    Its weights are loaded when `engine` is first asked for. UserError for a precision that the model cannot have.
    """

    def __init__(self, checkpoint: str, precision: Precision = FULL):
        self.folder, self.precision = resolve(checkpoint), precision
        check_weights(self.folder)
        self.vocabulary = check_config(self.folder, precision)
        self.encoding, self.tokenizer = speaker(self.folder)
        self.end_ids, self.context = end_ids(self.folder), context_length(self.folder)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def engine(self) -> Engine:
        model = load(self.folder, device=self.device, precision=self.precision, stored=True)
        return Engine(model, self.end_ids, settings=EngineSettings(max_batch=ROWS_AT_ONCE))

    def prompt(self, messages: list[dict[str, Any]], mode: str) -> np.ndarray:
        return np.array(self.encoding.prompt_ids(self.tokenizer, messages, mode), np.int32)

    def text(self, ids: np.ndarray) -> str:
        """The text of an answer, without the end token."""
        shown = ids[:-1] if len(ids) and ids[-1] in self.end_ids else ids
        return self.tokenizer.decode(shown.tolist(), skip_special_tokens=False)


def check_mode(speaks: Speaker, mode: str) -> None:
    """UserError where the checkpoint's chat format has no such mode."""
    try:
        speaks.prompt([{"role": "user", "content": "?"}], mode)
    except ValueError as error:
        raise UserError(f"--mode {mode}: {error}") from None


def check_temperature(temperature: float) -> None:
    if not math.isfinite(temperature):
        raise UserError(f"--temperature {temperature}: want a finite number")


def parse_precision(text: str) -> Precision:
    """`experts=fp4,kv=fp8`: the keys and values of a recipe's `precision`. UserError names the key."""
    given: dict[str, str] = {}
    for part in filter(None, text.split(",")):
        key, equals, value = (each.strip() for each in part.partition("="))
        if not equals or key in given:
            raise UserError(f"--precision {text}: want each key once, such as experts=fp4,indexer=fp4,kv=fp8")
        given[key] = value
    try:
        return Precision.model_validate(given)
    except ValidationError as error:
        document = Document(given, {(): Origin("--precision", "")})
        raise UserError(message(explain(error, Precision), document)) from None
