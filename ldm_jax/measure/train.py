"""How fast a model trains: the loss, its gradient, and a step of AdamW, on latents and tokens that are at hand.

    python -m ldm_jax.benchmark train --model tiny --batch 8 --against diffusers --out train.json

The loss is the mean squared error of the noise; latents, noise, times and tokens are drawn once. Models are those of
`benchmark sampler`, parameters and moments are in float32 whatever the compute dtype. Parts:

    loss        the network and the loss, nothing kept
    gradient    the loss and its gradient
    step        the gradient, then AdamW as a program of its own, parameters and moments updated in place

With --against diffusers the same network is trained in torch, in turn with ours, after the loss, the gradient and the
loss after a step have been compared; ratios are medians over pairs (above 1: ours is faster). Torch's AdamW is there as
it is by default and fused. On a GPU torch also runs with `torch.compile`. Without an accelerator everything runs on one
pinned thread and seconds are those of the CPU. Freed memory is kept by the process (`heap`), for torch and for us.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import flags

from ldm_jax import flops, markdown
from ldm_jax.diffusion import process
from ldm_jax.measure import comparison, models, rival, timing
from ldm_jax.measure.comparison import Asked
from ldm_jax.types import Params

FLAGS = flags.FlagValues()
comparison.define(FLAGS, "8", ("float32", "bfloat16"), "of computation")

Runs = dict[str, Callable[[], Any]]
PARTS = ("loss", "gradient", "step")
ADAMW = dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)  # in torch's words


def prepare() -> Asked:
    """What the flags ask for.

    Raises:
      ValueError: as `comparison.prepare` and `rival.check_training`; nothing was compiled.
    """
    asked = comparison.prepare(FLAGS)
    rival.check_training(asked.subject)
    return asked


def main(asked: Asked) -> None:
    """Measures, prints a table, and writes what --out names."""
    result = run(asked.subject, asked.batches) | {"one_pinned_thread": asked.pinned}
    print(table(result))
    if FLAGS.out:
        rows = [
            (f"{row['by']}, batch {row['batch']}", row["batch"] / row["step"][comparison.clock()])
            for row in result["rows"]
        ]
        title = f"training {result['model']}, {result['dtype']}, {result['device']}"
        comparison.write(FLAGS.out, result, title, rows, "samples/s")


def run(subject: models.Subject, batches: list[int]) -> dict[str, Any]:
    """Everything that is measured.

    Raises:
      ValueError: torch's results are not ours.
    """
    rate = timing.matmul_rate(FLAGS.dtype)
    rows = [row for batch in batches for row in measure(subject, batch, rate)]
    return comparison.described(subject, FLAGS, rate) | {"rows": rows}


def given_batch(subject: models.Subject, batch: int, side: int) -> dict[str, Any]:
    """Latents "x0", the noise "eps", steps "t" of the table, and the condition "cond"."""
    rng = np.random.default_rng(0)
    shape = (batch, side, side, subject.channels)
    x0, eps = (jnp.asarray(rng.standard_normal(shape, np.float32)) for _ in range(2))
    steps = jnp.asarray(rng.integers(0, subject.model.path.steps, batch))
    model = subject.model
    cond = jax.eval_shape(model.condition, subject.params, subject.batch(batch, side))
    tokens = jnp.asarray(rng.standard_normal(cond.tokens.shape, np.float32))
    return {"x0": x0, "eps": eps, "t": steps, "cond": cond.replace(tokens=tokens)}


def loss_of(subject: models.Subject) -> Callable[..., Any]:
    """The loss of (params, batch), of the network's parameters."""
    path, target = subject.model.path, subject.model.target

    def loss(params, given):
        t = given["t"] / (path.steps - 1)
        x_t = process.add_noise(path, given["x0"], given["eps"], t)
        network = subject.model.raw({"network": params})
        out = network(x_t, target.c_time(path, t), given["cond"])
        return jnp.square(out - given["eps"]).mean()

    return loss


def measure(subject: models.Subject, batch: int, rate: float) -> list[dict[str, Any]]:
    """A row for us, and one for each rival."""
    given = given_batch(subject, batch, FLAGS.side or subject.side)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), subject.params["network"])
    loss = loss_of(subject)
    ours, programs = compiled(loss, params, given)
    runs = {"ldm_jax": ours}
    if FLAGS.against:
        runs |= _rivals(subject, given, ours, programs["loss"])
    spent = timing.parts_in_turn(runs, FLAGS.repeats)
    operations = dict.fromkeys(PARTS, flops.flops(jax.value_and_grad(loss), params, given))
    operations["loss"] = flops.flops(loss, params, given)
    rows = []
    for by, parts in spent.items():
        row = {"by": by, "batch": batch, "side": given["x0"].shape[1]}
        row |= {name: of.summary() for name, of in parts.items()}
        if by == "ldm_jax":
            row |= timing.memory(programs["gradient"])
            for name in PARTS:
                row[name] |= comparison.counted(operations[name], row[name], rate)
        else:
            row["ratio"] = comparison.ratios(parts, spent["ldm_jax"])
        rows.append(row)
    return rows


class Stepping:
    """A run that waits and goes on from the state where the one before left it; `step(state)` gives (state, more)."""

    def __init__(self, step: Callable[[Any], tuple[Any, Any]], state: Any):
        self.step, self.state = step, state

    def __call__(self) -> None:
        self.state, _ = jax.block_until_ready(self.step(self.state))


def compiled(loss: Callable[..., Any], params: Params, given: Any) -> tuple[Runs, dict[str, Any]]:
    """The parts, on a copy of the parameters where they change them; and the compiled programs."""
    b1, b2 = ADAMW["betas"]
    tx = optax.adamw(ADAMW["lr"], b1, b2, ADAMW["eps"], weight_decay=ADAMW["weight_decay"])

    def adamw(state, gradient):
        params, opt_state = state
        updates, opt_state = tx.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    state = (jax.tree.map(jnp.copy, params), tx.init(params))
    programs = {
        "loss": jax.jit(loss).lower(params, given),
        "gradient": jax.jit(jax.value_and_grad(loss)).lower(params, given),
        "step": jax.jit(adamw, donate_argnums=0).lower(state, params),
    }
    programs = {name: lowered.compile() for name, lowered in programs.items()}

    def stepped(state):
        value, gradient = programs["gradient"](state[0], given)
        return programs["step"](state, gradient), value

    runs = {
        "loss": lambda: jax.block_until_ready(programs["loss"](params, given)),
        "gradient": lambda: jax.block_until_ready(programs["gradient"](params, given)),
        "step": Stepping(stepped, state),
    }
    return runs, programs


def _rivals(subject, given, ours, loss):
    """Those of torch, whose loss, gradient and loss after a step are ours.

    Raises:
      ValueError: they are not.
    """
    kinds = {"diffusers": (False, False), "diffusers, fused AdamW": (False, True)}
    if jax.default_backend() == "gpu":
        kinds["diffusers compiled, fused AdamW"] = (True, True)
    value, gradient = ours["gradient"]()
    gradient = subject.made["unet"].export(jax.tree.map(np.asarray, gradient))
    ours["step"]()
    after = loss(ours["step"].state[0], given)
    found = {}
    for by, how in kinds.items():
        theirs = rival.training(subject, FLAGS.dtype, given, ADAMW, *how)
        check = functools.partial(comparison.check, by, dtype=FLAGS.dtype)
        check("loss", value, theirs.parts["gradient"]())
        check("gradient", gradient, theirs.gradients())
        theirs.parts["step"]()
        check("loss after a step", after, theirs.parts["loss"]())
        found[by] = theirs.parts
    return found


def table(result: dict[str, Any]) -> str:
    """The result as people read it."""
    clock = "CPU s" if comparison.clock() == "cpu_seconds" else "s"
    said = (
        f"\ntraining {result['model']}, {result['dtype']}, {result['device']}, jax {result['jax']}, "
        f"matrix product {result['matmul_tflops']:.3g} TFLOP/s\n\n"
    )
    head = ("by", "batch", f"loss, {clock}", "gradient", "step", "samples/s", "TFLOP/sample")
    lines = []
    for row in result["rows"]:
        cells = [row["by"], str(row["batch"])]
        each = [row[name][comparison.clock()] for name in PARTS]
        cells += [f"{seconds:.4g}" for seconds in each]
        cells.append(f"{row['batch'] / each[-1]:.4g}")
        if "ratio" in row:
            shown = ", ".join(f"{name} {row['ratio'][name]:.2f}" for name in PARTS)
            lines += [cells, [f"of ours, by pairs: {shown}"]]
            continue
        of = row["step"]
        peak = row.get("peak_bytes", row["program_bytes"])
        cells += [
            f"{of['flops'] / row['batch'] / 1e12:.4g}",
            f"{of['tflops']:.3g} ({of['of_matmul_rate']:.2f})",
            f"{peak / 1e9:.2f}",
        ]
        lines.append(cells)
    return said + markdown.table((*head, "TFLOP/s (share)", "GB"), lines)
