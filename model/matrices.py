"""What of DeepSeek-V4 are matrices for Muon (paper 2.4): "each logically independent weight" by itself."""

from torch import nn

from ..errors import UserError
from .attention import Compressor, GroupedLinear, Linear
from .deepseek_v4 import DeepseekV4, Experts, HyperConnection, HyperHead, Router

Matrices = list[tuple[int, int]]
"""Rows and columns of each, in the order in which they lie one after another in a parameter's memory."""


def matrices(model: nn.Module) -> dict[str, Matrices]:
    """Parameter's name -> its matrices. All others are AdamW's.

    As in the paper, that leaves to AdamW embedding, head, norms, and the biases and factors of hyper-connections; the
    paper is silent about sinks and the compressors' position biases, which go there too (our choice: they are no maps
    of vectors). Taken apart are experts; gate and up; the groups of the output's projection; the two sets of channels
    of a CSA compressor and its indexer (W^a and W^b in 2.3.1); a hyper-connection's W^pre, W^post and W^res (2.2).

    UserError for another model: how transformers' models fuse and interleave what is independent is not known here.
    """
    if not isinstance(model, DeepseekV4):
        raise UserError("optimizer.name: muon is for DeepSeek-V4 alone; give adamw")
    found: dict[str, Matrices] = {}
    for prefix, module in model.named_modules():
        for name, rows in _rows(module).items():
            key = f"{prefix}.{name}"
            columns = model.get_parameter(key).shape[-1]
            found.setdefault(key, [(n, columns) for n in rows])  # a compressor comes before its projections
    del found["lm_head.weight"]
    return found


def _rows(module: nn.Module) -> dict[str, list[int]]:
    """The rows of each matrix of a module's parameters."""
    if isinstance(module, Experts):
        e, d, i = module.down_proj.shape
        return {"gate_up_proj": [i] * (2 * e), "down_proj": [d] * e}
    if isinstance(module, Compressor):
        rows = [module.dim] * (2 if module.overlap else 1)
        return {"kv_proj.weight": rows, "gate_proj.weight": rows}
    if isinstance(module, GroupedLinear):
        return {"weight": [module.out_features // module.groups] * module.groups}
    if isinstance(module, HyperConnection):
        n = module.config.hc_mult
        return {"fn": [n, n, n * n]}
    if isinstance(module, HyperHead):
        return {"hc_fn": [len(module.hc_fn)]}
    if isinstance(module, Linear | Router):
        return {"weight": [len(module.weight)]}
    return {}
