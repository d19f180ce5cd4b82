"""Conditioners turn named fields of a batch into what a network is conditioned on.

    conditioner(batch, drop) -> Cond

`drop` says for each field which rows lose it: `{field: Bool[b]}`, where a field without an entry is
kept. Training drops at random (`draw_drops`), and classifier-free guidance compares with all fields
dropped (`drop_all`): one definition of the null condition serves both (Ho & Salimans 2022). What a
dropped row becomes is the conditioner's choice: the empty prompt, the class beyond the last one,
zeros.
"""

from ldm_jax.conditioners.clip import Clip, ClipPair, state_names
from ldm_jax.conditioners.combine import Combine, counted
from ldm_jax.conditioners.drops import draw_drops, drop_all
from ldm_jax.conditioners.fields import Label, Spatial, Tokens, Vector
from ldm_jax.conditioners.learned_text import Text

__all__ = [
    "Clip",
    "ClipPair",
    "Combine",
    "Label",
    "Spatial",
    "Text",
    "Tokens",
    "Vector",
    "counted",
    "draw_drops",
    "drop_all",
    "state_names",
]
