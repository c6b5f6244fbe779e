"""The controller: constant weight, the paper's update against an oracle of the whole history, its edges."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_plugin.controller import ControllerSettings, ControllerState, start, update, warm_up
from tests.reference.controller import dual_ascent

ASCENT = ControllerSettings(tau=0.5, eta=0.02)


def run(values, asked=ASCENT):
    """Return all states, the first one before any step."""
    states = [start(asked)]
    for value in values:
        states.append(update(states[-1], value))
    return states


def falling(steps, seed=0):
    rng = np.random.default_rng(seed)
    return (3.0 * (1 + np.arange(steps)) ** -0.5 * np.exp(0.2 * rng.standard_normal(steps))).tolist()


def test_defaults__no_tau__constant_weight_of_one_half():
    states = run(falling(50), ControllerSettings())
    assert {state.beta for state in states} == {0.5}
    assert states[-1].ema != states[1].ema
    assert states[-1].share_at_bound == 0.0


def test_defaults__constant_weight__bounds_do_not_apply():
    assert run([1.0, 2.0], ControllerSettings(beta_start=3.0))[-1].beta == 3.0


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.99])
@pytest.mark.parametrize("tau", [0.3, 1.0, 3.0])
def test_update__falling_losses__equals_the_oracle_of_the_whole_history(tau, decay):
    values = falling(200, seed=3)
    states = run(values, ControllerSettings(tau=tau, eta=0.01, ema_decay=decay))
    want = dual_ascent(values, tau=tau, eta=0.01, decay=decay)
    assert [(s.ema, s.beta) for s in states[1:]] == [pytest.approx(pair, rel=1e-12) for pair in want]


def test_update__first_value__starts_the_average():
    assert run([2.0])[1].ema == 2.0


def test_update__violated_and_slack_constraint__beta_rises_and_falls_to_its_bounds():
    slack = run([0.1] * 100, ControllerSettings(tau=1.0, eta=0.1))
    violated = run([2.0] * 100, ControllerSettings(tau=1.0, eta=0.1))
    assert slack[1].beta == pytest.approx(0.5 - 0.09)
    assert violated[1].beta == pytest.approx(0.6)
    assert (slack[-1].beta, violated[-1].beta) == (0.1, 1.0)


def test_update__loss_rises_half_way__beta_answers():
    """As when the teacher is swapped for one that the student is further from."""
    asked = ControllerSettings(tau=2.0, eta=0.003, beta_start=0.9)
    swapped, kept = run([1.0] * 200 + [3.0] * 200, asked), run([1.0] * 400, asked)
    assert swapped[200].beta == kept[200].beta
    assert swapped[400].beta > kept[400].beta + 0.2


losses = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 100)


@settings(max_examples=100, deadline=None)
@given(st.lists(losses, max_size=60), st.sampled_from([0.0, 0.3, 1e6]), st.sampled_from([0.0, 0.3, 1e6]))
def test_update__any_values__beta_within_bounds(values, tau, eta):
    asked = ControllerSettings(beta_min=0.2, beta_max=0.7, beta_start=0.3, tau=tau, eta=eta)
    for state in run(values, asked):
        assert 0.2 <= state.beta <= 0.7
        assert 0.0 <= state.share_at_bound <= 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_update__value_not_finite__counted_and_ignored(bad):
    values = falling(20)
    clean = run(values)[-1]
    mixed = run([bad, *values[:5], bad, *values[5:], bad])[-1]
    assert (mixed.step, mixed.ignored) == (20, 3)
    assert (mixed.beta, mixed.ema) == (clean.beta, clean.ema)


@pytest.mark.parametrize("at", [0, 1, 57])
def test_state__through_json__goes_on_exactly(at):
    values = falling(90, seed=2)
    whole = run(values)
    restored = ControllerState.from_dict(json.loads(json.dumps(whole[at].to_dict())))
    assert restored == whole[at]
    for value in values[at:]:
        restored = update(restored, value)
    assert restored == whole[-1]


def test_state__of_another_shape__refused_by_key():
    saved = start(ASCENT).to_dict()
    with pytest.raises(ValueError, match=r"\['extra'\] missing or unknown"):
        ControllerState.from_dict({**saved, "extra": 1})
    del saved["ema"]
    with pytest.raises(ValueError, match=r"controller state: \['ema'\] missing or unknown; resume with the version"):
        ControllerState.from_dict(saved)


def test_state__updated__unchanged_itself():
    state = start(ASCENT)
    update(state, 1.0)
    assert state == start(ASCENT)
    with pytest.raises(AttributeError):
        state.beta = 0.7


def test_share_at_bound__some_steps_at_a_bound__their_share():
    low = run([0.95, 0.95, 0.0], ControllerSettings(tau=1.0, eta=5.0, ema_decay=0.0))
    assert [state.steps_at_bound for state in low] == [0, 0, 1, 2]
    assert low[-1].share_at_bound == pytest.approx(2 / 3)
    assert low[0].share_at_bound == 0.0


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta_start": 0.05}, r"beta_start \(0.05\) must lie in \[beta_min, beta_max\] = \[0.1, 1.0\]"),
        ({"beta_start": 1.5}, "beta_start"),
        ({"beta_min": -0.1}, "beta_min >= 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"tau": -1.0}, "tau must be a finite number that is not negative, got -1.0"),
        ({"tau": math.inf}, "tau must be"),
        ({"eta": math.nan}, "eta must be"),
        ({"tau": None, "beta_start": -0.5}, "beta_start must be"),
    ],
)
def test_settings__impossible__refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ControllerSettings(**{"tau": 1.0} | changed)


def test_settings__at_the_edge__accepted():
    ControllerSettings(beta_min=0.0, beta_start=0.0, ema_decay=0.0, tau=0.0, eta=0)
    ControllerSettings(beta_start=1.0, tau=1.0)
    ControllerSettings(beta_start=0.1, tau=1.0)


@pytest.mark.parametrize(
    ("total", "length"), [(100_000, 400), (8000, 400), (7999, 399.95), (1000, 50), (100, 5), (20, 1), (10, 0.5)]
)
def test_warm_up__defaults__400_steps_or_five_percent(total, length):
    factors = [warm_up(step, total) for step in range(500)]
    assert factors == pytest.approx([min(1.0, (step + 1) / length) for step in range(500)])
    assert 0 < factors[0] <= 1
    assert factors[-1] == 1


def test_warm_up__other_lengths__as_given_or_off():
    assert warm_up(0, 1000, steps=10, share=1.0) == pytest.approx(0.1)
    assert warm_up(4, 1000, steps=400, share=0.01) == pytest.approx(0.5)
    assert warm_up(0, 1000, steps=0) == 1.0
    assert warm_up(0, 1000, share=0.0) == 1.0
