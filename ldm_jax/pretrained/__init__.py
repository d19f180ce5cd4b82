"""Stable-Diffusion-class models: loaded from published weights, used, and saved again.

pipe = from_pretrained("path/to/stable-diffusion-v1-5", dtype="bfloat16")
images = pipe.text_to_image("a cat", steps=50, guidance=7.5)
"""

from ldm_jax.pretrained.load import from_pretrained
from ldm_jax.pretrained.pipeline import Pretrained

__all__ = ["Pretrained", "from_pretrained"]
