"""What holds of a whole model: waits for the device, equal bits, loss curves; training.py is the command.

Bits are compared between a learner and a sampler, which in low precision holds codes in place of weights.
"""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import bits
import gpu
import torch
from parts import Row, Rows
from torch import Tensor
from training_setting import Setting
from training_step import Trainer, lengths_of, ours, packed_loss

from amalgam.kernels.dispatch import VARIABLE
from amalgam.kernels.losses import chosen_logprobs, token_logprobs
from amalgam.model import DeepseekV4
from amalgam.model.cache import Cache
from amalgam.model.precision import set_precision, store_weights
from amalgam.settings import FULL, Precision

RUNS = 5  # of a step whose gradients have to have the same bits
LOW = Precision(experts="fp4", linear="fp8", indexer="fp4", kv="fp8")
CURVES = {
    "bf16": FULL,
    "FP8 rows": Precision(kv="fp8"),
    "FP4 experts, FP8 products, FP4 indexer, FP8 rows": LOW,
}


def waits(setting: Setting) -> Rows:
    """Whether a step's parts wait for the device, as PyTorch sees it; kernels are compiled before."""
    tokens = setting.steps[0]
    model, drawn = ours(setting), random_tokens(setting, tokens)
    trainer = Trainer(model, packed_loss(model, drawn, lengths_of(tokens, setting.documents)))
    trainer.step()
    trainer.backward()
    loss = trainer.loss()
    for name, run in (("forward", trainer.loss), ("backward", loss.backward), ("update", trainer.update)):
        found = "none"
        try:
            with gpu.no_waits():
                run()
        except RuntimeError as error:
            found = str(error).partition("\n")[0]
        yield {"name": name, "tokens": tokens, "waits": found, "goal": "none", "met": found == "none"}


def random_tokens(setting: Setting, count: int) -> Tensor:
    return torch.randint(setting.model.vocab_size, (count,), device=setting.device)


# --- bits


def same_bits(setting: Setting) -> Rows:
    """A step's gradients in several runs; hidden states and the tokens' log-probs, however they are computed."""
    model, tokens = ours(setting), setting.steps[0]
    drawn = random_tokens(setting, tokens)
    trainer = Trainer(model, packed_loss(model, drawn, lengths_of(tokens, setting.documents)))
    count, first = bits.Count(), []
    for _ in range(RUNS):
        trainer.backward()
        found = [p.grad for p in trainer.weights.values() if p.grad is not None]
        for a, b in zip(found, first, strict=False):
            count.add(a, b)
        first = first or found
    yield counted(f"gradients in {RUNS} runs", tokens, count)
    del trainer, first
    lengths = bits.random_lengths(*setting.bits, random.Random(0))
    for name, precision in (("", FULL), (", low precision", LOW)):
        learner, sampler = ours(setting), ours(setting)
        set_precision(learner, precision)
        set_precision(sampler, precision)
        store_weights(sampler)
        ways = bits.Ways(random_rows, lambda _, *pack, learner=learner: train(learner, *pack), extend, decode)
        for way, count in bits.forward_counts(sampler, lengths, bits.TAIL, bits.CHUNK, seed=0, ways=ways).items():
            yield counted(way + name, sum(lengths), count)


def counted(name: str, tokens: int, count: bits.Count) -> Row:
    met = {"goal": "0", "met": not count.differing}
    return {"name": name, "tokens": tokens, "numbers": count.numbers, "differing": count.differing, **met}


def random_rows(model: DeepseekV4, tokens: int, seed: int) -> Tensor:
    """int64 [T, 2]: tokens, and those whose log-probs after them are asked for."""
    weight = model.lm_head.weight
    generator = torch.Generator(weight.device).manual_seed(seed)
    return torch.randint(weight.shape[0], (tokens, 2), generator=generator, device=weight.device)


def with_logprobs(hidden: Tensor, logprobs: Tensor) -> Tensor:
    """fp32 [T, d + 1], which holds bf16 exactly."""
    return torch.cat([hidden.float(), logprobs.unsqueeze(1)], 1)


def train(model: DeepseekV4, rows: Tensor, borders: Tensor) -> tuple[Tensor, None]:
    """As the learner computes."""
    hidden = model(rows[:, 0].contiguous(), borders).hidden
    return with_logprobs(hidden, token_logprobs(hidden, model.lm_head.weight, rows[:, 1].contiguous())), None


def extend(model: DeepseekV4, rows: Tensor, borders: Tensor, cache: Cache) -> Tensor:
    """As the sampler computes, here and in `decode`."""
    return _sampled(model, model.extend(rows[:, 0].contiguous(), borders, cache).hidden, rows)


def decode(model: DeepseekV4, rows: Tensor, cache: Cache) -> Tensor:
    return _sampled(model, model.decode(rows[:, 0].contiguous(), cache).hidden, rows)


def _sampled(model: DeepseekV4, hidden: Tensor, rows: Tensor) -> Tensor:
    return with_logprobs(hidden, chosen_logprobs(model.logits(hidden), rows[:, 1].contiguous()))


# --- curves


def curves(setting: Setting) -> Rows:
    """Losses of steps with the kernels and with the definition: the same weights, data and optimizer."""
    batches = list(learnable(setting))
    for name, precision in CURVES.items():
        found: dict[str, list[float]] = {}
        for way in ("", "reference"):
            with kernels(way):
                found[way] = losses_of(setting, precision, batches)
        kernel, reference = found[""], found["reference"]
        off = max(abs(a - b) for a, b in zip(kernel, reference, strict=True))
        row: Row = {"name": f"{name}, {len(batches)} steps", "tokens": batches[0].numel(), "largest_difference": off}
        yield row | {"kernels": kernel, "reference": reference}


def losses_of(setting: Setting, precision: Precision, batches: list[Tensor]) -> list[float]:
    model = ours(setting)
    set_precision(model, precision)
    tokens = batches[0].clone()
    trainer, losses = Trainer(model, packed_loss(model, tokens, lengths_of(tokens.numel(), setting.documents))), []
    for batch in batches:
        tokens.copy_(batch)
        losses.append(trainer.step())
    return torch.stack(losses).tolist()


def learnable(setting: Setting) -> Iterator[Tensor]:
    """Tokens int64 [T] of each step: three in four follow from the one before by a rule."""
    vocabulary = min(setting.model.vocab_size, 512)
    generator = torch.Generator().manual_seed(0)
    rule = torch.randperm(vocabulary, generator=generator).tolist()
    for _ in range(setting.curve[0]):
        noise = torch.randint(vocabulary, (setting.curve[1],), generator=generator).tolist()
        follows = (torch.rand(setting.curve[1], generator=generator) < 0.75).tolist()
        tokens = [noise[0]]
        for drawn, ruled in zip(noise[1:], follows[1:], strict=True):
            tokens.append(rule[tokens[-1]] if ruled else drawn)
        yield torch.tensor(tokens, device=setting.device)


@contextmanager
def kernels(way: str) -> Iterator[None]:
    """Within it `way` is AMALGAM_KERNELS; "" leaves the choice as it is."""
    before = os.environ.get(VARIABLE)
    if way:
        os.environ[VARIABLE] = way
    try:
        yield
    finally:
        if way:
            os.environ.pop(VARIABLE) if before is None else os.environ.update({VARIABLE: before})
