"""How good pictures are: feature networks, sets of pictures, and the figures that `ldm_jax.evaluate` reports."""
