"""Suspicion follows from beats and progress alone, at the times it should."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from millrace.replicas.suspicion import GROUP_WAITS, WAITING_MAY, Watched

times = st.lists(st.floats(0.01, 0.9), min_size=1, max_size=30)


@given(gaps=times, within_s=st.none() | st.floats(0.95, 5.0))
def test_one_who_beats_and_gets_on_is_never_suspected(gaps: list[float], within_s: float | None) -> None:
    now_s, watched = 100.0, Watched(100.0).expected(100.0, within_s)
    for count, gap_s in enumerate(gaps):
        now_s += gap_s
        assert watched.suspicion(now_s) is None
        watched = watched.beaten(now_s, count + 1, "work")


@given(gaps=times, silent_s=st.floats(1.01, 100.0))
def test_one_who_no_longer_beats_has_stopped(gaps: list[float], silent_s: float) -> None:
    watched, now_s = Watched(0.0), 0.0
    for gap_s in gaps:
        now_s += gap_s
        watched = watched.beaten(now_s, 0, "")
    assert watched.suspicion(now_s + silent_s) == "stopped (no sign of life for 1.0 s)"
    assert watched.said(now_s + silent_s).suspicion(now_s + silent_s)  # its words may have been long under way
    assert watched.excused(now_s + silent_s).suspicion(now_s + silent_s + 0.99) is None


@given(within_s=st.floats(0.1, 20.0), beats=st.integers(0, 100))
def test_one_who_beats_without_getting_on_is_stuck_after_its_time(within_s: float, beats: int) -> None:
    watched = Watched(0.0).beaten(0.0, 7, "all-reduce of step 4").expected(0.0, within_s)
    for beat in range(beats):
        watched = watched.beaten(within_s * beat / 100, 7, "all-reduce of step 4")
    last_s = watched.beaten(within_s * 0.99, 7, "all-reduce of step 4")
    assert last_s.suspicion(within_s * 0.99) is None
    late = last_s.beaten(within_s * 1.01, 7, "all-reduce of step 4")
    why = late.suspicion(within_s * 1.01)
    assert why is not None
    assert "stuck" in why
    assert "all-reduce of step 4" in why
    for excuse in (
        late.said(within_s * 1.01),
        late.beaten(within_s * 1.01, 8, ""),
        late.expected(within_s * 1.01, within_s),
        late.expected(within_s * 1.01, None),
        late.excused(within_s * 1.01),
    ):
        assert excuse.suspicion(within_s * 1.01 + min(0.09, within_s * 0.9)) is None


@given(within_s=st.floats(0.1, 20.0))
def test_who_waits_for_others_is_suspected_after_who_does_not_and_after_its_group_gave_up(within_s: float) -> None:
    began = Watched(0.0).expected(0.0, within_s)

    def suspected(waits: bool, now_s: float) -> bool:
        return began.beaten(now_s, 0, "all-reduce of step 4", waits).suspicion(now_s) is not None

    assert suspected(False, 1.01 * within_s)
    for waited in (1.01, GROUP_WAITS * 1.1):
        assert not suspected(True, waited * within_s)
    assert suspected(True, 1.01 * WAITING_MAY * within_s)
    moved = began.beaten(within_s, 1, "all-reduce of step 4", True).beaten(1.5 * within_s, 2, "updating", False)
    assert moved.beaten(2.51 * within_s, 2, "updating", False).suspicion(2.51 * within_s) is not None


def test_one_of_whom_nothing_is_expected_may_idle_as_long_as_it_beats() -> None:
    assert Watched(0.0).beaten(1000.0, 0, "").suspicion(1000.5) is None
