"""Choose the next token from logits: greedy by default, otherwise by a seeded, reproducible draw."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protocol.errors import InputError, UsageError


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose. Values that switch a stage off: temperature 0 (greedy), top_k 0, top_p 1, min_p 0, penalty 1.

    `repeat_last_n` is how many tokens of history the penalty looks at.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises UsageError for values that cannot be meant."""
        for name, value, low, high in (
            ("temperature", self.temperature, 0.0, 1e6),
            ("top_p", self.top_p, 0.0, 1.0),
            ("min_p", self.min_p, 0.0, 1.0),
            ("repeat_penalty", self.repeat_penalty, 1e-3, 1e3),
            ("top_k", self.top_k, 0, math.inf),
            ("repeat_last_n", self.repeat_last_n, 0, math.inf),
        ):
            if not low <= value <= high:
                raise UsageError(f"{name} is {value}: expected {low:g} to {high:g}")


class Sampler:
    """Draws tokens; the same parameters, logits and history give the same tokens on every machine."""

    def __init__(self, params: SamplingParams | None = None, *, silent: bool = False) -> None:
        """With `silent` logits that are no numbers give some token, as in llama.cpp, instead of an error."""
        self.params, self.silent = params or SamplingParams(), silent
        self._random = random.Random(self.params.seed)

    def sample(self, logits: npt.NDArray[np.float32], history: Sequence[int] = ()) -> int:
        """The next token id. `logits` is [n_vocab]; `history` are the ids so far, prompt included.

        Stages: penalty, top_k, top_p, min_p, temperature, draw; all in float64, equal logits ordered by id. Raises
        InputError when no logit is a number.
        """
        params = self.params
        if params.temperature == 0 and params.repeat_penalty == 1:  # then the largest of what is given will do
            best = int(np.argmax(logits))  # of NaN if there is any
            if logits.flat[best] > -math.inf:
                return best
        scores = np.asarray(logits, np.float64).reshape(-1)
        if not (scores > -math.inf).any() or np.isnan(scores).any():
            if self.silent:
                return _greedy_as_in_ggml(scores)
            raise InputError("logits hold NaN or no finite value: the model's weights or the prompt are broken")
        scores = _penalised(scores, history, params)
        if params.temperature == 0:
            return int(np.argmax(scores))
        order = np.argsort(-scores, kind="stable")
        if params.top_k:
            order = order[: params.top_k]
        kept = scores[order]
        order = order[: _kept_by_top_p(kept, params.top_p)]
        order = order[: _kept_by_min_p(kept[: len(order)], params.min_p)]
        weights = np.cumsum(np.exp((scores[order] - scores[order[0]]) / params.temperature))
        place = int(np.searchsorted(weights, self._random.random() * weights[-1], side="right"))
        return int(order[min(place, len(order) - 1)])


def _greedy_as_in_ggml(scores: npt.NDArray[np.float64]) -> int:
    """llama.cpp's greedy choice goes from token 0 to whatever compares as greater: nothing does with NaN."""
    return 0 if np.isnan(scores[0]) else int(np.argmax(np.where(np.isnan(scores), -math.inf, scores)))


def _penalised(
    scores: npt.NDArray[np.float64], history: Sequence[int], params: SamplingParams
) -> npt.NDArray[np.float64]:
    """Make recent tokens less likely: positive scores are divided by the penalty, negative ones multiplied."""
    if params.repeat_penalty == 1.0 or not params.repeat_last_n:
        return scores
    recent = np.unique(np.asarray(list(history)[-params.repeat_last_n :], np.int64))
    recent = recent[(recent >= 0) & (recent < len(scores))]
    scores = scores.copy()
    values = scores[recent]
    scores[recent] = np.where(values > 0, values / params.repeat_penalty, values * params.repeat_penalty)
    return scores


def _kept_by_top_p(kept: npt.NDArray[np.float64], top_p: float) -> int:
    """The least number of tokens, best first, whose probabilities reach `top_p`."""
    if top_p >= 1.0:
        return len(kept)
    shares = np.exp(kept - kept[0])
    reached = np.cumsum(shares) >= top_p * shares.sum()
    return int(np.argmax(reached)) + 1 if reached.any() else len(kept)


def _kept_by_min_p(kept: npt.NDArray[np.float64], min_p: float) -> int:
    """Tokens at least `min_p` times as likely as the best."""
    if min_p <= 0.0:
        return len(kept)
    return max(1, int(np.count_nonzero(kept - kept[0] >= math.log(min_p))))
