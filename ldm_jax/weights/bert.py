"""The text encoder of latent diffusion's text-to-image model under diffusers' names, `LDMBertModel`.

Theirs has a head that predicts tokens, which nothing reads: it is not loaded, and what we write has none.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from ldm_jax.models import text
from ldm_jax.weights import clip, configs
from ldm_jax.weights.table import Row, Table, under

IGNORED = (r"to_logits\..*",)  # the head: an `ignore` of `table.load`
ROWS = (
    Row("token", "embed_tokens"),
    Row("position", "embed_positions.weight"),
    Row("norm", "layer_norm"),
    *under(
        "layer_{i}",
        "layers.{i}",
        (
            Row("norm_attn", "self_attn_layer_norm"),
            Row("attn/{x}", "self_attn.{x}_proj"),
            Row("norm_ff", "final_layer_norm"),
            Row("ff_in", "fc1"),
            Row("ff_out", "fc2"),
        ),
    ),
)
TAKES = dict(
    vocab_size=30522,
    max_position_embeddings=77,
    encoder_layers=32,
    encoder_ffn_dim=5120,
    encoder_attention_heads=8,
    head_dim=64,
    d_model=1280,
)
ONLY = dict(activation_function=("gelu",), model_type=("ldmbert",))
IDLE = (  # of training, and what their encoder has and does not read
    *clip.IDLE,
    "activation_dropout",
    "architectures",
    "attention_dropout",
    "classifier_dropout",
    "dropout",
    "encoder_layerdrop",
    "eos_token_id",
    "init_std",
    "num_hidden_layers",
    "scale_embedding",
    "use_cache",
)


def table() -> Table:
    """`models.text.TextTransformer`."""
    return tuple(row._replace(theirs=f"model.{row.theirs}") for row in ROWS)


def from_config(config: Mapping[str, Any], dtype: Any = jnp.float32) -> text.TextTransformer:
    """The encoder of an `LDMBertModel`'s config.

    Raises:
      ValueError: the config asks for what we lack.
    """
    c = configs.read(config, "LDMBertModel", TAKES, ONLY, IDLE)
    if c["encoder_ffn_dim"] != 4 * c["d_model"]:
        raise ValueError(
            f"the config of this LDMBertModel has encoder_ffn_dim={c['encoder_ffn_dim']} and d_model={c['d_model']}; "
            "we have four times the width only, so such a model cannot be loaded"
        )
    return text.TextTransformer(
        vocab=c["vocab_size"],
        width=c["d_model"],
        layers=c["encoder_layers"],
        length=c["max_position_embeddings"],
        heads=c["encoder_attention_heads"],
        head_dim=c["head_dim"],
        dtype=dtype,
    )


def to_config(model: text.TextTransformer) -> dict[str, Any]:
    """The `config.json` from which diffusers builds the same encoder."""
    return dict(
        architectures=["LDMBertModel"],
        model_type="ldmbert",
        vocab_size=model.vocab,
        d_model=model.width,
        encoder_layers=model.layers,
        encoder_ffn_dim=4 * model.width,
        encoder_attention_heads=model.heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.length,
        activation_function="gelu",
    )
