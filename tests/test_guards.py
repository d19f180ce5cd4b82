"""What keeps a run from going astray: roll-backs, spikes, hanging steps, early stopping."""

import contextlib
import json
import textwrap
import time

import numpy as np
import pytest

from ldm_jax.training import checkpoints, guards, loop, manifest
from tests import tiny
from tests.test_loop import linear_run, on_devices, restored
from tests.tiny import assert_equal, losses, metrics, quick_compiles  # noqa: F401 (a fixture)


def a_run(*spoil, **changes):
    return linear_run(*spoil, **(on_devices(1) | changes))


def told(workdir, name):
    return [(m["step"], m[name]) for m in metrics(workdir) if name in m]


def nan_from(first, last=10**9):
    return lambda at, x: np.full_like(x, np.nan) if first <= at <= last else x


# --- roll-backs


def test_after_too_many_bad_steps_a_run_rolls_back_and_sees_other_data(tmp_path, capsys):
    seen = []

    def spoil(at, x):
        seen.append(at)
        return nan_from(5, 7)(at, x)  # steps 6, 7 and 8 are skipped

    run = a_run(spoil, steps=12, eval_every=100, guards=guards.Guards(rollbacks=1))
    assert loop.train(run, tmp_path) == 12
    assert told(tmp_path, guards.ROLLED_BACK) == [(8, 4)]
    assert (
        "3 steps in a row were not finite (allowed: 3); rolled back to step 4"
        in capsys.readouterr().err
    )
    assert seen == sorted(set(seen))  # nothing is replayed
    # It is the run that had the arrays of step 4 when step 9 began.
    other = tmp_path / "other"
    loop.train(a_run(steps=4, eval_every=100), other)
    state = guards.moved_on(restored(a_run(), other), 8)
    with contextlib.closing(checkpoints.Checkpoints(other)) as saved:
        saved.save(state)
    loop.train(a_run(steps=12, eval_every=100), other)
    assert_equal(restored(run, tmp_path), restored(run, other))


def test_without_a_checkpoint_a_run_rolls_back_to_its_beginning(tmp_path):
    run = a_run(nan_from(0, 2), save_every=100, guards=guards.Guards(rollbacks=1))
    assert loop.train(run, tmp_path) == 8
    assert told(tmp_path, guards.ROLLED_BACK) == [(3, 0)]


@pytest.mark.slow
def test_rolling_back_ends(tmp_path):
    run = a_run(nan_from(5), steps=30, save_every=4, guards=guards.Guards(rollbacks=2))
    with pytest.raises(loop.TrainingStopped, match=r"3 steps in a row .*first bad leaf is 'x'"):
        loop.train(run, tmp_path)
    # Checkpoints are saved in between, and do not make it forget.
    assert told(tmp_path, guards.ROLLED_BACK) == [(8, 4), (11, 8)]
    with pytest.raises(loop.TrainingStopped, match="4 steps in a row"):  # the same command again
        loop.train(run, tmp_path)
    assert told(tmp_path, guards.ROLLED_BACK) == [(8, 4), (11, 8)]


@pytest.mark.slow
def test_a_resumed_run_rolls_back_alike(tmp_path):
    settings = dict(steps=12, eval_every=100, guards=guards.Guards(rollbacks=1))

    def stopped(at, x):
        if at == 10:
            raise KeyboardInterrupt  # nothing is saved
        return nan_from(5, 7)(at, x)

    for name in ("whole", "parts"):
        if name == "parts":
            with pytest.raises(KeyboardInterrupt):
                loop.train(a_run(stopped, **settings), tmp_path / name)
        loop.train(a_run(nan_from(5, 7), **settings), tmp_path / name)
    whole, parts = (restored(a_run(), tmp_path / name) for name in ("whole", "parts"))
    assert_equal(whole, parts)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")


# --- spikes


def test_a_loss_is_compared_with_the_median_of_the_last_ones():
    before = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 50.0]  # one spike does not hide the next
    deviation = guards.NORMAL * 0.05
    assert not guards.spiked(before, 1.0 + 6.0 * deviation - 1e-6, 6.0)
    assert guards.spiked(before, 1.0 + 6.0 * deviation + 1e-6, 6.0)
    assert not guards.spiked(before[:4], 100.0, 6.0)  # too few
    assert not guards.spiked(before, 100.0, 0.0)  # off
    assert not guards.spiked(before, float("nan"), 6.0)
    normal = np.random.default_rng(0).normal(2.0, 0.3, 10**5)
    middle = np.median(normal)
    np.testing.assert_allclose(guards.NORMAL * np.median(np.abs(normal - middle)), 0.3, rtol=0.01)


def large_at(step, factor=1e3):
    return lambda at, x: x * factor if at == step else x


def test_a_spike_rolls_back_or_stops_without_saving(tmp_path):
    settings = dict(steps=16, eval_every=100)
    run = a_run(large_at(10), guards=guards.Guards(spike=50.0, rollbacks=1), **settings)
    assert loop.train(run, tmp_path / "back") == 16
    assert told(tmp_path / "back", guards.ROLLED_BACK) == [(11, 8)]
    run = a_run(large_at(10), guards=guards.Guards(spike=50.0), **settings)
    with pytest.raises(
        guards.Diverged, match=r"the loss jumped from .* to .*; its state is not saved"
    ):
        loop.train(run, tmp_path / "stop")
    assert manifest.steps(tmp_path / "stop" / "checkpoints") == [4, 8]
    # A resumed run knows the losses of before, and stops at the same step.
    with pytest.raises(guards.Diverged, match="step 11: the loss jumped"):
        loop.train(run, tmp_path / "stop")


# --- early stopping and the best checkpoints


@pytest.mark.parametrize(
    ("values", "lowest", "expected"),
    [
        ([3.0, 2.0, 1.0], True, False),
        ([1.0, 2.0, 3.0], True, True),
        ([1.0, 2.0, 3.0], False, False),
        ([2.0, 1.0, 1.5, 1.0], True, True),  # as good is not better
        ([2.0, 1.0, 1.5, 0.9], True, False),
        ([1.0, 2.0], True, False),  # not yet
    ],
)
def test_a_metric_is_stale_when_the_last_values_are_no_better(values, lowest, expected):
    assert guards.stale(values, 2, lowest) == expected
    assert not guards.stale(values, 0, lowest)


def evaluated(values):
    """An evaluation that finds these values, one after the other, by the step in the average's place."""
    left = iter(values)
    return lambda params, frozen: loop.Evaluation({"validation/a": next(left)}, {})


def test_a_run_stops_early_and_stays_stopped(tmp_path, capsys):
    watched = guards.Guards(patience=2, metric="validation/a")
    settings = dict(steps=20, eval_every=2, save_every=2, guards=watched)
    keep = checkpoints.Keep(latest=1, best=1)
    values = [5.0, 3.0, 4.0, 3.5, 1.0]
    run = a_run(evaluate=evaluated(values), keep=keep, **settings)
    assert loop.train(run, tmp_path) == 8
    words = "stopped early at step 8: 2 evaluations in a row were no better than validation/a = 3 at step 4"
    assert words in capsys.readouterr().err
    assert manifest.steps(tmp_path / "checkpoints") == [4, 8]  # the best and the last
    assert loop.train(run, tmp_path) == 8
    assert "resumed at step 8 of 20; nothing is left to do" in capsys.readouterr().err


def test_the_best_are_known_after_a_resume(tmp_path):
    watched = guards.Guards(metric="validation/a")
    settings = dict(eval_every=2, save_every=2, guards=watched, keep=checkpoints.Keep(1, best=1))
    for steps, values in ((4, [5.0, 1.0]), (8, [3.0, 2.0])):
        run = a_run(evaluate=evaluated(values), steps=steps, **settings)
        assert loop.train(run, tmp_path) == steps
    assert manifest.steps(tmp_path / "checkpoints") == [4, 8]


def test_a_metric_that_there_is_not_is_named(tmp_path):
    run = a_run(guards=guards.Guards(metric="validation/b", patience=1))
    with pytest.raises(loop.TrainingStopped, match=r"'validation/b' .* \['validation/w'\]"):
        loop.train(run, tmp_path)


def test_lines_that_were_cut_do_not_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3, "validation/a": 1.0}]
    lines += [{"step": 4, "loss": 0.1 + 0.2}, {"step": 9, "loss": 1.0}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5, "lo')
    assert guards.history(path, "loss", 5) == {1: 2.0, 4: 0.1 + 0.2}
    assert guards.history(tmp_path / "none", "loss", 5) == {}


# --- the watchdog

HANGING = """
import sys, time
from ldm_jax.training import guards, loop
from tests.test_loop import linear_run, on_devices

def spoil(at, x):
    if at == 6:
        print("hanging", flush=True)
        time.sleep(60)
    return x

def evaluate(params, frozen):
    time.sleep(2.5)  # longer than a step may take, and allowed
    return loop.Evaluation({}, {})

run = linear_run(spoil, evaluate=evaluate, guards=guards.Guards(hang=2.0), **on_devices(1))
loop.train(run, sys.argv[1])
"""


@pytest.mark.slow
def test_a_step_that_hangs_ends_the_run_with_all_stacks(tmp_path):
    began = time.perf_counter()
    done = tiny.spawn("-c", textwrap.dedent(HANGING), tmp_path)
    assert time.perf_counter() - began < 55
    assert done.stdout == "hanging\n", done.stderr
    assert done.returncode == 1
    assert "Timeout (0:00:02)!" in done.stderr
    assert done.stderr.count("(most recent call first)") > 1
    assert "in spoil" in done.stderr
    assert int(restored(a_run(), tmp_path).step) == 4
