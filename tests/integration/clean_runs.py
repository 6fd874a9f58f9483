"""Runs that have no fault, over random fleets, placements and prompts, with every read checked: no alarm may come.

python -m tests.integration.clean_runs --runs 200 --seed 0
"""

from __future__ import annotations

import argparse
import random
import sys
from pathlib import Path

from coordinator.cli.options import DEMO_MODEL, EXAMPLES
from coordinator.ownership.violation import OwnershipError
from coordinator.runtime.session import Ownership, SessionOptions
from coordinator.schedule.placement import PlacementOptions
from protocol.dtypes import DType
from tests.integration.describing import Loaded, answer, chat_prompt, fleet_of, load

FLEETS = ("cpu:1", "cpu:1,accel:1", "cpu:1,accel:2", "cpu:1,accel:3", "cpu:2,accel:1")
RUNS_PER_FLEET = 10
DEBUG = ("inp_raw_copy", "kq_mask_copy", "inp_pos_copy", "attn_inp_kq_mask_copy")


def clean_runs(n: int, seed: int, *, say: bool = False) -> list[str]:
    """What alarmed, or answered otherwise than on one worker; `n` runs, the same ones for the same seed."""
    chance, demo = random.Random(seed), load(DEMO_MODEL)
    images = sorted((EXAMPLES / "images").glob("*.png"))
    right: dict[tuple[Path, ...], str] = {}
    wrong: list[str] = []
    done = 0
    while done < n:
        workers, transport = chance.choice(FLEETS), chance.choice(("ipc", "ipc", "tcp"))
        accelerators = sum(int(part.split(":")[1]) for part in workers.split(",")) - 1
        with fleet_of(workers, chance.choice((1, 2)), transport) as fleet:
            for _ in range(min(RUNS_PER_FLEET, n - done)):
                shown = tuple(chance.sample(images, chance.choice((0, 1, 1, 1, 2))))
                options = _options(chance, demo, accelerators, len(shown))
                prompt = chat_prompt(demo, "Describe this image.", shown)
                done += 1
                try:
                    text = answer(fleet, demo, prompt, options).text
                except OwnershipError as error:
                    wrong.append(f"{workers} {transport} {options}: {error}")
                    break  # its workers have ended
                if right.setdefault(shown, text) != text:
                    wrong.append(f"{workers} {transport} {options}: {text!r} instead of {right[shown]!r}")
        if say:
            print(f"{done} runs, {len(wrong)} wrong", flush=True)
    return wrong


def _options(chance: random.Random, demo: Loaded, accelerators: int, n_images: int) -> SessionOptions:
    """A run without a fault: what outlives its graph has memory of its own, or a scheduler of its own."""
    safe = n_images > 1 or chance.random() < 0.5
    split = tuple(chance.choice((0.0, 1.0, 3.0)) for _ in range(accelerators))
    placement = PlacementOptions(
        chance.choice((None, *range(demo.params.text.n_layer + 2))) if accelerators else None,
        split if any(split) else (),
        kv_offload=chance.random() < 0.8,
    )
    return SessionOptions(
        placement,
        chance.choice((0, 64, 128)),
        chance.choice((512, 16, 8)),
        chance.choice((DType.F16, DType.F32)),
        share_scheduler=safe and chance.random() < 0.7,
        debug=tuple(chance.sample(DEBUG if n_images else DEBUG[2:], chance.choice((0, 0, 1, 2)))),
        ownership=Ownership.SAFE if safe else Ownership.STRICT,
        check=True,
    )


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    wrong = clean_runs(chosen.runs, chosen.seed, say=True)
    print("\n".join(wrong) or f"{chosen.runs} runs, no alarm, every answer the same")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
