"""Rewards of groups → advantages: how much better than its group each completion was."""

from __future__ import annotations

import math

import numpy as np

SMALL = 1e-6
"""Added to a deviation before it divides."""


def advantages(rewards_PG: np.ndarray, valid_PG: np.ndarray, baseline: str, deviation: bool) -> np.ndarray:
    """float32 [P, G] of P prompts with G completions each; 0 where a completion has no reward (valid is False).

    baseline: "mean": r - mean of the group; "leave-one-out": r - mean of the others, which is G / (G - 1) times that;
    "none": r. deviation: divided by the sample standard deviation (G - 1 in its denominator) of the group.
    """
    rewards_PG = np.where(valid_PG, rewards_PG, 0.0).astype(np.float64)
    count_P1 = valid_PG.sum(1, keepdims=True)
    centred_PG = rewards_PG - rewards_PG.sum(1, keepdims=True) / np.maximum(count_P1, 1)
    others_P1 = np.maximum(count_P1 - 1, 1)
    found_PG = rewards_PG
    if baseline != "none":
        found_PG = centred_PG * (count_P1 / others_P1 if baseline == "leave-one-out" else 1.0)
        # Equal rewards give exactly none, whatever their mean was rounded to.
        found_PG = np.where(equal(rewards_PG, valid_PG)[:, None], 0.0, found_PG)
    if deviation:
        squares_P1 = np.where(valid_PG, centred_PG**2, 0.0).sum(1, keepdims=True)
        found_PG = found_PG / (np.sqrt(squares_P1 / others_P1) + SMALL)
    return np.where(valid_PG, found_PG, 0.0).astype(np.float32)


def equal(rewards_PG: np.ndarray, valid_PG: np.ndarray) -> np.ndarray:
    """Whether all completions of a prompt that have a reward have the same, bool [P]."""
    lowest_P = np.where(valid_PG, rewards_PG, np.inf).min(1)
    return lowest_P >= np.where(valid_PG, rewards_PG, -np.inf).max(1)


def pass_at(solved_P: np.ndarray, samples: int, k: int) -> float:
    """The unbiased estimate that one of k completions solves a prompt, mean over prompts (Chen et al. 2021, eq. 1).

    solved_P: of `samples` completions of each prompt how many did.
    """
    return float(np.mean([1 - math.comb(samples - int(solved), k) / math.comb(samples, k) for solved in solved_P]))
