"""Rewards of a user, as the grader finds them by `own_rewards:NAME` on PYTHONPATH."""

import os
import time
from typing import Any

from amalgam.rewards.problem import Score


def contains(trajectory, problem, *, word: str = ""):
    found = (word or problem.answer) in (trajectory.content or "")
    return Score(float(found), found, {"characters": 0.5}, "" if found else "not in it")


def misbehaves(trajectory, problem) -> Any:
    match trajectory.text:
        case "hang":
            time.sleep(60)
        case "raise":
            raise KeyError("x")
        case "exit":
            os._exit(9)
        case "memory":
            bytearray(3 * 2**30)
        case "number":
            return 1.0
        case "nan":
            return Score(float("nan"))
        case "text":
            return Score("1")  # pyright: ignore[reportArgumentType]
        case "part":
            return Score(1.0, True, {"x": float("inf")})
        case "many":
            return Score(7.0, True)
    return Score(0.5, True)


def nothing(trajectory, problem) -> Any:
    return None
