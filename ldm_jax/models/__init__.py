"""The networks: each a Linen module that knows no mesh, config, loss or sampler."""
