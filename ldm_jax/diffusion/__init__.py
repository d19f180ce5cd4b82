"""The mathematics of diffusion, on functions: no network is known here. See `docs/math.md`."""
