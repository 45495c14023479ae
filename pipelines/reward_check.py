"""Can a recipe's rewards grade here? Found out before anything starts, by grading one made-up response."""

from ..errors import UserError
from ..rewards.data import Problems
from ..rewards.grader import Grader
from ..rewards.registry import REWARDS, mix
from ..rewards.sandbox import Sandboxes
from .recipe import Recipe


def check_rewards(recipe: Recipe, domains: dict[str, Problems]) -> None:
    """UserError for programs to grade where no sandbox runs, a judge, or a user's function that gives no Score."""
    for name, settings in recipe.domains.items():
        parts = mix(settings.rewards) if settings.rewards else []
        if any(part.name == "code" for part in parts):
            with Sandboxes(ready=1):
                pass
        for part in parts:
            if part.name == "judge":
                raise UserError(
                    f"domains.{name}.rewards.{part.label}: a recipe cannot hand in a judge (not built yet); "
                    "from Python, Grader(judge=...) can"
                )
        if any(part.name not in REWARDS for part in parts):
            problem = domains[name].problems("heldout", 0, 1)[0]
            with Grader() as grader:
                (score,) = grader.grade([(problem, "A made-up response.", True, settings.mode, 4)])
            if "not a Score" in score.note:
                raise UserError(f"domains.{name}.rewards: {score.note}")
