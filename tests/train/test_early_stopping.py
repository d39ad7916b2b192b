"""Early stopping against its definition, and across a checkpoint."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from millrace.errors import SettingError
from millrace.train.early_stopping import Decision, EarlyStopping, StoppingState

configs = st.builds(
    EarlyStopping,
    patience=st.integers(1, 4),
    mode=st.sampled_from(["min", "max"]),
    min_delta=st.sampled_from([0.0, 0.5, 1.0]),
)
curves = st.lists(st.sampled_from([0.0, 0.25, 1.0, 1.5, 2.0, 3.0, math.nan, math.inf, -math.inf]), max_size=20)


def decisions(config: EarlyStopping, curve: list[float]) -> list[Decision]:
    state, made = StoppingState(), []
    for step, value in enumerate(curve):
        made.append(config.observe(state, value, step))
        state = made[-1].state
    return made


@given(configs, curves)
def test_it_stops_exactly_after_patience_evaluations_without_a_better_one(
    config: EarlyStopping, curve: list[float]
) -> None:
    sign = 1 if config.mode == "max" else -1
    best, best_step, last_better = None, None, -1
    for step, (value, decision) in enumerate(zip(curve, decisions(config, curve), strict=True)):
        better = math.isfinite(value) and (best is None or sign * (value - best) > config.min_delta)
        if better:
            best, best_step, last_better = value, step, step
        assert decision.improved == better
        assert (decision.state.best, decision.state.best_step) == (best, best_step)
        assert decision.stop == (step - last_better >= config.patience)


@given(configs, curves, st.integers(0, 20))
def test_a_state_restored_from_json_decides_the_same(config: EarlyStopping, curve: list[float], at: int) -> None:
    straight = decisions(config, curve)
    state = straight[at - 1].state if 0 < at <= len(curve) else StoppingState()
    restored = StoppingState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert restored == state
    for step in range(at, len(curve)):
        decision = config.observe(restored, curve[step], step)
        assert decision == straight[step]
        restored = decision.state


def test_settings_out_of_range_and_unknown_metrics_are_named() -> None:
    for wrong in ({"mode": "best"}, {"patience": 0}, {"min_delta": -1.0}, {"min_delta": math.nan}):
        with pytest.raises(SettingError, match=f"EarlyStopping: {next(iter(wrong))} must be"):
            EarlyStopping(**wrong)  # type: ignore[arg-type]
    config = EarlyStopping("test_loss")
    assert config.value_in({"test_loss": 1.5}) == 1.5
    with pytest.raises(SettingError, match=r"watches 'test_loss'.*Did you mean 'text_loss'"):
        config.value_in({"text_loss": 1.0, "accuracy": 0.5})
