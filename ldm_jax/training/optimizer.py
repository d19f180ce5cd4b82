"""Optimizers and schedules, all of them optax's; the names are those of the configs."""

import jax
import optax


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
    clipping = [optax.clip_by_global_norm(clip)] if clip is not None else []
    tx = optax.chain(*clipping, optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay))

    def labels(params):
        return {group: jax.tree.map(lambda _: group, part) for group, part in params.items()}

    def groups(params):
        return optax.multi_transform({group: tx for group in params}, labels)

    # multi_transform wants its groups named beforehand: they are known when the parameters are.
    return optax.GradientTransformation(
        init=lambda params: groups(params).init(params),
        update=lambda updates, state, params: groups(params).update(updates, state, params),
    )
