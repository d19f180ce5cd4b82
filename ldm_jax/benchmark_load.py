"""What loading costs: full-size models with random weights, written once, and loaded in a fresh process.

    python -m ldm_jax.benchmark_load write --path DIR --model sd15       # 1.07 G parameters, 2.1 GB in float16
    python -m ldm_jax.benchmark_load load --path DIR --dtype float16     # --fsdp 8: spread over 8 devices

Models: "sd15", Stable Diffusion 1.5 as a folder of diffusers, and "sdxl_unet", the U-Net of SDXL alone. Seconds are for
`from_pretrained` as a user calls it, or its steps for the U-Net alone, after the imports; where others use the machine
they exceed those of the CPU. Memory is the peak of resident memory above what the process had with jax imported. The
system may have the files in memory; time does not depend on the weights.
"""

import json
import math
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from ldm_jax import cli, markdown, tree
from ldm_jax.measure import models
from ldm_jax.pretrained import components, from_pretrained
from ldm_jax.training import sharding
from ldm_jax.weights import byte_pairs, folder, scheduler, table

FLAGS = flags.FlagValues()
PATH = flags.DEFINE_string("path", None, "the folder of the model", flag_values=FLAGS)
MODEL = flags.DEFINE_enum(
    "model", "sd15", ("sd15", "sdxl_unet"), "which model to write", flag_values=FLAGS
)
DTYPE = flags.DEFINE_enum(
    "dtype",
    "float16",
    ("float32", "float16", "bfloat16"),
    "of the tensors to write, or of the parameters",
    flag_values=FLAGS,
)
FSDP = flags.DEFINE_integer(
    "fsdp", 1, "devices to spread the parameters over", lower_bound=1, flag_values=FLAGS
)

TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}  # in the files
SD15, SDXL = (models.MODELS[name]()[0] for name in ("sd15", "sdxl"))
UNET, VAE, TEXT = (SD15[name] for name in ("unet", "vae", "text_encoder"))
XL_UNET, VOCABULARY = SDXL["unet"], TEXT["vocab_size"]


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def write_component(path: Path, kind: str, config: dict[str, Any]) -> int:
    """A component with random weights, one tensor after the other; returns the number of its parameters."""
    made = components.make(kind, config, jnp.float32)
    named = zip(tree.names(made.shapes), jax.tree.leaves(made.shapes), strict=True)
    header, end = {}, 0
    for name, leaf in named:
        place = table.find(made.rows({}), name)
        shape = table.their_shape(name, leaf.shape, place.layout)
        size = math.prod(shape) * jnp.dtype(DTYPE.value).itemsize
        header[place.name] = dict(
            dtype=TYPES[DTYPE.value], shape=shape, data_offsets=(end, end + size)
        )
        end += size
    write_json(path / "config.json", config)
    content = json.dumps(header).encode()
    drawn = np.random.default_rng(0).standard_normal(2**22, np.float32) * 0.02
    block = drawn.astype(jnp.dtype(DTYPE.value)).tobytes()
    with (path / f"{made.stem}.safetensors").open("wb") as file:
        file.write(len(content).to_bytes(8, "little") + content)
        for start in range(0, end, len(block)):
            file.write(block[: end - start])
    return tree.count(made.shapes)


def write_tokenizer(path: Path) -> None:
    """Single bytes, and a vocabulary as long as CLIP's."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    pieces = [*letters, *(f"{letter}</w>" for letter in letters)]
    idle = [f"<idle {i}>" for i in range(VOCABULARY - len(pieces) - 2)]
    every = [*pieces, *idle, byte_pairs.BEGIN, byte_pairs.END]
    write_json(path / byte_pairs.VOCAB, {piece: i for i, piece in enumerate(every)})
    write_json(path / byte_pairs.CONFIG, dict(tokenizer_class="CLIPTokenizer"))
    (path / byte_pairs.MERGES).write_text("#version: 0.2\n")


def write(path: Path) -> None:
    """Raises: ValueError: the folder exists and is not empty."""
    if path.exists() and any(path.iterdir()):
        raise ValueError(f"{path} is not empty; give a new folder")
    if MODEL.value == "sdxl_unet":
        print(f"{write_component(path, XL_UNET['_class_name'], XL_UNET):,} parameters")
        return
    networks = {
        "unet": ("diffusers", UNET["_class_name"], UNET),
        "vae": ("diffusers", VAE["_class_name"], VAE),
        "text_encoder": ("transformers", "CLIPTextModel", TEXT),
    }
    for name, (_, kind, config) in networks.items():
        print(f"{name}: {write_component(path / name, kind, config):,} parameters")
    write_tokenizer(path / "tokenizer")
    write_json(path / "scheduler" / "scheduler_config.json", scheduler.to_config(scheduler.Noise()))
    parts = {name: [library, kind] for name, (library, kind, _) in networks.items()}
    parts |= {
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    write_json(path / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | parts)


def read(path: Path) -> Any:
    """The parameters, where the flags want them."""
    mesh = sharding.make_mesh(data=1, fsdp=FSDP.value, devices=jax.devices()[: FSDP.value])
    rules = ((".*", "fsdp"),)
    if (path / "model_index.json").is_file():
        pipe = from_pretrained(path, dtype=DTYPE.value, mesh=mesh, rules=rules)
        return pipe.params, pipe.arrays
    config = folder.read_json(path / "config.json", "a component")
    made = components.make(config["_class_name"], config, jnp.dtype(DTYPE.value))
    tensors = made.stored(folder.weights(path, made.stem))
    return made.load(tensors, DTYPE.value, sharding.layouts(mesh, rules, made.shapes))


def load(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"there is no folder {path}; `write` makes it")
    if len(jax.devices()) < FSDP.value:
        raise ValueError(
            f"there are {len(jax.devices())} devices for --fsdp {FSDP.value}; on a CPU set JAX_NUM_CPU_DEVICES"
        )
    idle = peak()
    began, busy = time.perf_counter(), time.process_time()
    leaves = jax.tree.leaves(jax.block_until_ready(read(path)))
    spent, busy = time.perf_counter() - began, time.process_time() - busy
    above = peak() - idle
    size = sum(file.stat().st_size for file in path.rglob("*.safetensors"))
    held = dict.fromkeys(jax.devices()[: FSDP.value], 0)
    for shard in shards(leaves):
        held[shard.device] += shard.data.nbytes
    whole = sum(leaf.nbytes for leaf in leaves)
    row = {
        "parameters": tree.count(leaves),
        "dtype": DTYPE.value,
        "devices": FSDP.value,
        "seconds": f"{spent:.1f}",
        "of the CPU": f"{busy:.1f}",
        "files, GB": f"{size / 1e9:.2f}",
        "idle, GB": f"{idle / 1e9:.2f}",
        "peak above, GB": f"{above / 1e9:.2f}",
        "of the files": f"{above / size:.2f}",
        "largest tensor, GB": f"{max(leaf.nbytes for leaf in leaves) / 1e9:.2f}",
        "largest share": f"{max(held.values()) / whole:.3f}",
    }
    cells = [f"{v:,}" if isinstance(v, int) else v for v in row.values()]
    print(markdown.table(list(row), [cells]))


def shards(leaves: list[jax.Array]) -> Iterator[Any]:
    return (shard for leaf in leaves for shard in leaf.addressable_shards)


def peak() -> int:
    """The most bytes of memory that were resident so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


COMMANDS = {"write": write, "load": load}


def main(argv: list[str]) -> None:
    with cli.plain_errors():
        if len(argv) != 2 or argv[1] not in COMMANDS:
            raise ValueError(f"say what to do, one of {sorted(COMMANDS)}")
        cli.required(PATH)
        COMMANDS[argv[1]](Path(PATH.value))


if __name__ == "__main__":
    cli.run(main, FLAGS)
