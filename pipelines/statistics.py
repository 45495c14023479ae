"""Intervals for the numbers that a run reports: all 95 %, all deterministic.

A comparison is paired: two models answer the same problems, and only their difference on each one counts.
Its interval is a bootstrap over problems and not the normal approximation (our choice): one resampling serves
a difference, a mean of differences over domains and a ratio alike, and problems pooled over seeds stay
together as clusters of any size without a formula of their own.

The bootstrap costs nothing: what a cluster adds is a triple of small whole numbers (how often `a` was right,
how often `b` was, out of how many), of which few are distinct, so a resample of n clusters is one draw of a
multinomial over the distinct triples. That is the same distribution as drawing n clusters one by one.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    Totals = tuple[np.ndarray, np.ndarray, np.ndarray]

RESAMPLES = 10_000
Z = 1.959963984540054  # the normal distribution's 97.5 % point
Estimate = tuple[float, float, float]  # value, low, high
Paired = tuple[Sequence[bool], Sequence[bool], Sequence[Hashable] | None]  # outcomes of a, of b, problem identities


def wilson(correct: int, total: int) -> tuple[float, float]:
    """95 % score interval of a proportion (Wilson 1927), as fractions within 0..1; sound at 0 and at `total`.

    Raises ValueError unless 0 <= correct <= total and total > 0.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"wilson: {correct} correct of {total}; want 0 <= correct <= total and total > 0")
    share = correct / total
    center = share + Z * Z / (2 * total)
    spread = Z * sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))
    scale = 1 + Z * Z / total
    return max(0.0, (center - spread) / scale), min(1.0, (center + spread) / scale)


def paired_difference(a: Sequence[bool], b: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """(mean of a - b, low, high) as fractions: `a[i]` and `b[i]` are two models' outcomes on one problem.

    `clusters[i]` is the identity of problem i; give it where a problem occurs more than once (seeds pooled):
    its outcomes are then resampled together. Raises ValueError on empty input or unequal lengths.
    """
    return mean_paired_difference([(a, b, clusters)])


def mean_paired_difference(domains: Sequence[Paired]) -> Estimate:
    """`paired_difference` averaged over domains of equal weight, each with its own resampling."""
    import numpy as np

    if not domains:
        raise ValueError("mean_paired_difference: no domain given")
    sampled = [_bootstrap(pair, key) for key, pair in enumerate(domains)]
    return _estimate(np.mean([(a - b) / n for a, b, n in sampled], axis=0))


def paired_ratio(a: Sequence[bool], b: Sequence[bool], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """(correct of a / correct of b, low, high), paired as in `paired_difference`.

    `high` is inf where many resamples have no correct b. Raises ValueError where b is never right at all.
    """
    import numpy as np

    right_a, right_b, _ = _bootstrap((a, b, clusters), key=0)
    if right_b[0] == 0:
        raise ValueError("paired_ratio: the second model is never right, so there is no ratio to it")
    return _estimate(np.divide(right_a, right_b, out=np.full(len(right_a), np.inf), where=right_b > 0))


def _bootstrap(pair: Paired, key: int) -> Totals:
    """Totals (right a, right b, outcomes), each [1 + RESAMPLES] float64; entry 0 is what was observed."""
    import numpy as np

    right_a, right_b, clusters = pair
    n = len(right_a)
    if n == 0 or len(right_b) != n or (clusters is not None and len(clusters) != n):
        lengths = f"{n}, {len(right_b)}" + ("" if clusters is None else f", {len(clusters)}")
        raise ValueError(f"paired outcomes of lengths {lengths}; want equal lengths over 0")
    slots: dict[Hashable, int] = {}
    slot = [slots.setdefault(name, len(slots)) for name in (range(n) if clusters is None else clusters)]
    added = np.zeros((len(slots), 3))
    np.add.at(
        added,
        slot,
        np.stack([np.asarray(right_a, bool), np.asarray(right_b, bool), np.ones(n, bool)], axis=1),
    )
    triples, counts = np.unique(added, axis=0, return_counts=True)
    # A counter-based generator: the draws depend on `key` alone, so a report says the same thing every time.
    draws = np.random.Generator(np.random.Philox(key=key)).multinomial(len(slots), counts / len(slots), RESAMPLES)
    totals = np.concatenate([counts[None], draws]) @ triples
    return totals[:, 0], totals[:, 1], totals[:, 2]


def _estimate(values: np.ndarray) -> Estimate:
    """Entry 0 and the others' 2.5 % and 97.5 % points, which are not interpolated: an inf may stand."""
    import numpy as np

    low, high = np.quantile(values[1:], [0.025, 0.975], method="inverted_cdf")
    return float(values[0]), float(low), float(high)
