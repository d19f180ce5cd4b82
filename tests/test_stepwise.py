"""Sampling step by step, as `sample.py` does to show progress: the same samples, one compiled step."""

import dataclasses
import functools

import numpy as np
import pytest

from ldm_jax import build, tasks
from tests import tiny
from tests.test_pipeline_sampling import BLUE, RED, model
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


@functools.cache
def sampling(**override):
    return build.sampling(tiny.shared_model("text"), model(), **override)


def pictures(n=2):
    return list(np.random.default_rng(0).uniform(-1, 1, (n, 16, 16, 3)).astype(np.float32))


def both_ways(how, task="text", size=64, **given):
    """Drawn in one scan and step by step, and what was told of the steps."""
    batch, seeds, made, _ = build.ask(model(), how, task, **given)
    told = []
    once = list(model().drawer(how, size)(batch, seeds, task=made))
    steps = model().drawer(how, size, lambda *at: told.append(at))(batch, seeds, task=made)
    return once, list(steps), told


MASK = np.pad(np.ones((6, 6), np.float32), 5)
TASKS = {
    "text": {},
    "inpaint": dict(images=pictures(), masks=[MASK], repaint=(2, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_step_by_step_is_what_one_scan_is(task):
    """With a solver that remembers steps and one that adds noise, one of them with a film."""
    remembers = task == "text"
    how = sampling(solver="dpmpp_2m" if remembers else "ddpm", film=remembers)
    once, steps, told = both_ways(how, task, prompts=[RED, BLUE], **TASKS[task])
    for a, b in zip(once, steps, strict=True):
        for name, of_scan, of_steps in zip(a._fields, a, b, strict=True):
            assert (of_scan is None) == (of_steps is None), name
            if of_scan is not None:
                np.testing.assert_allclose(of_steps, of_scan, atol=5e-6, err_msg=name)
    assert [done for done, _ in told] == list(range(1, told[0][1] + 1))
    assert told[-1][0] == told[-1][1] >= 4


@pytest.mark.slow
def test_neither_seeds_nor_prompts_nor_grids_compile_a_step_anew():
    how = sampling(guidance=3.0)
    programs = tasks.make_stepwise(model().model, model().shape, how)
    _, first, told = both_ways(how, prompts=[RED] * 10, size=8)
    assert told[-1] == (8, 8)  # four steps in each of two chunks
    compiled = [f._cache_size() for f in programs]
    # On several devices the first step finds what `start` left: a second program, however many steps follow.
    assert compiled[0] == 1
    assert max(compiled) <= 2
    karras = sampling(guidance=3.0, spacing="karras")
    other = dataclasses.replace(karras, solver=how.solver, guidance=5.0)
    _, again, _ = both_ways(other, prompts=[BLUE] * 8, seed=3)
    assert tasks.make_stepwise(model().model, model().shape, other) is programs
    assert [f._cache_size() for f in programs] == compiled
    assert np.abs(again[0].x - first[0].x).max() > 1e-4
