"""Plans of random graphs without known hazards prove right."""

import random

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coordinator.schedule.check import check_plan
from coordinator.schedule.document import load_document
from coordinator.schedule.scheduler import Scheduler
from tests.conformance.documents import tame_document


@given(rng=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
def test_plans_prove_right(rng: random.Random) -> None:
    document = load_document(tame_document(rng))
    scheduler = Scheduler(document.devices, parallel=document.parallel, op_offload=document.op_offload)
    graph = document.entries[0].graph
    for _ in range(2):
        check_plan(scheduler.allocate(graph))
