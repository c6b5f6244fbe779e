"""The controller: the paper's update, the automatic constraint against an oracle of the whole history, its edges."""

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace_plugin.controller import (
    ControllerSettings,
    ControllerState,
    is_pinned,
    share_at_bound,
    start,
    update,
    warm_up,
)
from tests.reference import controller as oracle


def run(values, asked=None, total=None, fractions=None):
    """All states, the first one before any step."""
    states = [start(asked or ControllerSettings(), total or len(values))]
    for i, value in enumerate(values):
        states.append(update(states[-1], value, *([] if fractions is None else [fractions[i]])))
    return states


def falling(steps, seed=0, power=0.5, noise=0.2, level=3.0):
    rng = np.random.default_rng(seed)
    return (level * (1 + np.arange(steps)) ** -power * np.exp(noise * rng.standard_normal(steps))).tolist()


def cosine(steps):
    warm = np.minimum(1, (np.arange(steps) + 1) / (0.05 * steps))
    return (warm * 0.5 * (1 + np.cos(np.pi * np.arange(steps) / steps))).tolist()


def linear_warm_up(steps, warm):
    """A linear warm-up as transformers makes it: the first step has rate 0."""
    return [min(1.0, step / warm) for step in range(steps)]


BY_HAND = ControllerSettings(tau=0.5, eta=0.02)


def test_defaults_are_the_method_s():
    d = ControllerSettings()
    assert (d.beta_min, d.beta_max, d.beta_start, d.ema_decay, d.tau, d.eta) == (0.1, 1.0, 0.5, 0.99, "auto", "auto")


def test_numbers_given_by_hand_are_the_paper_s_update_from_the_first_step():
    states = run([2.0, 1.0, 0.3, 0.2], BY_HAND)
    ema, beta = 2.0, 0.5
    for state, value in zip(states[1:], [2.0, 1.0, 0.3, 0.2], strict=True):
        ema = 0.99 * ema + 0.01 * value
        beta = beta + 0.02 * (ema - 0.5)
        assert state.ema == pytest.approx(ema, rel=1e-14)
        assert state.beta == pytest.approx(beta, rel=1e-14)
        assert (state.tau, state.eta) == (0.5, 0.02)
    assert states[-1].step == states[-1].counted == states[-1].controlled == 4
    assert states[1].ema == 2.0


def test_a_slack_constraint_lowers_beta_to_its_bound_and_a_hopeless_one_raises_it():
    slack = run([0.1] * 100, ControllerSettings(tau=1.0, eta=0.1))
    assert slack[-1].beta == 0.1
    hopeless = run([2.0] * 100, ControllerSettings(tau=1.0, eta=0.1))
    assert hopeless[-1].beta == 1.0
    assert slack[1].beta == pytest.approx(0.5 - 0.09)
    assert hopeless[1].beta == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("total", "schedule"),
    [(100, "flat"), (100, "cosine"), (640, "flat"), (640, "cosine"), (12, "flat"), (100, "from 0"), (640, "from 0")],
)
def test_the_automatic_controller_equals_the_oracle_of_the_whole_history(total, schedule):
    values = falling(total, seed=total)
    fractions = {"cosine": cosine(total), "flat": [1.0] * total, "from 0": linear_warm_up(total, 5)}[schedule]
    states = run(values, fractions=fractions)
    want = oracle.automatic(values, fractions, total)
    assert len(states) == len(want) + 1
    for state, (beta, tau, eta) in zip(states[1:], want, strict=True):
        assert state.beta == pytest.approx(beta, rel=1e-9)
        assert state.tau == (None if tau is None else pytest.approx(tau, rel=1e-9))
        assert state.eta == (None if eta is None else pytest.approx(eta, rel=1e-9))


def test_the_oracle_s_other_settings():
    values, total = falling(200, seed=1), 200
    asked = ControllerSettings(beta_min=0.0, beta_max=2.0, beta_start=0.4, ema_decay=0.9, elasticity=0.5)
    want = oracle.automatic(values, [1.0] * total, total, 0.0, 2.0, 0.4, 0.9, 0.5)
    assert [s.beta for s in run(values, asked)[1:]] == pytest.approx([row[0] for row in want], rel=1e-9)


def test_a_run_that_rises_does_not_lift_the_target():
    values = [1.0] * 50 + np.linspace(1, 4, 150).tolist()
    states = run(values)
    found = [state.target for state in states if state.reference is not None]
    assert all(later <= earlier for earlier, later in itertools.pairwise(found))
    assert states[-1].slope == 0.0
    assert states[-1].beta == 1.0
    assert [s.beta for s in states[1:]] == pytest.approx([r[0] for r in oracle.automatic(values, [1.0] * 200, 200)])


def test_a_steep_fall_is_not_extrapolated_without_limit():
    states = run(falling(200, power=4.0, noise=0.0))
    assert max(state.slope for state in states) == 2.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-3, 3))
def test_the_unit_of_the_loss_does_not_matter(seed, exponent):
    values = falling(60, seed=seed)
    scaled = [value * 10**exponent for value in values]
    a, b = run(values)[-1], run(scaled)[-1]
    assert a.beta == pytest.approx(b.beta, rel=1e-6)
    assert b.tau == pytest.approx(a.tau * 10**exponent, rel=1e-6)
    assert b.eta == pytest.approx(a.eta / 10**exponent, rel=1e-6)


losses = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 100)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(losses, max_size=60), st.integers(1, 100), st.sampled_from(["auto", 0.0, 0.3, 1e6]),
    st.sampled_from(["auto", 0.0, 0.3, 1e6]), st.lists(st.floats(0, 1), min_size=60, max_size=60),
)  # fmt: skip
def test_beta_is_always_in_its_bounds(values, total, tau, eta, fractions):
    asked = ControllerSettings(beta_min=0.2, beta_max=0.7, beta_start=0.3, tau=tau, eta=eta)
    for state in run(values, asked, total, fractions):
        assert 0.2 <= state.beta <= 0.7
        assert 0.0 <= share_at_bound(state) <= 1.0
        json.dumps(state.to_dict(), allow_nan=True)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_ignored_and_counted(bad):
    values = falling(80)
    clean = run(values, total=80)[-1]
    state = start(ControllerSettings(), 80)
    for i, value in enumerate(values):
        if i in (0, 2, 40):
            before = state
            state = update(state, bad)
            assert state.beta == before.beta
            assert state.ema == before.ema
            assert state.step == before.step + 1
        state = update(state, value)
    assert (state.step, state.ignored, state.counted) == (83, 3, 80)
    assert state.beta == clean.beta
    assert state.travelled == clean.travelled


@pytest.mark.parametrize(
    ("total", "steps"), [(1, 5), (60, 5), (100, 5), (119, 5), (120, 6), (400, 20), (2000, 100), (20_000, 100)]
)
def test_the_probe_is_five_percent_of_the_run_within_bounds(total, steps):
    assert ControllerSettings().probe_steps(total) == steps
    assert ControllerSettings(tau=0.3).probe_steps(total) == steps
    assert ControllerSettings(eta=0.3).probe_steps(total) == steps
    assert ControllerSettings(tau=0.3, eta=0.3).probe_steps(total) == 0


def test_beta_rests_during_the_probe_and_the_probe_s_mean_is_kept():
    states = run([4.0, 2.0, 3.0, 5.0, 1.0, 2.0, 2.0], total=50)
    assert [s.beta for s in states[:6]] == [0.5] * 6
    assert [s.probe_mean for s in states[:5]] == [None] * 5
    assert states[5].probe_mean == 3.0
    assert states[5].reference == states[5].ema
    assert [s.controlled for s in states] == [0, 0, 0, 0, 0, 0, 1, 2]
    assert [s.tau for s in states[:6]] == [None] * 6
    assert states[6].beta != 0.5


def test_eta_alone_by_hand_and_tau_alone_by_hand():
    values = falling(60)
    auto = run(values)
    by_hand = run(values, ControllerSettings(eta=0.01))
    assert by_hand[6].eta == 0.01
    assert by_hand[6].tau == auto[6].tau
    assert by_hand[6].beta == pytest.approx(0.5 + 0.01 * (by_hand[6].ema - by_hand[6].tau), rel=1e-12)
    mean = float(np.mean(values[:5]))
    followed = 1 - 0.99 ** (60 / 10)
    for tau, level in ((0.5 * mean, mean), (2 * mean, 2 * mean)):
        state = run(values, ControllerSettings(tau=tau))[6]
        assert state.tau == tau
        assert state.eta == pytest.approx(0.9 / (6 * 0.1 * level * followed), rel=1e-12)
        last = run(values, ControllerSettings(tau=tau))[-1]
        assert (last.anchor, last.target, last.slope) == (last.probe_mean, last.probe_mean, 0.0)  # nothing is followed


def test_a_loss_of_zero_is_no_division_by_zero():
    for asked in (ControllerSettings(), ControllerSettings(tau=0.0)):
        states = run([0.0] * 60, asked)
        assert all(0.1 <= state.beta <= 1.0 for state in states)
        assert math.isfinite(states[-1].eta)


def test_a_learning_rate_of_zero_is_no_logarithm_of_zero():
    states = run(falling(60), fractions=[0.0] * 60)
    assert {state.beta for state in states} == {0.5}
    assert (states[-1].travelled, states[-1].counted, states[-1].step) == (0, 0, 60)
    assert states[-1].ema != states[1].ema


def test_a_first_step_at_rate_zero_places_nothing():
    """The anchor and the slopes are those of the run without that step."""
    values, total = falling(100, seed=4), 100
    states = run([4.0, *values], total=total, fractions=[0.0, *linear_warm_up(101, 5)[1:]])
    without = run(values, total=total, fractions=linear_warm_up(101, 5)[1:])
    assert states[6].anchor_place == pytest.approx(np.mean(np.log([0.2, 0.6, 1.2, 2.0, 3.0])), rel=1e-12)
    for key in ("anchor", "anchor_place", "slope", "probe_mean", "target", "counted", "segment"):
        assert [getattr(s, key) for s in states[1:]] == [getattr(s, key) for s in without], key
    assert max(state.slope for state in states) > 0


def test_numbers_by_hand_are_used_from_the_first_step_also_at_rate_zero():
    states = run([2.0, 2.0], BY_HAND, fractions=[0.0, 1.0])
    assert [state.counted for state in states] == [0, 1, 2]
    assert states[1].beta == pytest.approx(0.5 + 0.02 * (2.0 - 0.5), rel=1e-14)


def test_bounds_that_coincide_hold_beta():
    asked = ControllerSettings(beta_min=0.4, beta_max=0.4, beta_start=0.4)
    states = run(falling(60), asked)
    assert {state.beta for state in states} == {0.4}
    assert states[-1].tau == states[-1].reference


@pytest.mark.parametrize("at", [0, 3, 5, 6, 57])
def test_a_saved_state_goes_on_exactly(at):
    values, fractions = falling(90, seed=2), cosine(90)
    whole = run(values, fractions=fractions)
    restored = ControllerState.from_dict(json.loads(json.dumps(whole[at].to_dict())))
    assert restored == whole[at]
    for i in range(at, 90):
        restored = update(restored, values[i], fractions[i])
    assert restored == whole[-1]


def test_a_state_of_another_shape_is_refused():
    saved = start(ControllerSettings(), 10).to_dict()
    with pytest.raises(ValueError, match=r"\['extra'\] missing or unknown"):
        ControllerState.from_dict({**saved, "extra": 1})
    del saved["ema"]
    with pytest.raises(ValueError, match=r"controller state: \['ema'\] missing or unknown; resume with the version"):
        ControllerState.from_dict(saved)


def test_a_step_without_a_schedule_travels_one():
    assert [state.travelled for state in run([1.0, 1.0, 1.0])] == [0.0, 1.0, 2.0, 3.0]


def test_states_are_never_changed():
    state = start(ControllerSettings(), 10)
    update(state, 1.0)
    assert state == start(ControllerSettings(), 10)
    with pytest.raises(AttributeError):
        state.beta = 0.7


def test_the_share_at_a_bound_counts_controlled_steps():
    asked = ControllerSettings(tau=1.0, eta=1.0)
    states = run([3.0, 3.0, 3.0], asked, total=3)
    assert [share_at_bound(state) for state in states] == [0.0, 1.0, 1.0, 1.0]
    low = run([0.95, 0.95, 0.0], ControllerSettings(tau=1.0, eta=5.0, ema_decay=0.0), total=30)
    assert [state.steps_at_bound for state in low] == [0, 0, 1, 2]
    assert share_at_bound(low[-1]) == pytest.approx(2 / 3)


def test_a_pinned_controller_is_a_warning_after_a_tenth_of_the_run():
    asked = ControllerSettings(tau=1.0, eta=1.0)
    states = run([3.0] * 20, asked, total=100)
    assert [is_pinned(state) for state in states] == [False] * 10 + [True] * 11
    quarter = run([3.0, 0.9, 1.0, 1.0], ControllerSettings(tau=1.0, eta=1.0, ema_decay=0.0), total=4)
    assert [round(share_at_bound(state), 2) for state in quarter] == [0.0, 1.0, 0.5, 0.33, 0.25]
    assert [is_pinned(state) for state in quarter] == [False, True, True, True, False]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"beta_start": 0.05}, r"beta_start \(0.05\) must lie in \[beta_min, beta_max\] = \[0.1, 1.0\]"),
        ({"beta_start": 1.5}, "beta_start"),
        ({"beta_min": -0.1}, "beta_min >= 0"),
        ({"ema_decay": 1.0}, r"ema_decay must lie in \[0, 1\), got 1.0"),
        ({"ema_decay": -0.1}, "ema_decay"),
        ({"tau": -1.0}, "tau must be 'auto' or a finite number that is not negative, got -1.0"),
        ({"tau": math.inf}, "tau must be"),
        ({"eta": math.nan}, "eta must be"),
        ({"eta": "fast"}, "eta must be 'auto' or a finite number that is not negative, got 'fast'"),
    ],
)
def test_impossible_settings_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        ControllerSettings(**changed)


def test_settings_at_the_edge_are_taken():
    ControllerSettings(beta_min=0.0, beta_start=0.0, ema_decay=0.0, tau=0.0, eta=0)
    ControllerSettings(beta_start=1.0)
    ControllerSettings(beta_start=0.1)


def test_a_run_without_steps_is_refused():
    with pytest.raises(ValueError, match="total_steps must be at least 1, got 0"):
        start(ControllerSettings(), 0)
    assert start(ControllerSettings(), 1).beta == 0.5


@pytest.mark.parametrize(
    ("total", "length"), [(100_000, 400), (8000, 400), (7999, 399.95), (1000, 50), (100, 5), (20, 1), (10, 0.5)]
)
def test_the_warm_up_is_400_steps_or_five_percent(total, length):
    factors = [warm_up(step, total) for step in range(500)]
    assert factors == pytest.approx([min(1.0, (step + 1) / length) for step in range(500)])
    assert 0 < factors[0] <= 1
    assert factors[-1] == 1


def test_the_warm_up_is_as_asked_and_can_be_off():
    assert warm_up(0, 1000, steps=10, share=1.0) == pytest.approx(0.1)
    assert warm_up(4, 1000, steps=400, share=0.01) == pytest.approx(0.5)
    assert warm_up(0, 1000, steps=0) == 1.0
    assert warm_up(0, 1000, share=0.0) == 1.0


@pytest.mark.parametrize("fall", [3.0, 20.0])
@pytest.mark.parametrize("total", [100, 1000])
def test_a_student_that_reacts_is_controlled_and_a_fixed_tau_is_not(fall, total):
    """The claim of ``auto`` on one simulated student: power-law fall, faster with more beta, noisy."""

    def student(asked):
        rng = np.random.default_rng(0)
        state, level = start(asked, total), 2.0
        betas = []
        for _ in range(total):
            state = update(state, level * math.exp(0.2 * rng.standard_normal()))
            betas.append(state.beta)
            progress = (2.0 / level) ** 2 + (fall**2 - 1) / total * (state.beta / 0.5) ** 0.5
            level = 2.0 / progress**0.5
        return share_at_bound(state), max(betas) - min(betas)

    share, swing = student(ControllerSettings())
    fixed, _ = student(ControllerSettings(tau=2.0 * 0.5))
    assert share < 0.1
    assert swing > 0.05
    assert fixed > 0.5
