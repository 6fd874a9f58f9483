from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from coordinator.model.sampling import Sampler, SamplingParams
from protocol.errors import InputError, UsageError

LOGITS = np.log(np.array([0.05, 0.5, 0.25, 0.15, 0.05], np.float32))


def draws(params: SamplingParams, count: int = 2000) -> Counter[int]:
    sampler = Sampler(params)
    return Counter(sampler.sample(LOGITS) for _ in range(count))


def test_greedy_is_the_default_and_takes_the_first_of_equals() -> None:
    assert Sampler().sample(LOGITS) == 1
    assert Sampler().sample(np.array([1, 3, 3], np.float32)) == 1
    assert Sampler().sample(np.array([-np.inf, -5], np.float32)) == 1


def test_same_seed_same_tokens() -> None:
    params = SamplingParams(temperature=1.0, seed=7)
    first = [Sampler(params).sample(LOGITS) for _ in range(3)]
    assert len(set(first)) == 1
    a, b = Sampler(params), Sampler(params)
    run = [a.sample(LOGITS) for _ in range(50)]
    assert run == [b.sample(LOGITS) for _ in range(50)]
    other = Sampler(SamplingParams(temperature=1.0, seed=8))
    assert run != [other.sample(LOGITS) for _ in range(50)]


def test_pinned_sequence() -> None:
    """The draw is part of the contract: a change of it changes every sampled answer."""
    sampler = Sampler(SamplingParams(temperature=1.0, seed=0))
    assert [sampler.sample(LOGITS) for _ in range(8)] == [3, 3, 1, 1, 2, 1, 3, 1]


def test_temperature_one_follows_the_probabilities() -> None:
    counts = draws(SamplingParams(temperature=1.0, seed=1), 20_000)
    for token, share in enumerate(np.exp(LOGITS)):
        assert abs(counts[token] / 20_000 - share) < 0.012


def test_low_temperature_sharpens() -> None:
    assert draws(SamplingParams(temperature=0.1, seed=1))[1] > 1990


def test_top_k() -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_k=2))) == {1, 2}
    assert set(draws(SamplingParams(temperature=5.0, top_k=1))) == {1}


def test_top_p_keeps_the_least_that_reaches() -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.7))) == {1, 2}
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.8))) == {1, 2, 3}
    assert set(draws(SamplingParams(temperature=1.0, top_p=0.0))) == {1}


def test_min_p() -> None:
    assert set(draws(SamplingParams(temperature=1.0, min_p=0.2))) == {1, 2, 3}
    assert set(draws(SamplingParams(temperature=1.0, min_p=1.0))) == {1}


def test_repeat_penalty() -> None:
    logits = np.array([2.0, 1.9, -1.0], np.float32)
    params = SamplingParams(repeat_penalty=1.5)
    assert Sampler(params).sample(logits, [0]) == 1
    assert Sampler(params).sample(logits, [0, 1]) == 0
    assert Sampler(SamplingParams(repeat_penalty=1.5, repeat_last_n=1)).sample(logits, [0, 2]) == 0
    assert Sampler(params).sample(np.array([-1.0, -1.2], np.float32), [0, 0, 99]) == 1
    assert logits[0] == 2.0  # the caller's array is untouched


def test_bad_logits_and_parameters() -> None:
    for logits in ([np.nan, 1.0], [-np.inf, -np.inf]):
        with pytest.raises(InputError, match="logits"):
            Sampler().sample(np.array(logits, np.float32))
    for bad in ({"temperature": -1.0}, {"top_p": 1.5}, {"min_p": float("nan")}, {"repeat_penalty": 0.0}, {"top_k": -1}):
        with pytest.raises(UsageError, match=next(iter(bad))):
            SamplingParams(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_the_same_with_and_without_its_short_way(seed: int) -> None:
    """A penalty that reaches no token takes the long way."""
    rng = np.random.default_rng(seed)
    logits = rng.integers(-3, 3, 50).astype(np.float32)
    logits[rng.integers(0, 50, 3)] = [-np.inf, np.inf, 1e30][: 1 + seed % 3] + [0] * (2 - seed % 3)
    assert Sampler().sample(logits) == Sampler(SamplingParams(repeat_penalty=1.5)).sample(logits, [])
