"""Attention at V4-Flash width on one GPU: how exact each operation is, how fast against its floor, and its peers.

    python benchmarks/attention.py [--only attention,indexer,...] [--flashmla PATH]

Needs a CUDA device, torch, triton and transformers; the folder that holds this repository, under the name `amalgam`, on
PYTHONPATH. Parts, each with the ceilings measured as the command starts, when the GPU is not yet hot
(floors.py and attention_floors.py have the formulas). Up to `passes`, what is timed is one CUDA graph, launched once:

    accuracy      values and gradients of every operation against float64, with their bounds
    attention     forward and backward of the attention of each layer kind, one document of 4,096 to 131,072 tokens
    indexer       scores with top-k, and the gradients of the indexer's own scores
    projections   every product of a block, beside cuBLAS
    passes        norms with RoPE, and the compressors, against the bytes they move
    blocks        a whole block of each kind, forward and backward, with its memory, beside transformers' eager one
    decode        a step at a context of 1,048,576 tokens, against the bytes it must read
    flashmla      FlashMLA's sparse prefill kernel; --flashmla names vLLM's library `_flashmla_C.abi3.so`
    veomni        VeOmni's TileLang kernels, where veomni and tilelang are installed

The result is one file (parts.py). Exit code 1 if a part failed or a goal was missed.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attention_accuracy
import attention_blocks
import attention_kernels
import attention_peers
import parts
from attention_kernels import Setting
from parts import Row, Rows

from amalgam.model.config import config_of

PARTS: dict[str, Callable[[Setting], Rows]] = {
    "accuracy": attention_accuracy.accuracy,
    "attention": attention_kernels.attention,
    "indexer": attention_kernels.indexer,
    "projections": attention_kernels.projections,
    "passes": attention_kernels.passes,
    "blocks": attention_blocks.blocks,
    "decode": attention_blocks.decode,
    "flashmla": attention_peers.flashmla,
    "veomni": attention_peers.veomni,
}


def summary(name: str, rows: list[Row]) -> dict[str, Any]:
    """Of `blocks`, the exponents with which memory grows."""
    return {"memory_exponent": attention_blocks.growth(rows)} if name == "blocks" else {}


def main() -> int:
    parser = parts.parser_of(__doc__, PARTS)
    parser.add_argument("--flashmla", type=Path, help="vLLM's _flashmla_C library, for this torch")
    options, names = parts.asked(parser, PARTS)
    config = config_of("flash")
    return parts.run(
        "attention", PARTS, names, lambda ceilings: Setting(config, ceilings, flashmla=options.flashmla),
        attention_peers.missing, summary,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
