"""Comparisons over one run and over several seeds' runs."""

import json

import numpy as np
import pytest

from amalgam.pipelines.comparisons import compare
from amalgam.pipelines.report_data import Run
from amalgam.pipelines.statistics import mean_paired_difference, paired_difference, paired_ratio

from .made_run import DOMAINS, EVALUATED, made_run

PROBLEMS = 40
GAINS = [
    ("grpo-arithmetic", "sft-arithmetic", "arithmetic"),
    ("grpo-arithmetic", "base", "arithmetic"),
    ("grpo-strings", "sft-strings", "strings"),
    ("grpo-strings", "base", "strings"),
]
KEPT = [("merged", f"grpo-{domain}", domain) for domain in DOMAINS]
MERGED = [("merged", "average", "the mean of the domains")]


def random_outcomes(seed):
    rng = np.random.default_rng(seed)
    return {model: {domain: (rng.random(PROBLEMS) < 0.6).tolist() for domain in DOMAINS} for model in EVALUATED}


def names(found):
    return [(each.a, each.b, each.on) for each in found]


def test_runs_pooled_are_their_outcomes_one_after_the_other(tmp_path):
    outcomes = [random_outcomes(seed) for seed in range(2)]
    found = compare([made_run(tmp_path / str(seed), each) for seed, each in enumerate(outcomes)])
    problems = [*range(PROBLEMS), *range(PROBLEMS)]

    def pair(a, b, domain):
        ours, theirs = ([right for run in outcomes for right in run[model][domain]] for model in (a, b))
        return ours, theirs, problems

    assert names(found.gains) == GAINS and names(found.kept) == KEPT and names(found.merged) == MERGED
    assert [each.estimate for each in found.gains] == [paired_difference(*pair(*each)) for each in GAINS]
    assert [each.estimate for each in found.kept] == [paired_ratio(*pair(*each)) for each in KEPT]
    pairs = [pair("merged", "average", domain) for domain in DOMAINS]
    assert [each.estimate for each in found.merged] == [mean_paired_difference(pairs)]
    ours, theirs, _ = pair(*GAINS[0])
    assert found.gains[0].estimate[0] == pytest.approx((sum(ours) - sum(theirs)) / (2 * PROBLEMS))


def test_seeds_that_agree_do_not_narrow_an_interval(tmp_path):
    run = made_run(tmp_path, random_outcomes(0))
    for alone, together in zip(compare([run]), compare([run] * 3), strict=True):
        for one, three in zip(alone, together, strict=True):
            assert three.estimate == pytest.approx(one.estimate)
            assert three.estimate[1] < three.estimate[2]


@pytest.mark.parametrize(
    ("model", "dropped"),
    [("base", [GAINS[1], GAINS[3]]), ("sft-strings", [GAINS[2]]), ("average", MERGED), ("merged", [*KEPT, *MERGED])],
)
@pytest.mark.parametrize("spoilt", ["missing", "other problems"])
def test_what_one_run_lacks_is_not_compared(tmp_path, model, dropped, spoilt):
    whole, partial = (made_run(tmp_path / name, random_outcomes(0)) for name in ("whole", "partial"))
    file = partial.folder / "evaluations" / f"{model}.json"
    if spoilt == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"index": 0,', '"index": 1000000,'))
    found = compare([whole, Run(partial.folder)])
    assert names(each for group in found for each in group) == [
        each for each in [*GAINS, *KEPT, *MERGED] if each not in dropped
    ]


def test_the_mean_of_the_domains_needs_all_of_them(tmp_path):
    run = made_run(tmp_path, random_outcomes(0))
    file = tmp_path / "evaluations" / "average.json"
    evaluation = json.loads(file.read_text())
    del evaluation["domains"]["strings"]
    file.write_text(json.dumps(evaluation))
    assert compare([run]).merged and not compare([Run(tmp_path)]).merged


def test_there_is_no_share_of_an_expert_that_is_never_right(tmp_path):
    never = random_outcomes(0)
    never["grpo-strings"]["strings"] = [False] * PROBLEMS
    runs = [made_run(tmp_path / str(seed), each) for seed, each in enumerate([never, random_outcomes(1)])]
    assert names(compare(runs[:1]).kept) == KEPT[:1]
    assert names(compare(runs).kept) == KEPT  # it is right under the other seed
