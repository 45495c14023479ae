"""What each stage added, as paired estimates: from one run for its report, or from several seeds' runs pooled."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from .report_data import Run
from .statistics import Estimate, Paired, mean_paired_difference, paired_difference, paired_ratio


class Comparison(NamedTuple):
    """Model `a` beside model `b`: a difference or a ratio of their shares of right answers, with its 95 % interval."""

    a: str
    b: str
    on: str  # a domain, or "the mean of the domains"
    estimate: Estimate


class Comparisons(NamedTuple):
    gains: list[Comparison]  # differences: each expert and what it started from, each expert and the base
    kept: list[Comparison]  # ratios: each student and each of its teachers, on the domain that it taught
    merged: list[Comparison]  # differences: each student and the experts' averages, on the mean of the domains


def compare(runs: Sequence[Run]) -> Comparisons:
    """All comparisons that the runs' recipe has, of what is evaluated in every one of them.

    The runs are of one recipe but for the seed. Held-out problems do not depend on it: a problem's outcomes in the
    several runs stay together (they are a cluster).
    """
    first = runs[0]
    gains: list[Comparison] = []
    for expert, stage in first.stages.items():
        if stage["kind"] == "grpo" and len(stage.get("domains", ())) == 1:
            (domain,) = stage["domains"]
            for other in dict.fromkeys([stage["from"], first.base or stage["from"]]):
                if pair := _pair(runs, expert, other, domain):
                    gains.append(Comparison(expert, other, domain, paired_difference(*pair)))
    kept: list[Comparison] = []
    for domain, teacher, student in lessons(first):
        pair = _pair(runs, student, teacher, domain)
        if pair and any(pair[1]):
            kept.append(Comparison(student, teacher, domain, paired_ratio(*pair)))
    merged: list[Comparison] = []
    for student in dict.fromkeys(student for _, _, student in lessons(first)):
        for other in (name for name, stage in first.stages.items() if stage["kind"] == "average"):
            pairs = [pair for domain in first.domains if (pair := _pair(runs, student, other, domain))]
            if pairs and len(pairs) == len(first.domains):
                estimate = mean_paired_difference(pairs)
                merged.append(Comparison(student, other, "the mean of the domains", estimate))
    return Comparisons(gains, kept, merged)


def lessons(run: Run) -> Iterator[tuple[str, str, str]]:
    """(domain, its teacher, the student) of every distillation."""
    for name, stage in run.stages.items():
        for domain, teacher in stage.get("teachers", {}).items():
            yield domain, teacher, name


def _pair(runs: Sequence[Run], a: str, b: str, domain: str) -> Paired | None:
    """Two models' outcomes on a domain; None where one is missing or they answered different problems."""
    ours: list[bool] = []
    theirs: list[bool] = []
    problems: list[tuple[str, int]] = []
    for run in runs:
        left, right = run.answers(a, domain), run.answers(b, domain)
        if not left or not right or left.problems != right.problems:
            return None
        ours += left.correct
        theirs += right.correct
        problems += left.problems
    return ours, theirs, problems
