"""`crossdock simulate`: a model on modelled hardware, or the models of hardware against published rates."""

from __future__ import annotations

import argparse


def simulate(chosen: argparse.Namespace) -> int:
    """Run what the arguments ask for; its module is imported only now."""
    if chosen.published is not None:
        from coordinator.cli.simulate_published import simulate_published

        return simulate_published(chosen)
    from coordinator.cli.simulate_model import simulate_model

    return simulate_model(chosen)
