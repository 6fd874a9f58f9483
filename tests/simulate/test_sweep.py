"""Sweeps that fail somewhere say so before anything is simulated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from machines import gpu, machine

from coordinator.model.presets import Blueprint, open_blueprint
from coordinator.simulate.series import Load, Options
from coordinator.simulate.sweep import parse_sweep, sweep
from protocol.errors import UsageError

TINY = str(Path(__file__).parents[1] / "data" / "ref_mllama" / "config.json")
LOAD = Load(n_prompt=16, n_predict=2, n_images=0)


@pytest.fixture(scope="module")
def tiny() -> Blueprint:
    return open_blueprint(TINY)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n-gpu-layers=0..40:4", "n-gpu-layers: 40: the model has 6 layers and an output: expected 0 to 7"),
        ("batch=1,2,prompt=16,9000000", "--prompt 9000000 and --predict 2 need 9000002 positions"),
        ("batch=1,2,ctx-size=0,9000000", "--ctx-size 9000000: the model was trained for"),
        ("images=0,1", "takes no images"),
    ],
)
def test_the_last_combination_is_wrong(tiny: Blueprint, text: str, says: str) -> None:
    blind = replace(tiny, params=replace(tiny.params, vision=None))
    points = sweep(blind, machine(gpu("gpu0")), Options(), LOAD, parse_sweep(text))
    with pytest.raises(UsageError, match=says):
        next(points)


def test_what_is_either_on_or_off() -> None:
    assert parse_sweep("parallel=0,1") == {"parallel": (0, 1)}
    with pytest.raises(UsageError, match="'2': expected 0 to 1"):
        parse_sweep("parallel=2")
