"""A new decoder for the latents of a trained f8 KL autoencoder; its encoder keeps its bits, and so models of them fit.

    python train.py --config configs/kl_f8_decoder.py --workdir runs/kl_f8_decoder --config.start.run=runs/kl_f8

As Stable Diffusion's ft-EMA and ft-MSE decoders were made of kl-f8. All else as in configs/kl_f8.py, with the
discriminator from the first step: it is taken over, too. Of a VQ autoencoder "gen/codebook" is frozen as well.
"""

from configs import kl_f8


def get_config():
    c = kl_f8.get_config()
    c.steps = 50_000
    c.start = dict(run="runs/kl_f8")
    c.objective.disc_start = 0
    c.optimizer.frozen = ("gen/encoder/.*", "gen/quant_conv/.*")
    return c
