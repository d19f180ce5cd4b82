"""Compiles a train step or a sampler for TPUs that are not at hand: does it fit, what does it send, how fast can it be.

    python -m ldm_jax.compile --config configs/imagenet_f4.py --first_stage configs/kl_f4.py --topology v5e:16x16
    python -m ldm_jax.compile --config configs/sd15_finetune.py --config.init.path=/models/sd15 --topology v6e:4x4 \
        --search batch,remat,layout --out sd15.json

Needs libtpu (pip install 'ldm_jax[tpu]') and no TPU, no data, no weights: shapes alone, and the config files of a model
that a run starts from. What is compiled is the step that `train.py` compiles, on the config's mesh over all devices.
It takes long: half an hour for a large network, whatever the number of chips. With --nocode it takes minutes.

    python -m ldm_jax.compile --table docs/benchmarks/ahead

tells what files of figures (--out) in a folder hold, and draws bounds.png there.

With --search the memory of all choices is foreseen first, which takes seconds; then the one that lets most rows a
second through, by what it computes and sends, is compiled with the most rows that should fit, and again until they do.
"""

import json
import os
import platform
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
from absl import flags

from ldm_jax import cli, markdown
from ldm_jax.build.flags import config_flag
from ldm_jax.foresee import settled

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
SEARCH = flags.DEFINE_list(
    "search",
    None,
    "the largest batch on a device that fits: batch, and over remat and layout too if named (batch,remat,layout)",
    flag_values=FLAGS,
)
OUT = flags.DEFINE_string("out", None, "a JSON file for the figures", flag_values=FLAGS)
CODE = flags.DEFINE_boolean(
    "code",
    True,
    "make the chips' code too; --nocode ends as soon as XLA has settled the program and its memory, in a tenth of the "
    "time, and cannot say whether each kernel finds the VMEM that it needs",
    flag_values=FLAGS,
)
TEXT = flags.DEFINE_string("text", None, "a file for the compiled program", flag_values=FLAGS)
TABLE = flags.DEFINE_string(
    "table",
    None,
    "only tell, as a table, what such JSON files in this folder hold, and draw it there",
    flag_values=FLAGS,
)


def main(argv: list[str]) -> None:
    if TABLE.value is not None:
        with cli.plain_errors():
            cli.nothing_more(argv, "--table stands alone")
            _tabulate(Path(TABLE.value))
        return
    # Of --nocode the compiler may still write.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        _study(argv, Path(folder))
    if not CODE.value:
        sys.stdout.flush()
        os._exit(0)  # the compilation goes on in a thread that nothing stops


def _study(argv: list[str], folder: Path) -> None:
    settled.ask(folder)
    jax.config.update("jax_platforms", "cpu")  # what is at hand is not what is compiled for
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a config value is set by --config.NAME=VALUE")
        cli.required(CONFIG, TOPOLOGY)
        from ldm_jax.build import parts, updates, variants
        from ldm_jax.foresee import chips

        over = _searched(SEARCH.value)
        if over and not CODE.value:
            raise ValueError("--search compiles to the end; leave out --nocode")
        chip = chips.named(TOPOLOGY.value)
        devices = chips.devices(TOPOLOGY.value, SLICES.value)
        ways = variants.variants(CONFIG.value, FIRST_STAGE.value, devices, over)
        rows = parts.data(CONFIG.value)["batch"]
        if over or BATCH.value is not None:
            rows = (BATCH.value or updates.optimizer_of(CONFIG.value)[2]) * len(devices)
        for way in ways:
            way.program(WHAT.value, rows)  # says what does not divide
        choices = variants.choices(ways, WHAT.value, chip)
    if over:
        found, table = _search(ways, choices, chip.of_device(), folder)
    else:
        found, table = _compiled(ways[0], rows, folder), []
    if found.made is None:
        rows = found.rows / found.way.mesh.size
        cli.fail(f"{rows:g} row(s) on each device do not fit: {found.reason}")
    choice = choices[ways.index(found.way)]
    figures = _figures(found, chip, choice) | ({"searched": table} if table else {})
    if TEXT.value:
        Path(TEXT.value).write_text(found.made.text)
    if OUT.value:
        Path(OUT.value).write_text(json.dumps(figures, indent=2) + "\n")


def _searched(given: list[str] | None) -> list[str]:
    from ldm_jax.build.variants import SEARCHED

    given = given or []
    if unknown := [name for name in given if name not in SEARCHED]:
        raise ValueError(f"--search={unknown[0]} is unknown; choose among {', '.join(SEARCHED)}")
    if given and "batch" not in given:
        raise ValueError("--search finds the largest batch; name batch too: --search=batch,...")
    return given


def _tabulate(folder: Path) -> None:
    from ldm_jax.foresee import table
    from ldm_jax.measure import plot

    records = table.read(folder)
    print(markdown.table(table.HEAD, map(table.line, records)))
    title = "Least time of a step by what takes it, in % of the longest"
    plot.bars(folder / "bounds.png", title, table.shares(records), "%")


class Compiled(NamedTuple):
    """A program, and what it came to or why it does not fit."""

    way: Any
    rows: int  # on all devices
    program: Any
    made: Any = None  # study.Laid
    spent: Any = None
    needed: float = 0.0  # bytes on a device
    reason: str = ""


def _compiled(way, rows: int, folder: Path) -> Compiled:
    from ldm_jax.foresee import study

    program = way.program(WHAT.value, rows)
    found = Compiled(way, rows, program)
    try:
        until = (lambda: None) if CODE.value else lambda: settled.settled(folder)
        made, spent = study.compile_program(program, way.mesh, until)
    except study.DoesNotFit as error:
        found = found._replace(needed=error.needed, reason=str(error))
    else:
        if isinstance(made, settled.Settled):
            laid = study.Laid(made.text, {"peak": made.peak}, {})
        else:
            laid = study.executable(made, settled.text(folder))
        found = found._replace(made=laid, spent=spent, needed=laid.memory["peak"])
    if SEARCH.value:
        fits = f"do not fit: {found.reason}" if found.made is None else "fit"
        print(f"{way.name}: {rows / way.mesh.size:g} row(s) on each device {fits}", file=sys.stderr)
    return found


def _search(ways, choices, device, folder: Path) -> tuple[Compiled, list[dict[str, Any]]]:
    """What lets most rows a second through of what fits indeed, and what was foreseen of all."""
    from ldm_jax.foresee import search

    table = [
        {
            "choice": choice.name,
            "rows_on_a_device": most,
            "memory": round(choice.bytes(most)),
            "rows_per_second_bound": most * ways[0].mesh.size / choice.seconds(most),
        }
        for choice, most in search.ranked(choices, device.memory)
    ]
    for row in table:
        print(
            f"foreseen: {row['rows_on_a_device']} row(s), {row['rows_per_second_bound']:.0f} a second at most: "
            f"{row['choice']}"
        )
    for choice, _ in search.ranked(choices, device.memory):
        way = ways[choices.index(choice)]
        done = {}

        def needs(rows, way=way, done=done):
            done[rows] = _compiled(way, rows * way.mesh.size, folder)
            return done[rows].made is not None, done[rows].needed

        if most := search.settled(choice, device.memory, needs):
            return done[most], table
    cli.fail("not even one row of the batch on each device fits; search over remat and layout too")


def _figures(found: Compiled, chip, choice) -> dict[str, Any]:
    from ldm_jax.flops import flops
    from ldm_jax.foresee.study import study, told
    from ldm_jax.nn import once

    program, mesh = found.program, found.way.mesh
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), list(program.inputs.values())
    )
    executed = flops(program.call, *shapes)
    with once.every():  # nothing is computed again
        model = flops(program.call, *shapes)
    rows = found.rows / mesh.size
    foreseen = {"inputs": round(choice.inputs(rows)), "temporary": round(choice.temporary(rows))}
    figures = {
        "command": f"python -m ldm_jax.compile {shlex.join(_asked(sys.argv[1:]))}",
        "topology": TOPOLOGY.value,
        "slices": SLICES.value,
        "what": WHAT.value,
        "choice": found.way.name,
        "mesh": {k: v for k, v in mesh.shape.items() if v > 1},
        "compile_seconds": round(found.spent.wall, 1),
        "compile_cpu_seconds": round(found.spent.cpu, 1),
        "machine": f"{os.cpu_count()} cores, {_processor()}, jax {jax.__version__}",
    } | study(found.made, program, mesh, chip, model, executed, foreseen)
    print(f"{WHAT.value} on {TOPOLOGY.value}, compiled in {found.spent.wall:.0f} s")
    print(told(figures))
    return figures


def _asked(arguments: list[str]) -> list[str]:
    """Without where the answer goes."""
    return [one for one in arguments if not one.startswith(("--out=", "--text="))]


def _processor() -> str:
    """The processor's name, where Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
