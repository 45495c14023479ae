"""How large the presets are: parameters, and the bytes of one request's cache.

.venv/bin/python benchmarks/sizes.py
"""

from dataclasses import asdict
from typing import Any

from results import machine, print_table, write_result

from amalgam.model.config import config_of
from amalgam.model.sizes import CacheBytes, cache_bytes, parameter_counts

PRESETS = ("flash", "pro")
TOKENS = (8_192, 131_072, 1_048_576)
_PARTS = tuple(CacheBytes.__dataclass_fields__)


def main() -> None:
    results: dict[str, Any] = {}
    configs = {name: config_of(name) for name in PRESETS}
    print("parameters, billions (active: of one token, without the embedding table)")
    rows = []
    for name, config in configs.items():
        counts = parameter_counts(config)
        results[name] = {"parameters": asdict(counts), "cache_bytes": {}}
        rows.append([name, *(f"{count / 1e9:,.2f}" for count in (counts.main, counts.active, counts.mtp))])
    print_table(["preset", "main model", "active", "MTP block"], rows)

    print("\ncache of one request, MiB (GQA: share of bf16 keys and values of 8 heads of 128 channels in every layer)")
    rows = []
    for name, config in configs.items():
        for tokens in TOKENS:
            cache = cache_bytes(config, tokens)
            results[name]["cache_bytes"][tokens] = asdict(cache) | {"total": cache.total}
            gqa = tokens * config.num_hidden_layers * 2 * 8 * 128 * 2
            cells = [f"{getattr(cache, part) / 2**20:,.1f}" for part in _PARTS]
            share = f"{100 * cache.total / gqa:.1f} %"
            rows.append([name, f"{tokens:,}", *cells, f"{cache.total / 2**30:.2f} GiB", share])
    print_table(["preset", "tokens", *(part.replace("_", " ") for part in _PARTS), "total", "of GQA"], rows)
    print(write_result("sizes", {"machine": machine(), "results": results}))


if __name__ == "__main__":
    main()
