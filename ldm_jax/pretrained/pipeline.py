"""A pretrained model with the user's verbs: words and images in, images out, one compiled program a shape.

Everything is a function of (params, inputs) that jit compiles once; prompts, seeds, guidance, and the values of the
grid are traced. `latents` may be given as arrays, so that any other implementation can be matched. Images are float32
[b, h, w, 3] in [-1, 1].
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ldm_jax.conditioners import Clip, ClipPair
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import (
    adapters,
    assembly,
    edits,
    explain,
    guides,
    inputs,
    large,
    painting,
    sampling,
    save,
    upscaling,
    variations,
    verbs,
    words,
)
from ldm_jax.pretrained.components import Component
from ldm_jax.types import Cond, Params
from ldm_jax.weights import prompts


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """A model, its parameters, and what turns words into conditions; its fields are open to the user."""

    model: LatentDiffusion
    params: Params  # {"network": ..., "conditioner": ..., "controls": one tree a ControlNet}
    arrays: Params  # of the codec
    components: Mapping[str, Component]
    tokenizers: Mapping[str, prompts.Tokenizer]
    index: Mapping[str, Any]  # model_index.json
    schedulers: Mapping[str, Mapping[str, Any]]  # their configs: "scheduler", "low_res_scheduler"
    mesh: Mesh
    controlnets: tuple[Component, ...] = ()
    chunks: int | None = 1  # of 75 tokens each that are read of a prompt; None: as many as it has
    weighted: bool = False  # whether brackets in prompts are weights
    combined: bool = False  # whether AND and BLEND in prompts combine several
    vision: Params = dataclasses.field(default_factory=dict)  # of components that read images
    processors: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    tiling: tuple[int, int] | None = None  # see `with_tiles`
    wrap: tuple[bool, bool] = (False, False)  # see `seamless`
    guide: guides.Guide = guides.PLAIN  # see `guiding`
    spacing: tuple[str, Mapping[str, Any]] | None = None  # see `on_grid`
    # of solvers, by their names, see `solving`
    options: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def factor(self) -> int:
        """Pixels of an image for one position of a latent, along each axis."""
        return self.components["vae"].module.factor

    @property
    def latent_channels(self) -> int:
        return self.components["vae"].module.embed

    def component_params(self) -> dict[str, Params]:
        """The parameters of each component."""
        texts = assembly.encoders(self.model.conditioner, self.components)
        condition = self.params.get("conditioner", {})
        found = {"unet": self.params["network"], "vae": self.arrays["params"], **self.vision}
        return found | {name: condition[key] for key, name in texts.items()}

    def with_params(self, changed: Mapping[str, Params]) -> "Pretrained":
        """The same with other parameters of some components, {component: params}."""
        every = self.component_params() | dict(changed)
        texts = assembly.encoders(self.model.conditioner, self.components)
        params = self.params | {"network": every["unet"]}
        if texts:
            params["conditioner"] = {key: every[name] for key, name in texts.items()}
        arrays = self.arrays | {"params": every["vae"]}
        vision = {name: every[name] for name in self.vision}
        return dataclasses.replace(self, params=params, arrays=arrays, vision=vision)

    def tokenize(self, texts: inputs.Prompts) -> Any:
        """Token ids int32 [b, 77]; a tuple of them where the model has two tokenizers."""
        found = inputs.ids(self, inputs.several(texts))
        rows = tuple(row for field, row in found.items() if not field.endswith("_weights"))
        return rows[0] if len(rows) == 1 else rows

    def encode_text(self, texts: inputs.Prompts, **sizes: Any) -> Cond:
        """What the network reads of the texts; for XL `sizes` as in `text_to_image`."""
        batch = inputs.batch(self, inputs.several(texts), **sizes)
        return sampling.condition(self.model)(self.params, batch)

    def encode(self, images: Float[Any, "b h w 3"]) -> Array:
        """Images -> latents, the mean of the posterior times the model's scale [b, h/f, w/f, c].

        Raises:
          ValueError: images of another shape, or that the autoencoder's factor does not divide.
        """
        inputs.check_images(images, self.factor)
        module = self.components["vae"].module
        encode = sampling.encode(self.model, module, self.tiling, self.wrap)
        return encode(self.arrays, inputs.place(self, images))

    def decode(self, latents: Float[Any, "b h w c"]) -> Float[np.ndarray, "b hf wf 3"]:
        """Scaled latents -> images."""
        return np.asarray(sampling.decode(self.model)(self.arrays, inputs.place(self, latents)))

    def predict(
        self, latents: Float[Any, "b h w c"], timestep: Any, cond: Cond
    ) -> Float[Array, "b h w k"]:
        """The network's output at integer timesteps (one, or one a sample), as the reference's U-Net gives it."""
        latents = jnp.asarray(latents)
        t = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), latents.shape[:1])
        return sampling.predict(self.model)(self.params, latents, t, cond)

    def reading(
        self,
        chunks: int | None = 1,
        weighted: bool = False,
        clip_skip: int = 0,
        combined: bool = False,
    ) -> "Pretrained":
        """The same with another way to read prompts.

        Args:
          chunks: a prompt is read in so many chunks of 75 tokens, one after the other (None: as many as it has).
          weighted: "(word:1.3)", "(word)" and "[word]" weigh words (see `weights.prompts`), else brackets are brackets.
          clip_skip: so many of the text encoders' last layers are left out, beyond those that the model leaves out.
          combined: prompts with AND or BLEND between them make one picture, "a cat AND a dog:0.5", see `combined`.
        """
        conditioner = self.model.conditioner
        of_clip = isinstance(conditioner, Clip | ClipPair)
        if not of_clip and (chunks != 1 or weighted or clip_skip):
            raise ValueError("only prompts for text encoders of CLIP can be read in other ways")
        if of_clip:
            conditioner = conditioner.clone(skip=type(conditioner).skip + clip_skip)
        model = self.model._replace(conditioner=conditioner)
        read = dict(chunks=chunks, weighted=weighted, combined=combined)
        return dataclasses.replace(self, model=model, **read)

    def encode_image(self, images: Float[Any, "b h w c"]) -> Float[Array, "b d"]:
        """What a model for variations sees of images of any size.

        Raises:
          ValueError: a model without an image encoder, or other than three channels.
        """
        return variations.encode_image(self, images)

    text_to_image = verbs.text_to_image
    explain = explain.explain
    unconditional = verbs.unconditional
    variations = variations.variations
    image_to_image = verbs.image_to_image
    depth_to_image = verbs.depth_to_image
    inpaint = painting.inpaint
    outpaint = painting.outpaint
    invert = edits.invert
    edit = edits.edit
    diffedit = edits.diffedit
    prompt_to_prompt = words.prompt_to_prompt
    interpolate = edits.interpolate
    panorama = large.panorama
    high_resolution = large.high_resolution
    with_tiles = large.with_tiles
    seamless = large.seamless
    instruct = verbs.instruct
    upscale = upscaling.upscale
    super_resolution = upscaling.super_resolution

    guiding = guides.guiding
    on_grid = guides.on_grid
    solving = guides.solving

    with_lora = adapters.with_lora
    with_word = adapters.with_word
    with_autoencoder = adapters.with_autoencoder

    def save_pretrained(
        self, path: str | Path, layout: Literal["diffusers", "original"] = "diffusers"
    ) -> None:
        """Writes a folder that diffusers loads, or a single file in the original layout, in the types of the params.

        Raises:
          ValueError: an unknown layout, or something is there already; nothing was written.
        """
        kinds = {"diffusers": save.save, "original": save.save_original}
        if layout not in kinds:
            raise ValueError(f"there is no layout {layout!r}; the choices are {sorted(kinds)}")
        kinds[layout](self, path)
