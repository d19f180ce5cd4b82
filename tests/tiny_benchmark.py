"""A Stable Diffusion for benchmarks that are to take no time: (configs, side of a latent)."""

from ldm_jax.measure import models
from ldm_jax.weights import original_configs

SMALLEST = (
    {
        "unet": original_configs.unet(
            channels=(4, 4), widths=(32,), blocks=1, depths=(0,), context=32, heads=2
        ),
        "vae": original_configs.autoencoder(
            **models.SD_VAE | dict(widths=(32,), blocks=1), scale=0.18215
        ),
        "text_encoder": dict(
            architectures=["CLIPTextModel"],
            eos_token_id=2,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=100,
        ),
    },
    8,
)
