"""A pretrained model with the user's verbs: words and images in, images out, one compiled program a shape.

Everything is a function of (params, inputs) that jit compiles once; prompts, seeds, guidance, and the values of the grid
are traced. `latents` may be given as arrays, so that any other implementation can be matched. Images are float32
[b, h, w, 3] in [-1, 1].
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ldm_jax.diffusion import process, samplers
from ldm_jax.latent_diffusion import LatentDiffusion
from ldm_jax.pretrained import sampling
from ldm_jax.pretrained.components import Component
from ldm_jax.training import sharding
from ldm_jax.types import Cond, Params
from ldm_jax.weights import prompts, scheduler, unet

Images = Float[np.ndarray, "b h w 3"]
Prompts = str | Sequence[str]

MASK_AT = 0.5  # from here on a mask means: paint here
MAX_NOISE_LEVEL = 350  # of the x4 upscaler's low-resolution image


@dataclass(frozen=True)
class Pretrained:
    """A model, its parameters, and what turns words into conditions."""

    model: LatentDiffusion
    params: Params  # {"network": ..., "conditioner": ...}
    arrays: Params  # of the codec
    components: Mapping[str, Component]
    tokenizers: Mapping[str, prompts.Tokenizer]
    index: Mapping[str, Any]  # model_index.json
    schedulers: Mapping[str, Mapping[str, Any]]  # their configs: "scheduler", "low_res_scheduler"
    mesh: Mesh

    # --- the parts

    @property
    def factor(self) -> int:
        """Pixels of an image for one position of a latent, along each axis."""
        return self.components["vae"].module.factor

    @property
    def latent_channels(self) -> int:
        return self.components["vae"].module.embed

    def tokenize(self, texts: Prompts) -> Any:
        """Token ids int32 [b, 77]; a tuple of them where the model has two tokenizers."""
        rows = tuple(self._ids(texts).values())
        return rows[0] if len(rows) == 1 else rows

    def encode_text(self, texts: Prompts, **sizes: Any) -> Cond:
        """What the network reads of the texts; for XL `sizes` as in `text_to_image`."""
        batch = self._batch(_several(texts), **sizes)
        return sampling.condition(self.model)(self.params, batch)

    def encode(self, images: Images) -> Array:
        """Images -> latents, the mean of the posterior times the model's scale [b, h/f, w/f, c]."""
        self._check_images(images)
        return sampling.encode(self.model, self.components["vae"].module)(
            self.arrays, self._place(images)
        )

    def decode(self, latents: Any) -> np.ndarray:
        """Scaled latents -> images."""
        return np.asarray(sampling.decode(self.model)(self.arrays, self._place(latents)))

    def predict(self, latents: Any, timestep: Any, cond: Cond) -> Array:
        """The network's output at integer timesteps (one, or one a sample), as the reference's U-Net gives it."""
        latents = jnp.asarray(latents)
        t = jnp.broadcast_to(jnp.asarray(timestep, jnp.float32), latents.shape[:1])
        return sampling.predict(self.model)(self.params, latents, t, cond)

    def component_params(self) -> dict[str, Params]:
        """The parameters of each component."""
        texts = [name for name in self.components if name.startswith("text_encoder")]
        condition = self.params.get("conditioner", {})
        keys = (
            ["encoder"] if "encoder" in condition else [f"encoders_{i}" for i in range(len(texts))]
        )
        found = {"unet": self.params["network"], "vae": self.arrays["params"]}
        return found | {name: condition[key] for name, key in zip(texts, keys, strict=True)}

    # --- verbs

    def text_to_image(
        self,
        prompt: Prompts,
        negative_prompt: Prompts | None = None,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
        height: int | None = None,
        width: int | None = None,
        **sizes: Any,
    ) -> np.ndarray:
        """Pictures of prompts, each with its own seed: `seed`, `seed` + 1 ...

        Args:
          negative_prompt: what guidance leads away from; None: the model's own empty prompt.
          guidance: scale of classifier-free guidance; 1 is none.
          latents: standard normal noise [b, h/f, w/f, c] in place of that of the seeds.
          sizes: of XL: `original_size`, `crop`, `target_size` (each (height, width), or (top, left)), `aesthetic_score`
            of the refiner; by default the image's own size, uncropped.

        Raises:
          ValueError: a size that the factor does not divide, texts and latents of different number, an unknown solver.
        """
        self._only("text_to_image", 0)
        height, width = self._size(height, width, latents)
        texts = _several(prompt)
        start = self._start(latents, texts, seed, (height, width))
        points = self._points(steps)
        conditions = self._conditions(texts, negative_prompt, (height, width), sizes)
        return self._draw(start, points, conditions, solver, guidance, seed)

    def image_to_image(
        self,
        prompt: Prompts,
        images: Images,
        negative_prompt: Prompts | None = None,
        *,
        strength: float = 0.8,
        steps: int = 50,
        guidance: float = 7.5,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
        **sizes: Any,
    ) -> np.ndarray:
        """Pictures after other pictures: these, noised to the level of `strength` in (0, 1], and denoised by the prompt.

        Of `steps` the last strength * steps are taken. Other arguments as in `text_to_image`.

        Raises:
          ValueError: a strength outside of (0, 1], or prompts and images of different number.
        """
        self._only("image_to_image", 0)
        return self._after(
            prompt,
            images,
            negative_prompt,
            {},
            strength,
            steps,
            guidance,
            solver,
            seed,
            latents,
            sizes,
        )

    def depth_to_image(
        self,
        prompt: Prompts,
        images: Images,
        depth: Float[np.ndarray, "b h w"],
        negative_prompt: Prompts | None = None,
        *,
        strength: float = 0.8,
        steps: int = 50,
        guidance: float = 7.5,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
    ) -> np.ndarray:
        """`image_to_image` of a model that keeps the depth [b, h, w] (larger is nearer, any scale) of the images."""
        self._only("depth_to_image", 1)
        texts = _several(prompt)
        _same_number(texts, depth, "depth maps")
        space = tuple(n // self.factor for n in images.shape[1:3])
        small = jax.image.resize(jnp.asarray(depth), (len(texts), *space), "cubic", antialias=False)
        low, high = (f(small, axis=(1, 2), keepdims=True) for f in (jnp.min, jnp.max))
        scaled = 2 * (small - low) / jnp.maximum(high - low, 1e-8) - 1
        extra = {"spatial": scaled[..., None]}
        return self._after(
            texts,
            images,
            negative_prompt,
            extra,
            strength,
            steps,
            guidance,
            solver,
            seed,
            latents,
            {},
        )

    def inpaint(
        self,
        prompt: Prompts,
        images: Images,
        masks: Float[np.ndarray, "b h w"],
        negative_prompt: Prompts | None = None,
        *,
        steps: int = 50,
        guidance: float = 7.5,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
        **sizes: Any,
    ) -> np.ndarray:
        """New contents where the masks [b, h, w] are 1, by a model that was trained for it (9 channels).

        Where they are 0 the images are kept up to what the autoencoder loses.

        Raises:
          ValueError: another model, masks of another size or number than the images.
        """
        self._only("inpaint", 1 + self.latent_channels)
        texts = _several(prompt)
        if masks.shape != images.shape[:3]:
            raise ValueError(
                f"masks of shape {masks.shape} do not fit images of shape {images.shape}; give [b, h, w] of the same size"
            )
        _same_number(texts, images, "images")
        hole = (np.asarray(masks) >= MASK_AT).astype(np.float32)[..., None]
        masked = self.encode(np.where(hole > 0, 0, images).astype(np.float32))
        # Nearest: the first pixel of each block, as in the reference.
        small = jnp.asarray(hole[:, :: self.factor, :: self.factor])
        extra = {"spatial": jnp.concatenate([small, masked], axis=-1)}
        start = self._start(latents, texts, seed, images.shape[1:3])
        conditions = self._conditions(texts, negative_prompt, images.shape[1:3], sizes, extra)
        return self._draw(start, self._points(steps), conditions, solver, guidance, seed)

    def instruct(
        self,
        prompt: Prompts,
        images: Images,
        negative_prompt: Prompts | None = None,
        *,
        steps: int = 100,
        guidance: float = 7.5,
        image_guidance: float = 1.5,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
    ) -> np.ndarray:
        """The images, changed as the prompts tell (Brooks et al. 2023, InstructPix2Pix; 8 channels).

        `guidance` follows the text, `image_guidance` the image (their eq. 3).
        """
        self._only("instruct", self.latent_channels)
        texts = _several(prompt)
        _same_number(texts, images, "images")
        shown = self.encode(images) / self.arrays["scale"]  # here latents are not scaled
        conditions = self._conditions(
            texts, negative_prompt, images.shape[1:3], {}, {"spatial": shown}
        )
        start = self._start(latents, texts, seed, images.shape[1:3])
        return self._draw(
            start, self._points(steps), conditions, solver, guidance, seed, image_guidance
        )

    def upscale(
        self,
        prompt: Prompts,
        images: Images,
        negative_prompt: Prompts | None = None,
        *,
        noise_level: int = 20,
        steps: int = 75,
        guidance: float = 9.0,
        solver: str = "ddim",
        seed: int = 0,
        latents: Any = None,
        noise: Any = None,
    ) -> np.ndarray:
        """Images four times as large, by the x4 upscaler; `noise_level` in [0, 350] is the noise added to the small ones.

        `noise`, of the images' shape, is in place of the seeds'. Small images lie on the grid of the latents.
        """
        self._only("upscale", 3)
        texts = _several(prompt)
        _same_number(texts, images, "images")
        if not 0 <= noise_level <= MAX_NOISE_LEVEL:
            raise ValueError(f"noise_level={noise_level} is outside of 0 to {MAX_NOISE_LEVEL}")
        network = self.components["unet"].module
        path, _ = scheduler.path_and_target(self.schedulers["low_res_scheduler"])
        if noise is None:
            keys = jax.random.split(jax.random.key(seed), 2)[1]
            noise = samplers.noise(jax.random.split(keys, len(texts)), images.shape)
        level = jnp.full((len(texts),), noise_level / (path.steps - 1))
        small = process.add_noise(path, jnp.asarray(images), jnp.asarray(noise), level)
        row = jax.nn.one_hot(jnp.full((len(texts),), noise_level), network.vector)
        large = tuple(n * self.factor for n in images.shape[1:3])
        conditions = self._conditions(
            texts, negative_prompt, large, {}, {"spatial": small, "vector": row}
        )
        start = self._start(latents, texts, seed, large)
        return self._draw(start, self._points(steps), conditions, solver, guidance, seed)

    def save_pretrained(self, path: Any) -> None:
        """Writes a folder that diffusers loads, with the tensors in the types that they have here."""
        from ldm_jax.pretrained.save import save

        save(self, path)

    # --- what the verbs share

    def _after(
        self, prompt, images, negative, extra, strength, steps, scale, solver, seed, latents, sizes
    ):
        texts = _several(prompt)
        _same_number(texts, images, "images")
        if not 0 < strength <= 1:
            raise ValueError(
                f"strength={strength} must be above 0 (the image as it is) and at most 1"
            )
        points = self._points(steps)
        skipped = steps - min(int(steps * strength), steps)
        if skipped == steps:
            raise ValueError(f"strength={strength} of {steps} steps is none; give more of either")
        points = process.Point(*(a[skipped:] for a in points))
        noise = self._noise(latents, texts, seed, images.shape[1:3])
        first = process.Point(*(a[0] for a in points))
        start = first.alpha * self.encode(images) + first.sigma * noise
        conditions = self._conditions(texts, negative, images.shape[1:3], sizes, extra)
        return self._draw(start, points, conditions, solver, scale, seed)

    def _draw(self, start, points, conditions, solver, scale, seed, image_scale=None):
        batch, negative, extra = conditions
        if solver not in sampling.SOLVERS:
            raise ValueError(
                f"there is no solver {solver!r}; the choices are {list(sampling.SOLVERS)}"
            )
        sampler = sampling.sampler(
            self.model, solver, scale != 1.0, negative is None, image_scale is not None
        )
        keys = sampling.keys(seed, len(start))
        scales = (jnp.float32(scale), jnp.float32(1.0 if image_scale is None else image_scale))
        placed = [
            self._place(tree) for tree in (batch, batch if negative is None else negative, extra)
        ]
        return np.asarray(
            sampler(self.params, self.arrays, *placed, self._place(start), keys, points, scales)
        )

    def _points(self, steps: int) -> process.Point:
        config = self.schedulers["scheduler"]
        to_zero = bool(config.get("set_alpha_to_one", True))
        return samplers.grid(self.model.path, steps, scheduler.read(config).spacing, to_zero)

    def _size(self, height, width, latents) -> tuple[int, int]:
        if latents is not None and height is None and width is None:
            height, width = (n * self.factor for n in latents.shape[1:3])
        default = self.components["unet"].config.get("sample_size", 64)
        default = default if isinstance(default, int) else default[0]
        return height or default * self.factor, width or default * self.factor

    def _noise(self, latents, texts, seed, size) -> Array:
        """The noise [b, h/f, w/f, c] for images of this size: given, or that of the seeds."""
        if any(n % self.factor for n in size):
            raise ValueError(
                f"images of {tuple(size)} cannot be made: the autoencoder's factor {self.factor} must divide both"
            )
        shape = (len(texts), *(n // self.factor for n in size), self.latent_channels)
        if latents is None:
            return samplers.noise(sampling.keys(seed, len(texts)), shape)
        if latents.shape != shape:
            raise ValueError(f"latents of shape {latents.shape} were given; {shape} is needed")
        return jnp.asarray(latents)

    def _start(self, latents, texts, seed, size) -> Array:
        first = jnp.float32(self.model.path.t_max)
        scale = jnp.hypot(self.model.path.alpha(first), self.model.path.sigma(first))
        return scale * self._noise(latents, texts, seed, size)

    def _conditions(self, texts, negative, size, sizes, extra=None):
        """The batch of the prompts, that of the negative ones (None: the model's null), and what else is read."""
        batch = self._batch(texts, size=size, **sizes)
        if negative is not None:
            negative = _several(negative)
            negative = negative * len(texts) if len(negative) == 1 else negative
            _same_number(texts, negative, "negative prompts")
            negative = self._batch(negative, size=size, **sizes)
        return batch, negative, extra or {}

    def _ids(self, texts: Prompts) -> dict[str, Int[np.ndarray, "b n"]]:
        if not self.tokenizers:
            raise ValueError("this model reads no text")
        for text in _several(texts):
            for name, tokenizer in self.tokenizers.items():
                if left := tokenizer.cut(text):
                    logging.warning("the prompt is too long for the %s, which cuts %r", name, left)
        return {
            name.replace("tokenizer", "tokens"): tokenizer(_several(texts))
            for name, tokenizer in self.tokenizers.items()
        }

    def _batch(
        self,
        texts: Sequence[str],
        size: tuple[int, int] | None = None,
        original_size: tuple[int, int] | None = None,
        crop: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        aesthetic_score: float = 6.0,
    ) -> dict[str, Any]:
        """The fields that the conditioner reads."""
        batch: dict[str, Any] = self._ids(texts)
        if "sizes" in self.model.fields:
            size = self._size(None, None, None) if size is None else size
            last = (
                (aesthetic_score,)
                if self.index.get("requires_aesthetics_score")
                else target_size or size
            )
            row = np.array([*(original_size or size), *crop, *last], np.float32)
            batch["sizes"] = np.tile(row, (len(texts), 1))
        return {k: v for k, v in batch.items() if k in self.model.fields}

    def _only(self, verb: str, spatial: int) -> None:
        """Raises ValueError unless the network reads so many channels beside the latents."""
        reads = unet.channels(self.components["unet"].config).spatial
        if reads != spatial:
            fits = {0: "text_to_image or image_to_image", 1: "depth_to_image", 3: "upscale"}
            fits |= {self.latent_channels: "instruct", self.latent_channels + 1: "inpaint"}
            raise ValueError(
                f"this model reads {reads} channels beside the latents and {verb} gives {spatial}; "
                f"it is a model for {fits.get(reads, 'none of the verbs')}"
            )

    def _check_images(self, images) -> None:
        if (
            images.ndim != 4
            or images.shape[-1] != 3
            or any(n % self.factor for n in images.shape[1:3])
        ):
            raise ValueError(
                f"images of shape {images.shape} cannot be encoded; give [b, h, w, 3] with a height and width that the "
                f"autoencoder's factor {self.factor} divides"
            )

    def _place(self, arrays: Any) -> Any:
        """Spread over the mesh where the batch divides, else copied to all of it."""

        def put(x):
            ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            even = x.ndim and x.shape[0] % ways == 0
            where = sharding.batch_layout(self.mesh) if even else sharding.replicated(self.mesh)
            return jax.device_put(x, where)

        return jax.tree.map(put, arrays)


def _several(texts: Prompts) -> list[str]:
    return [texts] if isinstance(texts, str) else list(texts)


def _same_number(texts: Sequence[str], others: Any, what: str) -> None:
    if len(texts) != len(others):
        raise ValueError(f"{len(texts)} prompts and {len(others)} {what}; give as many of both")
