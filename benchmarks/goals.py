"""The quickstart's goals, beside what its runs under several seeds reached together."""

from collections.abc import Sequence
from dataclasses import dataclass

from amalgam.pipelines.comparisons import compare
from amalgam.pipelines.recipe import BASE
from amalgam.pipelines.report_data import Run
from amalgam.pipelines.statistics import Estimate, wilson


@dataclass(frozen=True)
class Goal:
    """Bounds of a value, as fractions, and whether its whole interval has to lie above 0."""

    unit: str  # "points" (of percent) for a difference, "%" for a share or a ratio
    least: float | None = None
    most: float | None = None
    above_zero: bool = False

    def met(self, estimate: Estimate) -> bool:
        value, low, _ = estimate
        bounded = (self.least is None or value >= self.least) and (self.most is None or value <= self.most)
        return bounded and (low > 0 or not self.above_zero)

    def __str__(self) -> str:
        bounds = {"at least": self.least, "at most": self.most}
        told = [f"{word} {100 * bound:g} {self.unit}" for word, bound in bounds.items() if bound is not None]
        return ", ".join([*told, *["interval above 0"] * self.above_zero])


STARTS = Goal("%", least=0.05, most=0.40)
ADDS = Goal("points", least=0.08, above_zero=True)
RAISES = Goal("points", least=0.25)
KEEPS = Goal("%", least=0.95)
BEATS = Goal("points", above_zero=True)


@dataclass(frozen=True)
class Verdict:
    what: str
    estimate: Estimate | None  # None: a model was not evaluated, or the one to compare with is never right
    goal: Goal

    @property
    def met(self) -> bool:
        return self.estimate is not None and self.goal.met(self.estimate)

    def cells(self) -> list[str]:
        """What, value, interval, goal, and whether it is met."""
        if self.estimate is None:
            return [self.what, "-", "-", str(self.goal), "MISSED"]
        sign = "+" if self.goal.unit == "points" else ""
        value, low, high = (f"{100 * each:{sign}.1f}" for each in self.estimate)
        verdict = "met" if self.met else "MISSED"
        return [self.what, f"{value} {self.goal.unit}", f"{low} to {high}", str(self.goal), verdict]


def verdicts(runs: Sequence[Run]) -> list[Verdict]:
    """Every goal. The runs are of the quickstart, all but their seeds equal."""
    counts = runs[0].scores.get(BASE, {})  # neither the base nor the held-out problems depend on the seed
    shares = {d: (counts[d][0] / counts[d][1], *wilson(*counts[d])) if d in counts else None for d in runs[0].domains}
    started = [Verdict(f"{BASE} on {domain}", share, STARTS) for domain, share in shares.items()]

    found = {(each.a, each.b, each.on): each.estimate for group in compare(runs) for each in group}
    own = [(f"grpo-{d}", f"sft-{d}", d) for d in runs[0].domains]
    wanted = dict.fromkeys(own, ADDS)
    wanted |= {(expert, BASE, domain): RAISES for expert, _, domain in own}
    wanted |= {("merged", expert, domain): KEEPS for expert, _, domain in own}
    wanted["merged", "average", "the mean of the domains"] = BEATS
    return started + [
        Verdict(f"{a} {'of' if goal is KEEPS else 'over'} {b} on {on}", found.get((a, b, on)), goal)
        for (a, b, on), goal in wanted.items()
    ]
