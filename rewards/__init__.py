"""Verifiable rewards: problems with their own scorers (`domains`), graded in child processes (`grader`).

Nothing here imports torch, and reasoning-gym only when a domain is built or a child grades.
"""
