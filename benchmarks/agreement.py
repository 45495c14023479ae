"""Do transformers, our forward and our decoding give the same log-probs? In fp32, a model or all models of a run:

(a) `AutoModelForCausalLM.from_pretrained` on each sequence alone and unpadded, against ours on all of them in one pack;
(b) our decoding over the cache, token by token in ragged batches, against our forward; the same again in float64.

    .venv/bin/python benchmarks/agreement.py runs/quickstart

A checkpoint's folder or a preset's name will do too. The exit code is 1 if a bound is broken. README.md says what is
bounded.
"""

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from near_ties import near_ties
from results import machine, print_table, write_result
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from amalgam.errors import UserError
from amalgam.model import DeepseekV4
from amalgam.model.checkpoint import load
from amalgam.model.config import resolve
from amalgam.model.encoding import Encoding
from amalgam.model.tokenizer import load as load_tokenizer
from amalgam.pipelines.corpus import document as corpus_document
from amalgam.pipelines.recipe import Recipe, load_recipe
from amalgam.rewards.domains import Domain

TRANSFORMERS_BOUND, DECODE_BOUND, FLOAT64_BOUND = 1e-4, 1e-5, 1e-11
PROBLEMS, LONGER = 20, 8
SHORTEST, LONGEST = 128, 300  # tokens of the longer ones; above 128, the tiny model's indexer has to choose
RANDOM = (2, 64, 257, LONGEST)
PACKS = 4  # that decode, each of every fourth sequence
_PREFILLED = -1.0


@dataclass
class Agreement:
    """Absolute differences of log-probs over one kind of sequences, each compared up to its first near-tie."""

    model: str
    sequences: str
    tokens: int
    compared: int  # how many of them come before a near-tie
    transformers_max: float
    transformers_mean: float
    vocabulary_max: float  # of every token of the vocabulary at every position
    decode_max: float
    decode_mean: float
    packing_max: float  # of our forward alone against in a pack
    rounding_max: float  # of our forward alone against itself in float64: how far off fp32 is, on any machine
    float64_max: float  # of decoding and of packing in float64, near-ties or not: what is left without fp32's rounding
    beyond_max: float  # transformers and decoding from the first near-tie on
    transformers_scaled: float  # largest difference / max(1, |log-prob|), for the bounds: rounding grows with the value
    decode_scaled: float

    @property
    def verdict(self) -> str:
        """`absolute`: the bounds hold as they are. `relative`: over max(1, |log-prob|) they do. Else `BROKEN`."""
        if self.float64_max > FLOAT64_BOUND:
            return "BROKEN"
        if self.transformers_max <= TRANSFORMERS_BOUND and self.decode_max <= DECODE_BOUND:
            return "absolute"
        held = self.transformers_scaled <= TRANSFORMERS_BOUND and self.decode_scaled <= DECODE_BOUND
        return "relative" if held else "BROKEN"


def sequences(recipe: Recipe, checkpoint: Path) -> dict[str, list[Tensor]]:
    """32 sequences of token ids: held-out problems with their answers, longer texts (128 to 300), random tokens."""
    encoding, tokenizer = Encoding.from_checkpoint(checkpoint), load_tokenizer(checkpoint)
    problems: list[Tensor] = []
    count = -(-PROBLEMS // len(recipe.domains))
    for name, settings in recipe.domains.items():
        domain = Domain(name, settings.mode, settings.tasks, settings.demonstrations, count, recipe.seed)
        for problem in domain.problems("heldout", 0, count):
            answer = {"role": "assistant", "content": domain.demonstration(problem)}
            problems.append(torch.tensor(encoding.ids(tokenizer, [*domain.messages(problem), answer], domain.mode)[0]))
    longer: list[Tensor] = []
    index = 0
    while len(longer) < LONGER:
        ids = tokenizer.encode(corpus_document(1, index, frozenset()), add_special_tokens=False).ids
        longer += [torch.tensor(ids[:LONGEST])] if len(ids) >= SHORTEST else []
        index += 1
    noise = torch.Generator().manual_seed(0)
    random = [torch.randint(tokenizer.get_vocab_size(), (n,), generator=noise) for n in RANDOM]
    return {"problems": problems[:PROBLEMS], "longer": longer, "random": random}


def cu_seqlens_of(documents: list[Tensor]) -> Tensor:
    """int32 [B + 1]."""
    return torch.tensor([0, *map(len, documents)]).cumsum(0).int()


@torch.inference_mode()
def agreement(name: str, checkpoint: Path, kinds: dict[str, list[Tensor]]) -> list[Agreement]:
    """One model's, for each kind of sequences."""
    ours, exact = load(checkpoint), load(checkpoint, dtype=torch.float64)
    documents = [d for found in kinds.values() for d in found]
    lengths = [len(d) for d in documents]
    tokens, cu_seqlens = torch.cat(documents), cu_seqlens_of(documents)
    forward = list(ours.logprobs(tokens, cu_seqlens).split(lengths))
    theirs, vocabulary = transformers_differences(ours, checkpoint, documents, forward)
    packing, decode, alone = our_differences(ours, documents, forward)
    forward64 = list(exact.logprobs(tokens, cu_seqlens).split(lengths))
    packing64, decode64, alone64 = our_differences(exact, documents, forward64)
    near = near_ties(ours, tokens, cu_seqlens).split(lengths)
    # A token's log-prob comes from the states of the tokens before it: a near-tie at t concerns t + 1 and what follows.
    clean = [_padded(n[:-1].cumsum(0)) == 0 for n in near]
    columns = {
        "clean": clean,
        "forward": forward,
        "theirs": theirs,
        "vocabulary": vocabulary,
        "decode": decode,
        "packing": packing,
        "rounding": [(a - b).abs() for a, b in zip(alone, alone64, strict=True)],
        "float64": [torch.maximum(a, b) for a, b in zip(packing64, decode64, strict=True)],
    }
    results, first = [], 0
    for kind, count in ((kind, len(found)) for kind, found in kinds.items()):
        mine = {column: torch.cat(values[first : first + count]) for column, values in columns.items()}
        results.append(summary(name, kind, **mine))
        first += count
    return results


def summary(
    name: str,
    kind: str,
    clean: Tensor,
    forward: Tensor,
    theirs: Tensor,
    vocabulary: Tensor,
    decode: Tensor,
    packing: Tensor,
    rounding: Tensor,
    float64: Tensor,
) -> Agreement:
    """All [tokens of the kind]; `clean` bool: before the first near-tie, `decode` may be _PREFILLED."""
    scale = forward.abs().clamp(min=1.0)
    decoded = clean & (decode != _PREFILLED)
    beyond = torch.maximum(theirs, decode)[~clean]
    return Agreement(
        model=name,
        sequences=kind,
        tokens=len(clean),
        compared=int(clean.sum()),
        transformers_max=float(theirs[clean].max()),
        transformers_mean=float(theirs[clean].mean()),
        vocabulary_max=float(vocabulary[clean].max()),
        decode_max=float(decode[decoded].max()),
        decode_mean=float(decode[decoded].mean()),
        packing_max=float(packing[clean].max()),
        rounding_max=float(rounding[clean].max()),
        float64_max=float(float64.max()),
        beyond_max=float(beyond.max()) if len(beyond) else 0.0,
        transformers_scaled=float((theirs / scale)[clean].max()),
        decode_scaled=float((decode / scale)[decoded].max()),
    )


def transformers_differences(
    ours: DeepseekV4, checkpoint: Path, documents: list[Tensor], forward: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """For each document |difference| [n] of its own tokens (`model.logprobs`), and of the vocabulary's worst token."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    hidden = ours(torch.cat(documents), cu_seqlens_of(documents)).hidden.split([len(d) for d in documents])
    own, vocabulary = [], []
    for document, scores, states in zip(documents, forward, hidden, strict=True):
        reference = model(document.unsqueeze(0)).logits[0].log_softmax(-1)[:-1]
        own.append(_padded((scores[1:] - reference.gather(1, document[1:, None]).squeeze(1)).abs()))
        vocabulary.append(_padded((ours.logits(states[:-1]).log_softmax(-1) - reference).abs().amax(-1)))
    return own, vocabulary


def our_differences(model: DeepseekV4, documents: list[Tensor], forward: list[Tensor]) -> tuple[list[Tensor], ...]:
    """For each document against `forward`: |difference| [n] alone, and decoded; and the log-probs alone."""
    alone = [model.logprobs(d, cu_seqlens_of([d])) for d in documents]
    decoded = [torch.zeros(0)] * len(documents)
    for pack in (range(i, len(documents), PACKS) for i in range(PACKS)):
        found = decode_differences(model, [documents[i] for i in pack], [forward[i] for i in pack])
        for i, differences in zip(pack, found, strict=True):
            decoded[i] = differences
    return [(a - f).abs() for a, f in zip(alone, forward, strict=True)], decoded, alone


def _padded(values: Tensor) -> Tensor:
    """A zero for a document's first token, which has no log-prob."""
    return torch.nn.functional.pad(values, (1, 0))


def decode_differences(model: DeepseekV4, documents: list[Tensor], forward: list[Tensor]) -> list[Tensor]:
    """For each document |log-prob by decoding - by the forward| [n]; _PREFILLED in its first third, which is prefilled.

    The batch is ragged from its start and shrinks: a document leaves it after its last token.
    """
    at = [max(len(d) // 3, 1) for d in documents]  # the next token of each
    prompts = [d[:n] for d, n in zip(documents, at, strict=True)]
    cu_seqlens = cu_seqlens_of(prompts)
    output, cache = model.prefill(torch.cat(prompts), cu_seqlens, LONGEST)
    hidden = output.hidden[cu_seqlens[1:].long() - 1]
    found = [torch.full_like(scores, _PREFILLED) for scores in forward]
    running = list(range(len(documents)))
    while running:
        tokens = torch.stack([documents[i][at[i]] for i in running])
        scores = model.logits(hidden).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
        for i, score in zip(running, scores, strict=True):
            found[i][at[i]] = (score - forward[i][at[i]]).abs()
            at[i] += 1
        keep = [row for row, i in enumerate(running) if at[i] < len(documents[i])]
        running = [running[row] for row in keep]
        if running:
            cache = cache.select(torch.tensor(keep))
            hidden = model.decode(tokens[keep], cache).hidden
    return found


def checkpoints(given: str) -> tuple[Recipe, dict[str, Path]]:
    """A recipe and models by name: a run's own, base and every stage; for a single model the quickstart's recipe.

    UserError if the run is not finished, or `given` is neither a folder of one of these kinds nor a preset.
    """
    folder = Path(given)
    if not (folder / "recipe.yaml").is_file():
        return load_recipe("quickstart"), {folder.name: resolve(given)}
    recipe = load_recipe(str(folder / "recipe.yaml"))
    for name in recipe.stages:
        if not (folder / "stages" / name / "done.json").is_file():
            raise UserError(f"{folder}: the stage {name} is not finished; run the recipe to its end")
    base = {"base": resolve(recipe.base)} if recipe.base is not None else {}
    return recipe, base | {name: folder / "stages" / name / "checkpoint" for name in recipe.stages}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("given", metavar="MODELS", help="the folder of a finished run or a checkpoint, or a preset")
    given = parser.parse_args().given
    torch.set_num_threads(1)  # as an actor has: with two, rounding depends on how many rows there are
    where = machine()
    disable_progress_bar()
    recipe, models = checkpoints(given)
    kinds = sequences(recipe, next(iter(models.values())))
    found = [each for name, path in models.items() for each in agreement(name, path, kinds)]
    print(f"{where['cpu']}, torch {where['versions']['torch']}, transformers {where['versions']['transformers']}, fp32")
    print("largest (mean) absolute difference of log-probs, up to each sequence's first near-tie")
    print("rounding: fp32 against float64; float64: decoding and packing there, at every token")
    columns = "model sequences tokens compared transformers vocabulary decoding packing rounding float64 beyond holds"
    print_table(
        columns.split(),
        [
            [
                each.model, f"{len(kinds[each.sequences])} {each.sequences}", str(each.tokens), str(each.compared),
                f"{each.transformers_max:.1e} ({each.transformers_mean:.0e})", f"{each.vocabulary_max:.1e}",
                f"{each.decode_max:.1e} ({each.decode_mean:.0e})", f"{each.packing_max:.1e}",
                f"{each.rounding_max:.1e}", f"{each.float64_max:.1e}", f"{each.beyond_max:.0e}", each.verdict,
            ]
            for each in found
        ],
    )  # fmt: skip
    bounds = {"transformers": TRANSFORMERS_BOUND, "decode": DECODE_BOUND, "float64": FLOAT64_BOUND}
    results = [{**asdict(each), "holds": each.verdict} for each in found]
    print(write_result("agreement", {"machine": where, "bounds": bounds, "results": results}))
    return 0 if all(each.verdict == "absolute" for each in found) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
