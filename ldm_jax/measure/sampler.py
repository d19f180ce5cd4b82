"""How fast a model draws: the condition, the loop over the network, the decoder, and all of them as one program.

    python -m ldm_jax.benchmark sampler --model sd15 --steps 50 --batch 1,4,16 --dtype bfloat16 --out results.json
    python -m ldm_jax.benchmark sampler --model tiny --steps 10 --against diffusers --out results.json

Models: "sd15", "sdxl" and "ldm4" (the latent diffusion model of ImageNet's classes) at their published sizes; "tiny"
and "small", reduced Stable Diffusion 1.5 (16x16 latents, widths 64/128/256; 32x32, 128/256/512/512); the folder of a
model; a config file, or the work directory of its run. Weights are random where none are given: time does not depend
on them. Every program is compiled ahead, runs once to warm up, and is waited for; inputs are on the device. Rates are
by our own count of operations (`ldm_jax.flops`), and a share is that of the rate of a large matrix product, measured
on the same device in the same type.

With --against diffusers the same networks, weights and steps run in torch, in turn with ours, after their results have
been compared; ratios are medians over pairs (above 1: ours is faster). On a GPU that is torch as it is and with
`torch.compile`. Without an accelerator everything runs on one pinned thread and seconds are those of the CPU.

Freed memory is kept by the process (`heap`), as `train.py` and `sample.py` do, for torch and for us. Without it the
kernel maps XLA's one buffer of temporaries anew at every call, where it is above 32 MB (a twentieth of the decoder of
"small"), while torch's arrays, each of them smaller, are mapped once.
"""

from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from ldm_jax import flops, markdown
from ldm_jax.measure import comparison, models, programs, rival, timing
from ldm_jax.measure.comparison import Asked

FLAGS = flags.FlagValues()
comparison.define(FLAGS, "1", ("float32", "bfloat16", "float16"), "of parameters and computation")
SOLVER = flags.DEFINE_string("solver", "ddim", "by its name", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 50, "of the solver", lower_bound=1, flag_values=FLAGS)
GUIDANCE = flags.DEFINE_float("guidance", 7.5, "its scale; 1: none", flag_values=FLAGS)

PARTS = ("text", "loop", "decode", "together")


def prepare() -> Asked:
    """What the flags ask for.

    Raises:
      ValueError: as `comparison.prepare`, `programs.check` and `rival.check`; nothing was compiled.
    """
    asked = comparison.prepare(FLAGS)
    programs.check(asked.subject, SOLVER.value, STEPS.value)
    if FLAGS.against:
        rival.check(asked.subject, SOLVER.value)
    return asked


def main(asked: Asked) -> None:
    """Measures, prints a table, and writes what --out names."""
    result = run(asked.subject, asked.batches) | {"one_pinned_thread": asked.pinned}
    print(table(result))
    if FLAGS.out:
        rows = [
            (
                f"{row['by']}, batch {row['batch']}",
                row["batch"] / row["together"][comparison.clock()],
            )
            for row in result["rows"]
        ]
        title = f"{result['model']}, {result['steps']} steps, {result['dtype']}, {result['device']}"
        comparison.write(FLAGS.out, result, title, rows, "images/s")


def run(subject: models.Subject, batches: list[int]) -> dict[str, Any]:
    """Everything that is measured.

    Raises:
      ValueError: torch's results are not ours.
    """
    rate = timing.matmul_rate(FLAGS.dtype)
    rows = [row for batch in batches for row in measure(subject, batch, rate)]
    asked = {"solver": SOLVER.value, "steps": STEPS.value, "guidance": GUIDANCE.value}
    return comparison.described(subject, FLAGS, rate) | asked | {"rows": rows}


def measure(subject: models.Subject, batch: int, rate: float) -> list[dict[str, Any]]:
    """A row for us, and one for each rival."""
    side = FLAGS.side or subject.side
    made = programs.programs(subject, SOLVER.value, STEPS.value, GUIDANCE.value, batch, side)
    together, compiling = timing.compile_seconds(made["together"][0], *made["together"][1])
    compiled = {n: f.lower(*args).compile() for n, (f, args) in made.items() if n != "together"}
    compiled["together"] = together

    def ours(name: str) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled[name](*made[name][1]))

    runs = {"ldm_jax": {name: ours(name) for name in PARTS}}
    if FLAGS.against:
        runs |= _rivals(subject, made, runs["ldm_jax"])
    spent = timing.parts_in_turn(runs, FLAGS.repeats)
    rows = []
    for by in runs:
        row = {"by": by, "batch": batch, "side": side}
        row |= {name: spent[by][name].summary() for name in PARTS}
        row["step_seconds"] = row["loop"]["seconds"] / STEPS.value
        row["images_per_second"] = batch / row["together"]["seconds"]
        if by == "ldm_jax":
            row |= compiling | timing.memory(together)
            for name in PARTS:
                operations = flops.flops(*(made[name][0], *made[name][1]))
                row[name]["xla_flops"] = timing.xla_flops(compiled[name])
                row[name] |= comparison.counted(operations, row[name], rate)
        else:
            row["ratio"] = comparison.ratios(spent[by], spent["ldm_jax"])
        rows.append(row)
    return rows


def _rivals(subject, made, ours):
    """Those of torch, whose latents and images are ours.

    Raises:
      ValueError: they are not.
    """
    given = made["text"][1][1]
    conds, start = made["loop"][1][1:3]
    ids = [given[field] for field in sorted(given) if field.startswith("tokens")]
    args = dict(ids=ids, start=start, scale=GUIDANCE.value, sizes=given.get("sizes"))
    kinds = {"diffusers": False}
    if jax.default_backend() == "gpu":
        kinds["diffusers compiled"] = True
    found = {
        by: rival.parts(subject, FLAGS.dtype, conds, args, STEPS.value, compiled)
        for by, compiled in kinds.items()
    }
    results = {name: ours[name]() for name in ("text", "loop", "decode")}
    results["text"] = results["text"][0].tokens
    for by, parts in found.items():
        for name, result in results.items():
            theirs = parts[name]()
            if name == "text":
                if len(theirs) > 1:
                    continue  # of two encoders they give more than is read
                theirs = theirs[0][: len(start)]
            comparison.check(by, name, result, rival.array(theirs), FLAGS.dtype)
    return found


def table(result: dict[str, Any]) -> str:
    """The result as people read it."""
    clock = "CPU s" if comparison.clock() == "cpu_seconds" else "s"
    said = (
        f"\n{result['model']}, {result['solver']}, {result['steps']} steps, guidance {result['guidance']}, "
        f"{result['dtype']}, {result['device']}, jax {result['jax']}, "
        f"matrix product {result['matmul_tflops']:.3g} TFLOP/s\n\n"
    )
    head = ("by", "batch", f"step, {clock}", *PARTS, "p90, s", "images/s", "TFLOP/image")
    lines = []
    for row in result["rows"]:
        each = [row[name][comparison.clock()] for name in PARTS]
        cells = [row["by"], str(row["batch"]), f"{each[1] / result['steps']:.4g}"]
        cells += [f"{seconds:.4g}" for seconds in each]
        cells += [f"{row['together']['seconds_p90']:.4g}", f"{row['batch'] / each[3]:.4g}"]
        if "ratio" in row:
            shown = ", ".join(f"{name} {row['ratio'][name]:.2f}" for name in PARTS)
            lines += [cells, [f"of ours, by pairs: {shown}"]]
            continue
        whole = row["together"]
        peak = row.get("peak_bytes", row["program_bytes"])
        cells += [
            f"{whole['flops'] / row['batch'] / 1e12:.4g}",
            f"{whole['tflops']:.3g} ({whole['of_matmul_rate']:.2f})",
            f"{row['compile_seconds']:.1f}, {row['compile_seconds_cached']:.1f}",
            f"{peak / 1e9:.2f}",
        ]
        lines.append(cells)
    return said + markdown.table((*head, "TFLOP/s (share)", "compile, cached, s", "GB"), lines)
