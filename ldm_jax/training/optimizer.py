"""Optimizers and schedules, all of them optax's; the names are those of the configs."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import optax
from optax import contrib

from ldm_jax import tree
from ldm_jax.types import Loss, Params

ENDS = r".*/conv_(in|out)/kernel"  # the first and the last layer of a network

QUINTIC = (3.4445, -4.7750, 2.0315)  # coefficients of Jordan's Newton-Schulz iteration


def schedule(lr: float, steps: int, warmup: int = 0, decay: str = "constant") -> optax.Schedule:
    """Linear warm-up to `lr` over `warmup` steps, then constant, cosine or linear decay to 0 at `steps`."""
    rest = max(steps - warmup, 1)
    after = {
        "constant": lambda: optax.constant_schedule(lr),
        "cosine": lambda: optax.cosine_decay_schedule(lr, rest),
        "linear": lambda: optax.linear_schedule(lr, 0.0, rest),
    }
    if decay not in after:
        raise ValueError(f"optimizer.decay {decay!r} is unknown; choose among {sorted(after)}")
    if not warmup:
        return after[decay]()
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup), after[decay]()], [warmup])


def adamw(
    steps: int,
    lr: float,
    warmup: int = 0,
    decay: str = "constant",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov & Hutter 2019) after clipping by the global norm.

    Every top-level group of the parameters ("gen", "disc") is clipped by its own norm. The defaults are torch's, which
    CompVis uses for stage 2; its stage 1 is Adam with b1=0.5, b2=0.9 and no weight decay.
    """
    rate = schedule(lr, steps, warmup, decay)
    return by_group(optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay), clip)


def lion(
    steps: int,
    lr: float,
    warmup: int = 0,
    decay: str = "constant",
    b1: float = 0.9,
    b2: float = 0.99,
    weight_decay: float = 0.1,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Lion (Chen et al. 2023, Algorithm 2): the sign of an average of gradients; it remembers one array a parameter.

    Its steps are longer than Adam's: the paper takes a rate 3 to 10 times lower and as much more weight decay.
    """
    rate = schedule(lr, steps, warmup, decay)
    return by_group(optax.lion(rate, b1, b2, weight_decay=weight_decay), clip)


def adafactor(
    steps: int,
    lr: float,
    warmup: int = 0,
    decay: str = "constant",
    b2_decay: float = 0.8,
    momentum: float | None = None,
    min_size: int = 128,
    relative: bool = True,
    clip: float | None = None,
) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern 2018, Algorithm 4): second moments by rows and columns of large arrays.

    Large is what has `min_size` along two axes. The second moment's decay after t steps is 1 - t^-b2_decay; an update's
    root mean square is at most 1. With `relative` the rate counts in units of each parameter's own root mean square:
    1e-2 is a common one.
    """
    tx = optax.adafactor(
        schedule(lr, steps, warmup, decay),
        min_dim_size_to_factor=min_size,
        decay_rate=b2_decay,
        multiply_by_parameter_scale=relative,
        momentum=momentum,
    )
    return by_group(tx, clip)


def muon(
    steps: int,
    lr: float,
    adam_lr: float,
    warmup: int = 0,
    decay: str = "constant",
    beta: float = 0.95,
    ns_steps: int = 5,
    b1: float = 0.9,
    b2: float = 0.999,
    weight_decay: float = 0.01,
    clip: float | None = None,
    adam: str = ENDS,
) -> optax.GradientTransformation:
    """Muon (Jordan et al. 2024): momentum made orthogonal by `ns_steps` Newton-Schulz iterations, for kernels.

    A convolution's kernel is the matrix from all inputs of an output to that output. What is no kernel (embeddings,
    norms, biases), and kernels whose names match the regex `adam`, take AdamW's steps, with Nesterov's momentum, at
    the rate `adam_lr`; both rates follow one schedule. A step costs more than AdamW's, and fewer are needed.
    """

    def matrices(params):
        def of(name, leaf):
            if leaf.ndim < 2 or not name.endswith("kernel") or re.fullmatch(adam, name):
                return None
            inputs = tuple(range(leaf.ndim - 1))
            return contrib.MuonDimensionNumbers(inputs, (leaf.ndim - 1,))

        return tree.map_named(of, params)

    tx = contrib.muon(
        schedule(lr, steps, warmup, decay),
        # One row a step makes optax loop instead of unroll: it compiles sooner and runs faster.
        ns_coeffs=(QUINTIC,) * ns_steps,
        ns_steps=ns_steps,
        beta=beta,
        weight_decay=weight_decay,
        adam_b1=b1,
        adam_b2=b2,
        adam_weight_decay=weight_decay,
        adam_learning_rate=schedule(adam_lr, steps, warmup, decay),
        muon_weight_dimension_numbers=matrices,
    )
    return by_group(tx, clip)


def by_group(tx: optax.GradientTransformation, clip: float | None) -> optax.GradientTransformation:
    """`tx` for every top-level group of the parameters by itself, each clipped by its own norm."""
    clipping = [optax.clip_by_global_norm(clip)] if clip is not None else []
    chained = optax.chain(*clipping, tx)

    def labels(params):
        return {group: jax.tree.map(lambda _: group, part) for group, part in params.items()}

    def groups(params):
        return optax.multi_transform({group: chained for group in params}, labels)

    # multi_transform wants its groups named beforehand: they are known when the parameters are.
    return optax.GradientTransformation(
        init=lambda params: groups(params).init(params),
        update=lambda updates, state, params: groups(params).update(updates, state, params),
    )


def is_frozen(patterns: Sequence[str], params: Params) -> Any:
    """For every parameter whether one of the regexes matches its name.

    Raises:
      ValueError: a regex that matches none, or no parameter that is left.
    """
    found = tree.map_by_rule([*((pattern, True) for pattern in patterns), (".*", False)], params)
    if all(jax.tree.leaves(found)):
        raise ValueError(f"optimizer.frozen = {tuple(patterns)} leaves nothing to train")
    return found


def frozen(
    tx: optax.GradientTransformation, patterns: Sequence[str]
) -> optax.GradientTransformation:
    """`tx` for the parameters that no regex matches; the others stay as they are, and nothing is remembered of them."""

    def labels(params):
        found = is_frozen(patterns, params)
        return jax.tree.map(lambda still: "still" if still else "trained", found)

    return optax.multi_transform({"trained": tx, "still": optax.set_to_zero()}, labels)


def without_gradient(loss: Loss, patterns: Sequence[str]) -> Loss:
    """The loss as a function of what `frozen` trains: no gradient of the rest is computed."""

    def of_trained(params, *rest):
        still = is_frozen(patterns, params)
        stopped = jax.tree.map(
            lambda fixed, leaf: jax.lax.stop_gradient(leaf) if fixed else leaf, still, params
        )
        return loss(stopped, *rest)

    return of_trained
