"""UniPC (Zhao et al. 2023): a multistep predictor, and a corrector that asks the network nothing more.

The prediction m at a new level serves the next step anyway; before, the corrector repeats the step that led
there with a polynomial that goes through m as well (s = 1). In the terms of `multistep` the paper's
equations for its coefficients are those of exact integration, from which its B(h) cancels; it remains
where the paper simplifies: in the predictor of order 2 and the corrector of order 1, M_1 = B / 2.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from ldm_jax.diffusion.process import log_ratio, over
from ldm_jax.diffusion.samplers import Solver
from ldm_jax.diffusion.solvers import multistep as ms
from ldm_jax.types import Prediction


def unipc(
    order: int = 2,
    of: Literal["x0", "eps"] = "x0",
    variant: Literal["bh1", "bh2"] = "bh2",
    corrector: bool = True,
    steps: int | Array | None = None,
) -> Solver:
    """UniPC-p for p = `order` in 1, 2, 3, with one call a step: order p + 1, without the corrector p.

    Of x0 or of eps; B(h) = h ("bh1") or exp(h) - 1 ("bh2"). Where the number of steps of the grid
    is given, the order falls to 1 towards the end, as in diffusers with `lower_order_final`. No
    network is asked at the end of the last step, so that is not corrected.

    Raises:
      ValueError: an unknown order, prediction or variant.
    """
    for given, choices in ((order, (1, 2, 3)), (of, ("x0", "eps")), (variant, ("bh1", "bh2"))):
        if given not in choices:
            raise ValueError(f"UniPC has no {given!r}; the choices are {choices}")

    def integrals(q, h, used, s):
        """The weights, with the simplified moment where two levels are used."""
        moments = ms.exponential(q, h, of, len(s))
        if len(s) > 1:
            simple = (moments[0] if variant == "bh2" else ms.scale(q, h, of)) / 2
            moments[1] = jnp.where(sum(a.astype(int) for a in used) == 2, simple, moments[1])
        return ms.weights(s, used, moments)

    def correct(x, m, p, past, base):
        """The step to p again, knowing m there."""
        h, s, used = ms.nodes(past.at, log_ratio(p), ms.allowed(order, steps, past.taken))
        done = h > 0
        s.append(jnp.ones_like(h))
        used.append(done)
        w = integrals(p, h, used, s)
        return jnp.where(over(done, x), base + ms.change(w, (*past.m, m)), x)

    def step(denoise, x, p, q, memory, rng):
        past, base = memory
        prediction = denoise(x, p.t)
        x0, m = prediction.x0, getattr(prediction, of)
        if corrector:
            x = correct(x, m, p, past, base)
            # x has moved: the other prediction is what remains of it.
            if of == "x0":
                rest = (x - over(p.alpha, x) * m) / over(jnp.where(p.sigma > 0, p.sigma, 1.0), x)
                prediction = Prediction(m, rest)
            else:
                rest = (x - over(p.sigma, x) * m) / over(jnp.where(p.alpha > 0, p.alpha, 1.0), x)
                prediction = Prediction(jnp.where(over(p.alpha, x) > 0, rest, x0), m)
        past = ms.add(past, log_ratio(p), m)
        h, s, used = ms.nodes(past.at, log_ratio(q), ms.allowed(order, steps, past.taken))
        base = ms.first(x, prediction, p, q)
        return base + ms.change(integrals(q, h, used, s), past.m), (past, base), x0

    return Solver(lambda x: (ms.nothing(order)(x), jnp.zeros_like(x)), step)
