"""The parts of sampling as compiled functions: the condition, the loop, the decoder, and all of them as one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax.diffusion import guidance, process, samplers, solvers
from ldm_jax.measure.models import Subject
from ldm_jax.pretrained import sampling

Program = tuple[Any, tuple[Any, ...]]  # a jitted function and its arguments


def check(subject: Subject, solver: str, steps: int) -> None:
    """Raises: ValueError: no such solver, or steps that the grid lacks."""
    solvers.make(solver, subject.model.path)
    jax.eval_shape(lambda: subject.points(steps))


def programs(
    subject: Subject, solver: str, steps: int, scale: float, batch: int, side: int
) -> dict[str, Program]:
    """{"text": ..., "loop": ..., "decode": ..., "together": ...}; without guidance at scale 1.

    "text" gives the condition and the null condition, "loop" latents, "decode" images of them. Raises as `check`.
    """
    model, points = subject.model, subject.points(steps)
    step = solvers.make(solver, model.path)
    given = subject.batch(batch, side)

    def text(params, given):
        return model.condition(params, given), model.null(params, given)

    def loop(params, conds, start, keys, points, scale_):
        cond, null = conds
        denoise = process.make_denoiser(model.raw(params), model.path, model.target)
        if scale != 1:
            denoise = guidance.cfg(denoise, null, scale_)
        return samplers.sample(denoise, step, points, start, keys, cond)[0]

    def together(params, arrays, given, start, keys, points, scale_):
        z = loop(params, text(params, given), start, keys, points, scale_)
        return model.codec.decode(arrays, z)

    conds = jax.eval_shape(text, subject.params, given)
    conds = jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), conds)
    shape = (batch, side, side, subject.channels)
    start = jnp.asarray(np.random.default_rng(1).standard_normal(shape, np.float32))
    more = (start, sampling.keys(0, batch), points, jnp.float32(scale))
    found = {
        "text": (text, (subject.params, given)),
        "loop": (loop, (subject.params, conds, *more)),
        "decode": (model.codec.decode, (subject.arrays, start)),
        "together": (together, (subject.params, subject.arrays, given, *more)),
    }
    # A wrapper, since jit would remember a decoder that was traced with other kernels.
    return {name: (jax.jit(_fresh(f)), args) for name, (f, args) in found.items()}


def _fresh(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *args: f(*args)
