"""The engine against timelines worked out by hand, to the microsecond, and against laws that no timeline may break."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.simulate.critical import critical_path, totals
from coordinator.simulate.engine import simulate
from coordinator.simulate.fabric import Fabric, Route
from coordinator.simulate.flows import uniform
from coordinator.simulate.hardware import Pool
from coordinator.simulate.timed import Act, Do, Hop, Job, Timed
from coordinator.simulate.timeline import Timeline
from protocol.errors import PlanError

US = 1e-6
MB = 1_000_000


def us(seconds: float) -> float:
    return round(seconds / US, 6)


def run(seconds_us: float, split: int = 0) -> Act:
    return Act(Do.RUN, seconds_us * US, -1, split)


def hop_act(do: Do, hop: int, split: int = 1) -> Act:
    return Act(do, 0.0, hop, split)


def two(latency_us: float = 10, bandwidth: float = 1e9) -> Fabric:
    """Two workers, one link: a route in each direction."""
    routes = (Route("a -> b", latency_us * US, bandwidth), Route("b -> a", latency_us * US, bandwidth))
    return Fabric(routes, {(0, 1): 0, (1, 0): 1})


HANDED_OVER = Timed(
    "handed over",
    (
        (run(100), hop_act(Do.SEND, 0), run(50, 1), hop_act(Do.WAIT, 0, 2)),
        (run(30), hop_act(Do.RECV, 0), run(70, 1)),
    ),
    (Hop(0, 1, 1 * MB, 1, "x", 0),),
)
"""Worker a computes 100 us, hands 1 MB to b, computes 50 us; b computes 30 us, takes it, computes 70 us."""


def test_two_devices_one_link() -> None:
    """1 MB at 1 GB/s takes 1000 us, then 10 us of latency. a sends at 100 us, so the bytes have left at 1100 and are
    there at 1110; b, waiting since 30, ends at 1180. a, with copies that overlap, computes until 150 and waits for
    its loan until 1100."""
    timeline = simulate((True, True), two(), [HANDED_OVER], [[Job(0)]], check=True, record=True)
    assert us(timeline.end_s) == 1180
    a, b = timeline.workers
    assert (us(a.busy_s), us(a.send_s), us(a.wait_s)) == (150, 0, 950)
    assert (us(b.busy_s), us(b.recv_s)) == (100, 1080)
    (carried,) = timeline.carried
    assert [us(t) for t in carried[1:5]] == [100, 100, 1100, 1110]
    assert timeline.route_nbytes == [1 * MB, 0]
    assert us(timeline.route_busy_s[0]) == 1000


def test_copies_that_block() -> None:
    """Without asynchronous copies a waits in SEND from 100 to 1100 and computes its 50 us only then."""
    timeline = simulate((False, False), two(), [HANDED_OVER], [[Job(0)]], check=True, record=True)
    a = timeline.workers[0]
    assert (us(a.busy_s), us(a.send_s), us(a.wait_s)) == (150, 1000, 0)
    assert max(us(s.end) for s in timeline.slices if s.worker == 0) == 1150
    assert us(timeline.end_s) == 1180


def test_the_receiver_decides_when_it_is_late() -> None:
    """b computes 500 us first, so the transfer starts at 500 and b ends at 500 + 1000 + 10 + 70; with slots of its own
    for each evaluation the bytes have come before: they start at 100, and b ends at 1180 all the same. That takes a
    device that copies while it computes."""
    late = HANDED_OVER._replace(workers=(HANDED_OVER.workers[0], (run(500), *HANDED_OVER.workers[1][1:])))
    assert us(simulate((True, True), two(), [late], [[Job(0)]], check=True).end_s) == 1580
    slots = late._replace(buffered=True)
    assert us(simulate((True, True), two(), [slots], [[Job(0)]], check=True).end_s) == 1180
    assert us(simulate((True, False), two(), [slots], [[Job(0)]], check=True).end_s) == 1580


def test_transfers_of_a_split_overlap_their_latency_with_asynchronous_copies() -> None:
    """Two transfers of 100 us and 10 us of latency: 100 + 100 + 10 when both are asked for at once, else
    100 + 10 + 100 + 10."""
    program = Timed(
        "two inputs",
        ((hop_act(Do.SEND, 0), hop_act(Do.SEND, 1)), (hop_act(Do.RECV, 0), hop_act(Do.RECV, 1))),
        (Hop(0, 1, MB // 10, 1, "x", 0), Hop(0, 1, MB // 10, 1, "y", 0)),
    )
    assert us(simulate((True, True), two(), [program], [[Job(0)]], check=True).end_s) == 210
    assert us(simulate((True, False), two(), [program], [[Job(0)]], check=True).end_s) == 220


def shared(n: int, capacity: float, caps: tuple[float, ...] | None = None) -> Fabric:
    """Worker 0 and n others; the routes from 0 share one medium."""
    limits = caps or (1e9,) * n
    routes = tuple(Route(f"0 -> {k + 1}", 0.0, limits[k], (0,)) for k in range(n))
    return Fabric(routes, {(0, k + 1): k for k in range(n)}, (capacity,), ("switch",))


def spread(delays_us: list[float], nbytes: list[int]) -> Timed:
    """Worker 0 sends to worker k + 1 after delay k (since the last one); each waits for its bytes."""
    acts: list[Act] = []
    for k, delay in enumerate(delays_us):
        acts += [run(delay), hop_act(Do.SEND, k)] if delay else [hop_act(Do.SEND, k)]
    receivers = tuple((hop_act(Do.RECV, k),) for k in range(len(nbytes)))
    hops = tuple(Hop(0, k + 1, n, 1, f"x{k}", k) for k, n in enumerate(nbytes))
    return Timed("spread", (tuple(acts), *receivers), hops)


def test_a_pooledlink_with_contention() -> None:
    """Two transfers of 1 MB over a switch of 1 GB/s, the second 400 us after the first. Until 400 the first has the
    switch alone and moves 400 kB. Then both get 500 MB/s: the first's last 600 kB take 1200 us, until 1600. By then the
    second has 600 kB as well, and its last 400 kB take 400 us alone: until 2000."""
    timeline = simulate((True,) * 3, shared(2, 1e9), [spread([0, 400], [MB, MB])], [[Job(0)]], check=True, record=True)
    assert [us(c.left) for c in timeline.carried] == [1600, 2000]
    assert us(timeline.end_s) == 2000


def test_a_slow_link_leaves_its_share_to_the_others() -> None:
    """Over a switch of 1 GB/s a link of 200 MB/s takes what it can, the other two share 800: 400 MB/s each. At 1000 us
    those have 400 kB of 400 kB; the slow one has 200 kB of 1 MB and needs 4000 us more."""
    fabric = shared(3, 1e9, (0.2e9, 1e9, 1e9))
    timeline = simulate(
        (True,) * 4, fabric, [spread([0, 0, 0], [MB, 400_000, 400_000])], [[Job(0)]], check=True, record=True
    )
    assert [us(c.left) for c in timeline.carried] == [1000, 1000, 5000]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 10**6), st.sampled_from((1e8, 4e8, 1e9))), min_size=2, max_size=6
    ),
    st.sampled_from((2e8, 1e9, 5e9)),
)
def test_both_ways_to_share_agree(sent: list[tuple[int, int, float]], capacity: float) -> None:
    """A medium that routes use alone is computed by groups, joined ones by filling all rates: with a second medium that
    is never full both must give the same times."""
    timed = spread([float(delay) for delay, _, _ in sent], [nbytes for _, nbytes, _ in sent])
    alone = shared(len(sent), capacity, tuple(cap for _, _, cap in sent))
    joined = Fabric(
        tuple(replace(route, media=(0, 1)) for route in alone.routes), alone.index, (capacity, 1e15), ("switch", "sky")
    )
    first, second = (
        simulate((True,) * (len(sent) + 1), fabric, [timed], [[Job(0)]], check=True, record=True)
        for fabric in (alone, joined)
    )
    times = [{c.hop: c.left for c in timeline.carried} for timeline in (first, second)]
    assert times[0] == pytest.approx(times[1], abs=1e-12)


def pipeline(n: int, stage_us: float, *, buffered: bool) -> tuple[Timed, Fabric]:
    """n stages of equal length that hand 1 kB on, over links of 1 GB/s without latency."""
    workers = []
    for k in range(n):
        acts = [hop_act(Do.RECV, k - 1, k)] if k else []
        acts.append(run(stage_us, k))
        workers.append((*acts, hop_act(Do.SEND, k, k + 1), hop_act(Do.WAIT, k, n)) if k < n - 1 else tuple(acts))
    hops = tuple(Hop(k, k + 1, 1000, k + 1, "x", k) for k in range(n - 1))
    routes = tuple(Route(f"{k} -> {k + 1}", 0.0, 1e9) for k in range(n - 1))
    return Timed("pipeline", tuple(workers), hops, buffered), Fabric(routes, {(k, k + 1): k for k in range(n - 1)})


def test_micro_batches_fill_the_pipeline() -> None:
    """Three stages of 100 us, 1 us between them: 302 us each; eight of them one after the other take 8 x 302. With four
    under way the first is done after 302 and then one every 101: a stage's 100 and 1 until what it lent has left."""
    timed, fabric = pipeline(3, 100, buffered=True)
    one = simulate((True,) * 3, fabric, [timed], [[Job(0)] * 8], check=True)
    assert us(one.end_s) == 8 * 302
    four = simulate((True,) * 3, fabric, [timed], [[Job(0, window=4)] * 8], check=True)
    assert us(four.end_s) == 302 + 7 * 101


def test_two_sequences_share_two_devices() -> None:
    """A token needs both devices in turn and is done 201 us after it began. Of two sequences the second follows 101
    behind (100, and 1 until the loan is back), and the first begins its next token 101 after that: 202 a round."""
    timed, fabric = pipeline(2, 100, buffered=True)
    alone = simulate((True, True), fabric, [timed], [[Job(0)] * 10], check=True)
    both = simulate((True, True), fabric, [timed], [[Job(0)] * 10] * 2, check=True)
    assert us(alone.end_s) == 10 * 201
    assert us(both.end_s) == 9 * 202 + 201 + 101


def test_results_for_the_coordinator_end_an_evaluation() -> None:
    """The next evaluation waits for the bytes of the last: 100 us + 500 kB at 1 GB/s + 10 us, twice, and 5 us of the
    host between them."""
    program = Timed("out", ((), (run(100), hop_act(Do.OUT, 0))), (Hop(1, -1, 500_000, 1, "logits", 1),))
    timeline = simulate((True, True), two(), [program], [[Job(0), Job(0, gap_s=5 * US)]], check=True, record=True)
    assert us(timeline.end_s) == 2 * 610 + 5
    assert [(p.kind, p.where, us(p.seconds)) for p in critical_path(timeline)] == [
        ("compute", 1, 100), ("bytes", 1, 500), ("latency", 1, 10), ("host", -1, 5),
        ("compute", 1, 100), ("bytes", 1, 500), ("latency", 1, 10),
    ]  # fmt: skip


def test_small_transfers_late_in_a_long_run() -> None:
    """4 bytes at 24 GB/s take less than a clock of 1000 seconds can tell exactly: no reason to cry."""
    program = Timed(
        "late", ((run(1e9), hop_act(Do.SEND, 0), hop_act(Do.WAIT, 0)), (hop_act(Do.RECV, 0),)),
        (Hop(0, 1, 4, 1, "out_ids", 0),),
    )  # fmt: skip
    timeline = simulate((True, True), two(bandwidth=24e9), [program], [[Job(0)] * 5], check=True)
    assert timeline.end_s == pytest.approx(5000, rel=1e-6)
    assert timeline.route_nbytes[0] == 20


def test_jitter_depends_on_the_seed_alone() -> None:
    routes = (Route("a -> b", 10 * US, 1e9, jitter=0.5), Route("b -> a", 10 * US, 1e9))
    fabric = Fabric(routes, {(0, 1): 0, (1, 0): 1})
    ends = [simulate((True, True), fabric, [HANDED_OVER], [[Job(0)] * 5], seed=s, check=True).end_s for s in (1, 1, 2)]
    assert ends[0] == ends[1] != ends[2]
    assert 5 * 1180 <= us(ends[0]) <= 5 * (1180 + 505)
    assert len({uniform(3, k) for k in range(1000)}) == 1000


def test_programs_that_wait_for_each_other() -> None:
    program = Timed("knot", ((hop_act(Do.RECV, 1), hop_act(Do.SEND, 0)), (hop_act(Do.RECV, 0), hop_act(Do.SEND, 1))),
                    (Hop(0, 1, 8, 1, "x", 0), Hop(1, 0, 8, 1, "y", 1)))  # fmt: skip
    with pytest.raises(PlanError, match="knot: worker 0 is at RECV of 'y'"):
        simulate((True, True), two(), [program], [[Job(0)]])


@st.composite
def chains(draw: st.DrawFn) -> tuple[Timed, Fabric, int]:
    """A random program in split order over a few workers whose links share random media."""
    n = draw(st.integers(2, 4))
    n_media = draw(st.integers(1, 3))
    routes, index = [], {}
    for a in range(n):
        for b in range(n):
            if a != b:
                media = tuple(sorted(draw(st.sets(st.integers(0, n_media - 1), max_size=2))))
                index[a, b] = len(routes)
                cap = draw(st.sampled_from((1e8, 5e8, 1e9)))
                routes.append(Route(f"{a} -> {b}", draw(st.sampled_from((0.0, 5 * US))), cap, media))
    workers: list[list[Act]] = [[] for _ in range(n)]
    hops: list[Hop] = []
    for split in range(draw(st.integers(1, 8))):
        a = draw(st.integers(0, n - 1))
        for b in sorted(draw(st.sets(st.integers(0, n - 1), max_size=2)) - {a}):
            workers[b].append(hop_act(Do.SEND, len(hops), split))
            workers[a].append(hop_act(Do.RECV, len(hops), split))
            hops.append(Hop(b, a, draw(st.integers(0, 300_000)), split, f"x{split}", index[b, a]))
        workers[a].append(run(draw(st.integers(0, 200)), split))
    for k, hop in enumerate(hops):
        workers[hop.source].append(hop_act(Do.WAIT, k, 99))
    capacity = tuple(draw(st.sampled_from((1e8, 7e8))) for _ in range(n_media))
    timed = Timed("random", tuple(map(tuple, workers)), tuple(hops), draw(st.booleans()))
    return timed, Fabric(tuple(routes), index, capacity, ("m",) * n_media), n


@settings(max_examples=60, deadline=None)
@given(chains(), st.lists(st.booleans(), min_size=4, max_size=4), st.integers(1, 4), st.integers(1, 3))
def test_laws(case: tuple[Timed, Fabric, int], is_async: list[bool], window: int, n_sequences: int) -> None:
    timed, fabric, n = case
    sequences = [[Job(0, window)] * 3] * n_sequences
    first = simulate(is_async[:n], fabric, [timed], sequences, check=True, record=True)
    again = simulate(is_async[:n], fabric, [timed], sequences)
    assert (first.end_s, first.tallies) == (again.end_s, again.tallies)
    assert (len(first.jobs), len(again.jobs)) == (3 * n_sequences, 0)
    (tally,) = first.tallies.values()
    assert (tally.n, tally.seconds) == (3 * n_sequences, pytest.approx(sum(j.end - j.released for j in first.jobs)))
    assert first.span("") == max(job.end for job in first.jobs) - min(job.released for job in first.jobs)
    assert all(job.end >= job.released for job in first.jobs)
    assert sum(first.route_nbytes) == 3 * n_sequences * sum(hop.nbytes for hop in timed.hops)
    check_slices(first, n)
    path = critical_path(first)
    assert sum(part.seconds for part in path) == pytest.approx(first.end_s)


def check_slices(timeline: Timeline, n: int) -> None:
    """No worker does two things at once, and what it is said to have spent is what its slices say."""
    for worker in range(n):
        mine = sorted(s for s in timeline.slices if s.worker == worker)
        assert all(before.end <= after.start + 1e-12 for before, after in pairwise(mine))
        busy = sum(s.end - s.start for s in mine if s.do == Do.RUN)
        assert busy == pytest.approx(timeline.workers[worker].busy_s)


def test_critical_path_by_hand() -> None:
    """a computes 100 us, 1000 us of bytes, 10 us of latency, b computes 70 us; the other 50 and 30 do not matter."""
    timeline = simulate((True, True), two(), [HANDED_OVER], [[Job(0)]], record=True)
    parts = critical_path(timeline)
    assert [(p.kind, p.where, us(p.seconds)) for p in parts] == [
        ("compute", 0, 100), ("bytes", 0, 1000), ("latency", 0, 10), ("compute", 1, 70),
    ]  # fmt: skip


def test_critical_path_goes_through_the_late_receiver_and_through_evaluations() -> None:
    late = HANDED_OVER._replace(workers=(HANDED_OVER.workers[0], (run(500), *HANDED_OVER.workers[1][1:])))
    timeline = simulate((True, True), two(), [late], [[Job(0), Job(0, gap_s=5 * US)]], record=True)
    found = {key: us(sum(splits.values())) for key, splits in totals(critical_path(timeline)).items()}
    assert found == {("compute", 1): 2 * 570, ("bytes", 0): 2000, ("latency", 0): 20, ("host", -1): 5}


def test_critical_path_names_the_queue() -> None:
    program = Timed(
        "two inputs",
        ((hop_act(Do.SEND, 0), hop_act(Do.SEND, 1)), (hop_act(Do.RECV, 0), hop_act(Do.RECV, 1))),
        (Hop(0, 1, MB // 10, 1, "x", 0), Hop(0, 1, MB // 10, 1, "y", 0)),
    )
    timeline = simulate((True, True), two(), [program], [[Job(0)]], record=True)
    parts = [(p.kind, p.name, us(p.seconds)) for p in critical_path(timeline)]
    assert parts == [("queue", "y", 100), ("bytes", "y", 100), ("latency", "y", 10)]


def on_processors(n: int, processors: float) -> Fabric:
    return Fabric((), {}, pools=(Pool(processors, frozenset(range(n))),))


def alone(us_each: list[float]) -> Timed:
    return Timed("alone", tuple((run(each),) for each in us_each), ())


@pytest.mark.parametrize(
    ("us_each", "processors", "ends"),
    [
        ([100, 100], 2, [100, 100]),
        ([100, 100], 1.5, [100 / 0.75] * 2),
        ([100, 100, 100], 2, [150, 150, 150]),
        ([60, 120, 120], 2, [90, 150, 150]),
        ([100], 0.5, [200]),
    ],
)
def test_workers_share_processors(us_each: list[float], processors: float, ends: list[float]) -> None:
    """Three on two processors compute at two thirds of their speed; of 60, 120 and 120 us the first is done after 90,
    when the others have 60 left and a processor each."""
    n = len(us_each)
    fabric = on_processors(n, processors)
    timeline = simulate((True,) * n, fabric, [alone(us_each)], [[Job(0)]], check=True, record=True)
    assert [us(s.end) for s in sorted(timeline.slices, key=lambda s: s.worker)] == pytest.approx(ends, abs=1e-5)
    assert [us(worker.busy_s) for worker in timeline.workers] == pytest.approx(ends, abs=1e-5)
    assert us(sum(part.seconds for part in critical_path(timeline))) == pytest.approx(max(ends), abs=1e-5)


@pytest.mark.parametrize(
    ("demands", "ends"), [((20e9, 20e9), [400 / 3, 400 / 3]), ((5e9, 40e9), [100, 150]), ((5e9, 5e9), [100, 100])]
)
def test_workers_share_a_memory(demands: tuple[float, ...], ends: list[float]) -> None:
    """Two workers compute 100 us each, and 30 GB/s come from memory. Who asks for 5 gets it; 40 are slowed down to 25
    until the other is done, then to 30: 62.5 us of work in 100, the other 37.5 in 50."""
    fabric = Fabric((), {}, pools=(Pool(2, frozenset((0, 1)), 30e9),))
    timeline = simulate(
        (True, True), fabric, [alone([100, 100])], [[Job(0)]], check=True, record=True, demands=[demands]
    )
    assert [us(s.end) for s in sorted(timeline.slices, key=lambda s: s.worker)] == pytest.approx(ends, abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(chains(), st.floats(0.5, 5.0), st.integers(1, 3))
def test_laws_of_shared_processors(case: tuple[Timed, Fabric, int], processors: float, n_sequences: int) -> None:
    """They change nothing where there are enough, and no more is computed at once than they can."""
    timed, fabric, n = case
    few = replace(fabric, pools=(Pool(processors, frozenset(range(n))),))
    sequences = [[Job(0)] * 2] * n_sequences
    own = simulate((True,) * n, fabric, [timed], sequences, check=True)
    pooled = simulate((True,) * n, few, [timed], sequences, check=True, record=True)
    again = simulate((True,) * n, few, [timed], sequences)
    assert again.end_s == pooled.end_s
    work = 2 * n_sequences * sum(act.seconds for acts in timed.workers for act in acts if act.do == Do.RUN)
    assert pooled.end_s * min(processors, n) >= work * (1 - 1e-9)
    if processors >= n:
        assert pooled.end_s == pytest.approx(own.end_s)
    check_slices(pooled, n)
    assert sum(part.seconds for part in critical_path(pooled)) == pytest.approx(pooled.end_s)
