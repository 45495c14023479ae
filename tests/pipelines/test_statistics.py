"""Intervals: closed forms, coverage, clusters, determinism."""

import math

import numpy as np
import pytest

from amalgam.pipelines.statistics import mean_paired_difference, paired_difference, paired_ratio, wilson


@pytest.mark.parametrize(
    ("correct", "total", "low", "high"),
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (5, 10, 0.23659, 0.76341), (627, 1024, 0.58210, 0.64167)],
)
def test_wilson_equals_solving_the_score_equation(correct, total, low, high):
    assert wilson(correct, total) == pytest.approx((low, high), abs=1e-5)
    share = correct / total
    for edge in wilson(correct, total):  # each edge is a proportion whose own normal interval just reaches the share
        z_squared_variance = 1.959963984540054**2 * edge * (1 - edge) / total
        assert (share - edge) ** 2 == pytest.approx(z_squared_variance, abs=1e-12)


@pytest.mark.parametrize(("correct", "total"), [(0, 0), (3, 2), (-1, 5)])
def test_wilson_refuses_counts_that_cannot_be(correct, total):
    with pytest.raises(ValueError, match=f"{correct} correct of {total}"):
        wilson(correct, total)


def outcomes(seed, n, share_a, share_b):
    draws = np.random.default_rng(seed).random((2, n))
    return (draws[0] < share_a).tolist(), (draws[1] < share_b).tolist()


def test_difference_agrees_with_the_normal_approximation_on_a_large_sample():
    a, b = outcomes(0, 4000, 0.6, 0.5)
    each = np.array(a, float) - np.array(b, float)
    half = 1.96 * each.std() / math.sqrt(len(each))
    value, low, high = paired_difference(a, b)
    assert value == pytest.approx(each.mean())
    assert (value - low, high - value) == (pytest.approx(half, rel=0.05), pytest.approx(half, rel=0.05))


def test_pairing_counts():
    a = [True, False] * 200
    value, low, high = paired_difference(a, a)  # equal on each problem, however hard the problems are
    assert (value, low, high) == (0.0, 0.0, 0.0)
    value, low, high = paired_difference(a, a[1:] + a[:1])  # same counts, never equal
    assert value == 0.0 and low < -0.05 and high > 0.05


def test_clusters_widen_the_interval_of_repeated_problems():
    a, b = outcomes(1, 300, 0.6, 0.5)
    tripled = paired_difference(a * 3, b * 3, list(range(300)) * 3)
    single = paired_difference(a, b)
    naive = paired_difference(a * 3, b * 3)
    assert tripled == pytest.approx(single, abs=0.004)
    assert (naive[2] - naive[1]) < 0.65 * (tripled[2] - tripled[1])


def test_clusters_of_unequal_sizes_weigh_each_outcome_alike():
    value, low, high = paired_difference([True, True, True, False], [False, False, True, False], ["x", "x", "x", "y"])
    assert value == pytest.approx(2 / 4)
    assert (low, high) == (0.0, pytest.approx(2 / 3))  # only y drawn, only x drawn


def test_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(200):
        _, low, high = paired_difference(*outcomes(seed, 400, 0.55, 0.45))
        covered += low <= 0.1 <= high
    assert 180 <= covered <= 198


def test_mean_over_domains_gives_each_domain_equal_weight():
    big, small = outcomes(2, 2000, 0.9, 0.5), outcomes(3, 100, 0.5, 0.5)
    value, low, high = mean_paired_difference([(*big, None), (*small, None)])
    assert value == pytest.approx((paired_difference(*big)[0] + paired_difference(*small)[0]) / 2)
    assert low < value < high
    twice = mean_paired_difference([(*big, None), (*big, None)])
    alone = paired_difference(*big)  # two independent domains: the interval shrinks by sqrt(2), so their draws differ
    assert (twice[2] - twice[1]) * math.sqrt(2) == pytest.approx(alone[2] - alone[1], rel=0.06)


def test_ratio():
    a, b = outcomes(4, 2000, 0.75, 0.8)
    value, low, high = paired_ratio(a, b)
    assert value == pytest.approx(sum(a) / sum(b))
    assert 0.88 < low < value < high < 1.0
    assert paired_ratio([True] * 8, [True] + [False] * 7)[2] == math.inf  # some resamples never draw b's one success
    with pytest.raises(ValueError, match="never right"):
        paired_ratio([True], [False])


def test_same_input_same_interval():
    a, b = outcomes(5, 500, 0.5, 0.5)
    assert paired_difference(a, b) == paired_difference(a, b)


@pytest.mark.parametrize(("a", "b", "clusters"), [([], [], None), ([True], [], None), ([True], [True], ["x", "y"])])
def test_difference_refuses_lengths_that_do_not_fit(a, b, clusters):
    with pytest.raises(ValueError, match="equal lengths"):
        paired_difference(a, b, clusters)
