"""The one train step, for every loss: gradients, update, moving average, and a guard against bad steps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ldm_jax.training import averages, norms
from ldm_jax.types import Batch, Loss, Params, TrainState


def init_state(
    params: Params, tx: optax.GradientTransformation, ema: averages.Averages = 0.9999
) -> TrainState:
    """A state at step 0; moving averages start at the parameters."""
    zero, held = jnp.zeros((), jnp.int32), averages.start(ema, params)
    return TrainState(step=zero, params=params, ema=held, opt_state=tx.init(params), skipped=zero)


def make_train_step(
    loss: Loss,
    tx: optax.GradientTransformation,
    ema: averages.Averages = 0.9999,
    accumulate: int = 1,
    groups: norms.Rules | bool = False,
) -> Callable[[TrainState, Params, Batch, Array], tuple[TrainState, dict[str, Any]]]:
    """`(state, frozen, batch, rng) -> (state, metrics)`, pure.

    With `accumulate` > 1 the batch is split into that many micro-batches, whose gradients a scan averages. If the loss,
    the gradient or the update is not finite, parameters, optimizer and EMA stay bit-identical and `state.skipped`
    counts on; the step advances, so that the next one sees other data and noise. `groups` asks for the norms of the
    gradient by group (`norms.grouped`).

    What a loss tells under a name with an underscore, "_chosen", is no metric: it is an argument of the optimizer's
    update, `chosen`, with the micro-batches along a first axis.
    """

    once = jax.value_and_grad(loss, has_aux=True)
    tx = optax.with_extra_args_support(tx)

    def told(metrics):
        """The metrics, and what is for the optimizer."""
        private = {k[1:]: v for k, v in metrics.items() if k.startswith("_")}
        return {k: v for k, v in metrics.items() if not k.startswith("_")}, private

    def gradients(params, frozen, batch, rng, step):
        def of(batch, rng):
            (value, metrics), grads = once(params, frozen, batch, rng, step)
            metrics, private = told(metrics)
            return (value, metrics, grads), private

        if accumulate == 1:
            found, private = of(batch, rng)
            return found, jax.tree.map(lambda a: a[None], private)
        # Every k-th row, not every k-th block: each device keeps the rows that it has.
        micros = jax.tree.map(
            lambda a: a.reshape(-1, accumulate, *a.shape[1:]).swapaxes(0, 1), batch
        )

        def add(total, inputs):
            found, private = of(*inputs)
            return jax.tree.map(jnp.add, total, found), private

        first = jax.tree.map(lambda a: a[0], micros)
        shapes, _ = jax.eval_shape(of, first, rng)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        total, private = jax.lax.scan(add, zeros, (micros, jax.random.split(rng, accumulate)))
        return jax.tree.map(lambda a: a / accumulate, total), private

    def train_step(state, frozen, batch, rng):
        key = jax.random.fold_in(rng, state.step)  # a resumed run replays the same noise
        found, private = gradients(state.params, frozen, batch, key, state.step)
        value, metrics, grads = found
        norm = optax.tree.norm(grads)

        updates, opt_state = tx.update(grads, state.opt_state, state.params, **private)
        # The updates too: an infinite learning rate spoils what a finite gradient would not.
        finite = jnp.isfinite(value) & jnp.isfinite(norm) & jnp.isfinite(optax.tree.norm(updates))
        params = optax.apply_updates(state.params, updates)
        average = averages.moved(ema, state.ema, params, state.step)

        def keep(new, old):
            return jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, old)

        state = TrainState(
            step=state.step + 1,
            params=keep(params, state.params),
            ema=keep(average, state.ema),
            opt_state=keep(opt_state, state.opt_state),
            skipped=jnp.where(finite, 0, state.skipped + 1),
        )
        metrics = metrics | {"loss": value, "grad_norm": norm, "skipped": 1.0 - finite}
        return state, metrics | norms.grouped(groups, grads)

    return train_step
