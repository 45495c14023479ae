"""Published sizes: parameters of the presets and the bytes of their caches, counted from what a model really holds."""

import pytest
import torch

from amalgam.model import DeepseekV4
from amalgam.model.cache import POOLS
from amalgam.model.config import config_of
from amalgam.model.precision import set_precision, store_weights
from amalgam.model.sizes import cache_bytes, parameter_counts
from amalgam.settings import Precision

from .. import tiny


@pytest.mark.parametrize(
    ("name", "main", "active", "mtp"), [("flash", "284.33", "13.3", "6.61"), ("pro", "1573.0", "48.85", "25.8")]
)
def test_parameters_of_the_presets(name: str, main: str, active: str, mtp: str):
    counts = parameter_counts(config_of(name))
    for count, published in ((counts.main, main), (counts.active, active), (counts.mtp, mtp)):
        assert f"{count / 1e9:.{len(published.partition('.')[2])}f}" == published
    assert parameter_counts(config_of(f"{name}-base")) == counts


def test_a_count_is_what_a_real_model_holds():
    model = DeepseekV4(tiny.config())
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    counts = parameter_counts(tiny.config())
    assert (counts.main, counts.mtp) == (total, 0)
    assert counts.active == total - model.model.embed_tokens.weight.numel() - experts // 2  # 2 of 4 experts


@pytest.mark.parametrize(("name", "gib", "share"), [("flash", "3.4", "2.0"), ("pro", "4.9", "2.0")])
def test_cache_of_a_million_tokens(name: str, gib: str, share: str):
    """`share`: percent of bf16 keys and values of 8 heads of 128 channels, which the paper puts at about 2."""
    config = config_of(name)
    cache = cache_bytes(config, 1 << 20)
    assert f"{cache.total / 2**30:.1f}" == gib
    assert f"{100 * cache.total / ((1 << 20) * config.num_hidden_layers * 4096):.1f}" == share
    layers = config.layer_types or []
    kinds = {kind: layers.count(kind) for kind in layers}
    assert cache.csa == kinds["compressed_sparse_attention"] * (1 << 18) * 584
    assert cache.index_keys == kinds["compressed_sparse_attention"] * (1 << 18) * 68
    assert cache.hca == kinds["heavily_compressed_attention"] * (1 << 13) * 584
    assert cache.window == len(layers) * 128 * 584
    assert cache.waiting < 2**20 * len(layers)


def test_the_accounting_is_that_of_a_real_cache():
    """Entries and keys of a model that holds what deployment stores take these bytes; window rows, which it keeps in
    its dtype, are priced as FP8. But for the page that is nobody's."""
    model = tiny.model(0, index_head_dim=32)
    set_precision(model, Precision(indexer="fp4", kv="fp8"))
    store_weights(model)
    model.bfloat16()
    cache = model.new_cache(1, 112, page=28)
    model.extend(torch.arange(30), torch.tensor([0, 30]), cache)
    row = 8 + 2 * 8 + 1 + 7  # FP8, bf16, a scale, padding
    taken: dict[str, int] = {}
    for layer in cache.layers:
        for name, tensor in layer.items():
            size = tensor.shape[1] * row if name == "rows" else tensor[1:].nbytes if name in POOLS else tensor.nbytes
            taken[name] = taken.get(name, 0) + size
    counted = cache_bytes(model.config, 112)
    assert counted.window == taken.pop("rows")
    assert counted.csa + counted.hca == taken.pop("entries")
    assert counted.index_keys == taken.pop("index_keys")
    assert counted.waiting == sum(taken.values())
    assert counted.total == sum((counted.window, counted.csa, counted.hca, counted.index_keys, counted.waiting))
