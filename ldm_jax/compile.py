"""Compiles a train step or a sampler for TPUs that are not at hand: does it fit, what does it send, how fast can it be.

    python -m ldm_jax.compile --config configs/imagenet_f4.py --first_stage configs/kl_f4.py --topology v5e:16x16
    python -m ldm_jax.compile --config configs/sd15_finetune.py --config.init.path=/models/sd15 --topology v6e:4x4 \
        --batch 4 --search batch --out sd15.json

Needs libtpu (pip install 'ldm_jax[tpu]') and no TPU, no data, no weights: shapes alone, and the config files of a model
that a run starts from. What is compiled is the step that `train.py` compiles, on the config's mesh over all devices.
It takes long: minutes for a large network, whatever the number of chips.
"""

import json
import sys
from pathlib import Path

import jax
from absl import flags

from ldm_jax import cli
from ldm_jax.build.flags import config_flag

FLAGS = flags.FlagValues()
CONFIG = config_flag("config", "the run: a file in configs/", FLAGS)
FIRST_STAGE = config_flag(
    "first_stage", "the config of the autoencoder, where `codec.run` holds no run yet", FLAGS
)
TOPOLOGY = flags.DEFINE_string(
    "topology", None, "the chips of a slice, such as v5e:16x16", flag_values=FLAGS
)
SLICES = flags.DEFINE_integer(
    "slices", 1, "slices of that topology", lower_bound=1, flag_values=FLAGS
)
WHAT = flags.DEFINE_enum(
    "what", "train", ["train", "sample"], "the train step or the sampler", flag_values=FLAGS
)
BATCH = flags.DEFINE_integer(
    "batch",
    None,
    "rows of the batch on each device; without it the config's batch over all of them",
    lower_bound=1,
    flag_values=FLAGS,
)
SEARCH = flags.DEFINE_enum(
    "search", None, ["batch"], "the largest batch on a device that fits", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "a JSON file for the figures", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    jax.config.update("jax_platforms", "cpu")  # what is at hand is not what is compiled for
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a config value is set by --config.NAME=VALUE")
        cli.required(CONFIG, TOPOLOGY)
        from ldm_jax.build import parts, plan
        from ldm_jax.foresee import chips
        from ldm_jax.foresee.study import DoesNotFit, largest

        chip = chips.named(TOPOLOGY.value)
        of = plan.plan(CONFIG.value, FIRST_STAGE.value)
        mesh = parts.mesh(CONFIG.value, chips.devices(TOPOLOGY.value, SLICES.value))
        batch = parts.data(CONFIG.value)["batch"]
        rows = batch if BATCH.value is None else BATCH.value * mesh.size
        plan.program(CONFIG.value, of, mesh, WHAT.value, rows)  # says what does not divide
    try:
        if SEARCH.value:
            most = largest(lambda n: _fits(of, mesh, n * mesh.size), max(rows // mesh.size, 1))
            if not most:
                cli.fail("not even one row of the batch on each device fits; try remat or fsdp")
            rows = most * mesh.size
        figures = _figures(of, mesh, chip, rows)
    except DoesNotFit as error:
        cli.fail(f"{rows / mesh.size:g} row(s) on each device do not fit: {error}")
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(figures, indent=2) + "\n")


def _fits(of, mesh, rows: int) -> bool:
    from ldm_jax.build import plan
    from ldm_jax.foresee.study import DoesNotFit, compile_program

    try:
        compile_program(plan.program(CONFIG.value, of, mesh, WHAT.value, rows), mesh)
        answer = "fit"
    except DoesNotFit as error:
        answer = f"do not fit: {error}"
    print(f"{rows // mesh.size} row(s) on each device {answer}", file=sys.stderr)
    return answer == "fit"


def _figures(of, mesh, chip, rows: int) -> dict:
    from ldm_jax.build import plan
    from ldm_jax.flops import flops
    from ldm_jax.foresee.study import compile_program, study, told
    from ldm_jax.nn import once

    program = plan.program(CONFIG.value, of, mesh, WHAT.value, rows)
    made, seconds = compile_program(program, mesh)
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), list(program.inputs.values())
    )
    executed = flops(program.call, *shapes)
    with once.every():  # nothing is computed again
        model = flops(program.call, *shapes)
    figures = {
        "topology": TOPOLOGY.value,
        "slices": SLICES.value,
        "what": WHAT.value,
        "mesh": {k: v for k, v in mesh.shape.items() if v > 1},
        "compile_seconds": round(seconds, 1),
    } | study(made, program, mesh, chip, model, executed)
    print(f"{WHAT.value} on {TOPOLOGY.value}, compiled in {seconds:.0f} s")
    print(told(figures))
    return figures


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
