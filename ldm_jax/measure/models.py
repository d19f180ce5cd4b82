"""Models to measure: published sizes and reduced ones with random weights, a folder's, a config's or a run's."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ldm_jax import build, codec, conditioners, tree
from ldm_jax.diffusion import process, samplers
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import assembly, components, from_pretrained, inputs
from ldm_jax.types import Batch, Params
from ldm_jax.weights import original_configs, scheduler

LENGTH = 77  # tokens of a prompt
Configs = dict[str, Any]  # of components, in diffusers' and transformers' words


@dataclass(frozen=True)
class Subject:
    """A model with its parameters; one of our own has no components and brings a row of its conditions."""

    name: str
    model: LatentDiffusion
    params: Params
    arrays: Params  # of the codec
    made: Mapping[str, components.Component]
    noise: Mapping[str, Any]  # the scheduler's config
    side: int  # of a latent, by default
    channels: int  # of a latent
    row: Batch | None = None

    def points(self, steps: int) -> process.Point:
        """The noise levels of the model's scheduler, or the usual ones of a model of our own."""
        if self.row is not None:
            return samplers.grid(self.model.path, steps)
        read = scheduler.read(self.noise)
        to_zero = bool(self.noise.get("set_alpha_to_one", True))
        offset = int(self.noise.get("steps_offset", 0))
        return samplers.grid(self.model.path, steps, read.spacing, to_zero, offset=offset)

    def component_params(self) -> dict[str, Params]:
        """{name of a component: its parameters}"""
        condition = self.params.get("conditioner", {})
        texts = [name for name in self.made if name.startswith("text_encoder")]
        found = dict(zip(texts, (condition[key] for key in sorted(condition)), strict=False))
        return {"unet": self.params["network"], "vae": self.arrays["params"], **found}

    def batch(self, n: int, side: int) -> Batch:
        """Random conditions of n samples, whose latents have this side."""
        if self.row is not None:
            return {k: jnp.repeat(v[None], n, 0) for k, v in self.row.items()}
        rng = np.random.default_rng(0)
        found: dict[str, Any] = {}
        for field in self.model.fields:
            if field == "sizes":
                pixels = side * self.made["vae"].module.factor
                found[field] = np.tile(
                    np.array([pixels, pixels, 0, 0, pixels, pixels], np.float32), (n, 1)
                )
            elif field == inputs.IMAGE:
                width = self.made["unet"].config["cross_attention_dim"]
                found[field] = rng.standard_normal((n, width), np.float32)
            else:
                component = self.made["text_encoder" + field.removeprefix("tokens")]
                found[field] = _ids(n, component.module.vocab, rng)
        return jax.tree.map(jnp.asarray, found)


def _ids(n: int, vocab: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of a beginning, words, and ends."""
    ids = rng.integers(1, vocab - 2, (n, LENGTH)).astype(np.int32)
    ids[:, 0], ids[:, LENGTH // 2 :] = vocab - 2, vocab - 1
    return ids


def _text(kind: str = "CLIPTextModel", **settings: Any) -> dict[str, Any]:
    return {"architectures": [kind], "eos_token_id": 2, **settings}


CLIP_L = dict(
    hidden_size=768,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    vocab_size=49408,
)
CLIP_G = dict(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    projection_dim=1280,
    hidden_act="gelu",
    vocab_size=49408,
)
SHORT = CLIP_L | dict(num_hidden_layers=2, vocab_size=1000)  # the text encoder of reduced models
SD_VAE = dict(channels=(3, 3), widths=(128, 256, 512, 512), blocks=2, z_channels=4, embed=4)


def _reduced(widths: tuple[int, ...], side: int) -> tuple[Configs, int]:
    """Stable Diffusion 1.5 with fewer channels and levels, an autoencoder of a quarter of the widths."""
    unet = original_configs.unet(
        channels=(4, 4),
        widths=widths,
        blocks=2,
        depths=(*(1,) * (len(widths) - 1), 0),
        context=768,
        heads=8,
    )
    vae = original_configs.autoencoder(**SD_VAE | dict(widths=(32, 64, 128, 128)), scale=0.18215)
    return {"unet": unet, "vae": vae, "text_encoder": _text(**SHORT)}, side


def _sd15() -> tuple[Configs, int]:
    unet = original_configs.unet(
        channels=(4, 4),
        widths=(320, 640, 1280, 1280),
        blocks=2,
        depths=(1, 1, 1, 0),
        context=768,
        heads=8,
    )
    vae = original_configs.autoencoder(**SD_VAE, scale=0.18215)
    return {"unet": unet, "vae": vae, "text_encoder": _text(**CLIP_L)}, 64


def _sdxl() -> tuple[Configs, int]:
    unet = original_configs.unet(
        channels=(4, 4),
        widths=(320, 640, 1280),
        blocks=2,
        depths=(0, 2, 10),
        middle=10,
        context=2048,
        heads=(5, 10, 20),
        linear=True,
        vector=2816,
        sizes=True,
    )
    vae = original_configs.autoencoder(**SD_VAE, scale=0.13025)
    second = _text("CLIPTextModelWithProjection", **CLIP_G)
    texts = {"text_encoder": _text(**CLIP_L), "text_encoder_2": second}
    return {"unet": unet, "vae": vae, **texts}, 128


def _ldm4() -> tuple[Configs, int]:
    """The class-conditional model of ImageNet, whose token here is a vector."""
    unet = original_configs.unet(
        channels=(3, 3),
        widths=(192, 384, 576, 960),
        blocks=2,
        depths=(0, 1, 1, 1),
        context=512,
        heads=1,
    )
    vae = original_configs.autoencoder(
        channels=(3, 3),
        widths=(128, 256, 512),
        blocks=2,
        z_channels=3,
        embed=3,
        codes=8192,
        scale=1.0,
    )
    return {"unet": unet, "vae": vae}, 64


MODELS = {
    "tiny": lambda: _reduced((64, 128, 256), 16),
    "small": lambda: _reduced((128, 256, 512, 512), 32),
    "sd15": _sd15,
    "sdxl": _sdxl,
    "ldm4": _ldm4,
}


def subject(name: str, dtype: str) -> Subject:
    """The model of this name or config with random weights, or the one in this folder.

    Raises:
      ValueError: neither a name nor a config or a folder, or another trouble with it (see `from_pretrained`, `own`).
    """
    if name in MODELS:
        return random(name, *MODELS[name](), dtype)
    if not Path(name).exists():
        raise ValueError(
            f"there is no model {name!r}; the choices are {list(MODELS)}, the folder of a model, the work "
            "directory of a run, or a config file"
        )
    if name.endswith(".py") or (Path(name) / "config.json").is_file():
        return own(name, dtype)
    pipe = from_pretrained(name, dtype=dtype)
    side = inputs.image_size(pipe, None, None)[0] // pipe.factor
    noise = pipe.schedulers["scheduler"]
    given = (pipe.components, noise, side, pipe.latent_channels)
    return Subject(name, pipe.model, pipe.params, pipe.arrays, *given)


def own(name: str, dtype: str) -> Subject:
    """The model of a config file, with random weights, or of a run's work directory.

    Raises:
      ValueError: another type of computation than the config's, or the model cannot be built.
      FileNotFoundError: it needs an autoencoder that is not there.
    """
    pipe = build.untrained(name) if name.endswith(".py") else build.pipeline(name)
    computes = jnp.dtype(pipe.model.network.dtype).name
    if computes != dtype:
        raise ValueError(f"{name} computes in {computes}; say so: --dtype {computes}")
    row = {k: v[0] for k, v in build.conditions(name, pipe).items()}
    *space, channels = pipe.shape
    given = ({}, {}, space[0], channels, row)
    return Subject(name, pipe.model, pipe.params, pipe.arrays, *given)


def random(name: str, configs: Configs, side: int, dtype: str) -> Subject:
    """A model of these components, all of whose weights are drawn at a scale that keeps signals alive."""
    kinds = {
        part: config.get("_class_name") or config["architectures"][0]
        for part, config in configs.items()
    }
    made = {
        part: components.make(kinds[part], config, jnp.dtype(dtype))
        for part, config in configs.items()
    }
    noise = scheduler.to_config(scheduler.Noise())
    texts = [part for part in made if part.startswith("text_encoder")]
    rng = np.random.default_rng(0)
    tokenizers = {
        part.replace("text_encoder", "tokenizer"): (
            lambda rows, vocab=made[part].module.vocab: _ids(len(rows), vocab, rng)
        )
        for part in texts
    }
    if texts:
        model = assembly.assemble(made, tokenizers, {}, noise)
    else:
        path, target = scheduler.path_and_target(noise)
        into_tokens = conditioners.Vector(inputs.IMAGE, into="tokens", dtype=jnp.dtype(dtype))
        coder = codec.autoencoder(made["vae"].module)
        model = LatentDiffusion(made["unet"].module, into_tokens, coder, path, target)
    params = {part: drawn(component.shapes, dtype) for part, component in made.items()}
    encoders = assembly.encoders(model.conditioner, made)
    trained = {
        "network": params["unet"],
        "conditioner": {key: params[part] for key, part in encoders.items()},
    }
    arrays = {"params": params["vae"], "scale": jnp.float32(made["vae"].scale)}
    return Subject(name, model, trained, arrays, made, noise, side, made["vae"].module.embed)


def drawn(shapes: Params, dtype: str) -> Params:
    """Random parameters: normal by fan-in, scales of norms around one."""
    block = np.random.default_rng(0).standard_normal(2**20, np.float32)

    def draw(name, leaf):
        size = int(np.prod(leaf.shape))
        fan_in = size // leaf.shape[-1] if len(leaf.shape) > 1 else 25
        values = np.resize(block, size).reshape(leaf.shape) / np.sqrt(fan_in)
        return jax.device_put((values + name.endswith("scale")).astype(jnp.dtype(dtype)))

    return tree.map_named(draw, shapes)
