"""Is a document's result the same alone, packed, chunk-prefilled, decoded and after rejected tokens?

    .venv/bin/python benchmarks/packing.py

Random models of each kind of layer and of mixed kinds, with random windows, ratios, top-k and slack, on documents of 1
to 1,100 tokens. Four ways against the forward of each document alone, in log-probs of the whole vocabulary at every
position: all documents in one `packed` forward; `chunked`, fed to a cache with random borders (0 to 300 tokens of a
document at a time); `decoded`, token by token from an empty cache; `rolled back`, in small random chunks with wrong
tokens after each, which are then taken back. In fp32, and in float64, where all is still there but fp32's rounding. The
exit code is 1 if a difference is above 1e-5 (before a document's first near-tie), or above 1e-11 in float64 (anywhere).
"""

import argparse
import copy
import itertools
import random
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from near_ties import near_ties
from results import machine, print_table, write_result
from torch import Tensor
from transformers import DeepseekV4Config

from amalgam.model import DeepseekV4, initialize

BOUND, FLOAT64_BOUND = 1e-5, 1e-11
SWA, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = {"SWA": (SWA, SWA), "CSA": (CSA, CSA), "HCA": (HCA, HCA), "mixed": (SWA, CSA, HCA, CSA)}
LENGTHS = (1, 2, 3, 5, 17, 64, 131, 420, 1100)
VOCABULARY = 97


@dataclass
class Difference:
    """The largest absolute difference of log-probs of one way, over all models of a kind."""

    layers: str
    way: str
    positions: int
    compared: int  # how many of them come before a document's first near-tie
    largest: float  # of those
    beyond: float  # of the others
    float64: float  # of all positions, in float64

    @property
    def holds(self) -> bool:
        return self.largest <= BOUND and self.float64 <= FLOAT64_BOUND


@torch.no_grad()
def random_model(layers: tuple[str, ...], seed: int) -> DeepseekV4:
    """Every tensor is random: norms, biases and sinks too."""
    draw = random.Random(f"{layers}/{seed}")
    fields = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": len(layers),
        "num_attention_heads": 4, "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_groups": 2,
        "o_lora_rank": 8, "sliding_window": draw.choice([1, 2, 7, 16, 33, 128]), "layer_types": list(layers),
        "compress_rates": {CSA: draw.choice([2, 3, 4, 5]), HCA: draw.choice([6, 7, 16, 31, 128])},
        "index_n_heads": 32, "index_head_dim": 16, "index_topk": draw.choice([1, 3, 10, 40]), "n_routed_experts": 8,
        "num_experts_per_tok": 2, "mlp_layer_types": ["hash_moe", *["moe"] * (len(layers) - 1)],
        "hc_sinkhorn_iters": 4, "num_nextn_predict_layers": 0, "max_position_embeddings": 4096,
        "initializer_range": 0.15,
    }  # fmt: skip
    model = initialize(DeepseekV4Config(**fields), seed)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if (tensor.dim() == 1 or "position_bias" in name) and "frequencies" not in name:
            tensor.add_(0.2 * torch.randn(tensor.shape, generator=generator))
    return model.eval()


def borders(parts: list[Tensor]) -> Tensor:
    return torch.tensor([0, *map(len, parts)]).cumsum(0).int()


def logprobs(model: DeepseekV4, hidden: Tensor) -> Tensor:
    return torch.log_softmax(model.logits(hidden), -1)


def packed(model: DeepseekV4, documents: list[Tensor], draw: random.Random) -> list[Tensor]:
    """The documents' log-probs [n, V] in one pack, in a random order."""
    order = draw.sample(range(len(documents)), len(documents))
    pack = [documents[i] for i in order]
    found = logprobs(model, model(torch.cat(pack), borders(pack)).hidden).split([len(d) for d in pack])
    return [found[order.index(i)] for i in range(len(documents))]


def chunked(model: DeepseekV4, documents: list[Tensor], draw: random.Random) -> list[Tensor]:
    return _from_cache(model, documents, lambda left: min(draw.choice([0, 1, 30, 300]), left), lambda: 0)


def decoded(model: DeepseekV4, documents: list[Tensor], draw: random.Random) -> list[Tensor]:
    return _from_cache(model, documents, lambda left: min(1, left), lambda: 0)


def rolled_back(model: DeepseekV4, documents: list[Tensor], draw: random.Random) -> list[Tensor]:
    slack = draw.choice([1, 2, 5])
    sizes = [0, 1, 1 + slack, 40]
    return _from_cache(
        model, documents, lambda left: min(draw.choice(sizes), left), lambda: draw.randint(0, slack), slack
    )


def _from_cache(
    model: DeepseekV4,
    documents: list[Tensor],
    right: Callable[[int], int],
    wrong: Callable[[], int],
    slack: int = 0,
) -> list[Tensor]:
    """Log-probs [n, V] of documents in one cache: `right` tokens of what is left of each, and `wrong` ones after."""
    cache = model.new_cache(len(documents), max(map(len, documents)) + slack, slack)
    found: list[list[Tensor]] = [[] for _ in documents]
    noise = torch.Generator().manual_seed(0)
    while left := [len(d) - n for d, n in zip(documents, cache.length.tolist(), strict=True)]:
        if not any(left):
            break
        counts = [right(n) for n in left]
        extra = [wrong() if n else 0 for n in counts]
        if not any(counts):
            continue
        starts = cache.length.tolist()
        parts = [
            torch.cat([d[i : i + n], torch.randint(VOCABULARY, (more,), generator=noise)])
            for d, i, n, more in zip(documents, starts, counts, extra, strict=True)
        ]
        hidden = model.extend(torch.cat(parts), borders(parts), cache).hidden
        for mine, states, n in zip(found, hidden.split([len(p) for p in parts]), counts, strict=True):
            mine.append(logprobs(model, states[:n]))
        cache.rollback(cache.length - torch.tensor(extra))
    return [torch.cat(mine) for mine in found]


WAYS = {"packed": packed, "chunked": chunked, "decoded": decoded, "rolled back": rolled_back}


def gaps_of(model: DeepseekV4, documents: list[Tensor], seed: int) -> dict[str, Tensor]:
    """For each way the largest |difference| over the vocabulary [all tokens], against each document alone."""
    alone = torch.cat([logprobs(model, model(d, borders([d])).hidden) for d in documents])
    found = {name: torch.cat(way(model, documents, random.Random(seed))) for name, way in WAYS.items()}
    return {name: (values - alone).abs().amax(-1) for name, values in found.items()}


@torch.inference_mode()
def measure(kind: str, models: int, lengths: tuple[int, ...] = LENGTHS) -> list[Difference]:
    """The differences of one kind's ways."""
    differences = {way: Difference(kind, way, 0, 0, 0.0, 0.0, 0.0) for way in WAYS}
    for seed in range(models):
        model = random_model(KINDS[kind], seed)
        generator = torch.Generator().manual_seed(seed)
        documents = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
        exact = copy.deepcopy(model).double()
        clean = torch.cat([near_ties(model, d, borders([d])).cumsum(0) == 0 for d in documents])
        gaps64 = gaps_of(exact, documents, seed)
        for way, gaps in gaps_of(model, documents, seed).items():
            found = differences[way]
            found.positions += len(gaps)
            found.compared += int(clean.sum())
            found.largest = max(found.largest, float(gaps[clean].max()))
            found.beyond = max([found.beyond, *gaps[~clean].tolist()])
            found.float64 = max(found.float64, float(gaps64[way].max()))
    return list(differences.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=int, default=8, help="random models of each kind (8)")
    models = parser.parse_args().models
    torch.set_num_threads(1)  # as an actor has: with two, rounding depends on how many rows there are
    where = machine()
    found = [each for kind in KINDS for each in measure(kind, models)]
    print(f"{where['cpu']}, torch {where['versions']['torch']}; {models} random models of each kind")
    print("largest absolute difference of log-probs: in fp32 up to the first near-tie, in fp32 beyond it, in float64")
    rows = [
        [each.layers, each.way, str(each.positions), str(each.compared)]
        + [f"{value:.1e}" for value in (each.largest, each.beyond, each.float64)]
        for each in found
    ]
    print_table("layers way positions compared largest beyond float64".split(), rows)
    results = [asdict(each) for each in found]
    bounds = {"largest": BOUND, "float64": FLOAT64_BOUND}
    print(write_result("packing", {"machine": where, "bounds": bounds, "models": models, "results": results}))
    return 0 if all(each.holds for each in found) else 1


if __name__ == "__main__":
    sys.exit(main())
