"""The networks under the names of CompVis/latent-diffusion, Stability-AI/stablediffusion and generative-models.

Their checkpoints are single files in which each component has its prefix, and in which the blocks of a U-Net are
numbered through all levels: `input_blocks` on the way down, with the changes of resolution counted among them, and
`output_blocks` on the way up. So a table is a function of the network whose blocks it counts. The levels of an
autoencoder's decoder are numbered from the finest to the coarsest, ours in the order in which data passes them.

    tensors = files.read(path)  # or pickles.read
    found = recognise(tensors)
    parts = split(tensors, found.prefixes)
    network = their_unet.from_config(found.configs["unet"])
    params = table.load(unet(network), shapes, parts["unet"])

and `to_original` puts the components together again.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ldm_jax.models import clip as our_clip
from ldm_jax.models import controlnet as our_controlnet
from ldm_jax.models import text
from ldm_jax.models import unet as our_unet
from ldm_jax.weights import blocks
from ldm_jax.weights import clip as their_clip
from ldm_jax.weights.table import Layout, Mismatch, Row, Table, export, under

UNET = "model.diffusion_model."
VAE = "first_stage_model."
TEXT = "cond_stage_model."
CONTROL = "control_model."
# What such files have beside the weights of the components: averages and buffers of training, logits that nothing
# reads, and a depth estimator that is a component of no diffusion model.
BESIDE = (
    r"model_ema\..*",
    r"(betas|alphas_cumprod.*|(sqrt|log|posterior)_.*|lvlb_weights|logvar|scale_factor)",
    r"(v_pred|ztsnr|denoiser\..*)",
    r"(first_stage_model\.)?loss\..*",
    r"(low_scale_model|depth_model)\..*",
    r".*\.(position_ids|logit_scale|attn_mask)",
    r"cond_stage_model\.transformer\.to_logits\..*",
)

UNET_RES = (
    Row("norm1", "in_layers.0"),
    Row("conv1", "in_layers.2"),
    Row("emb", "emb_layers.1"),
    Row("norm2", "out_layers.0"),
    Row("conv2", "out_layers.3"),
    Row("skip", "skip_connection"),
)
VAE_RES = (
    *(Row(name, name) for name in ("norm1", "conv1", "norm2", "conv2")),
    Row("skip", "nin_shortcut"),
)
AS_CONV = Layout(ones=2)
VAE_ATTENTION = (
    Row("norm", "norm"),
    Row("attn/out", "proj_out", AS_CONV),
    Row("attn/{qkv}", "{qkv}", AS_CONV),
)

KEPT = Layout(keep=True)  # a matrix in our order
OPEN_CLIP_LAYERS = under(
    "layer_{i}",
    "transformer.resblocks.{i}",
    (
        Row("norm_attn", "ln_1"),
        *(
            Row(f"attn/{x}/{leaf}", f"attn.in_proj_{theirs}", Layout(part=i, of=3))
            for i, x in enumerate("qkv")
            for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
        ),
        Row("attn/out", "attn.out_proj"),
        Row("norm_ff", "ln_2"),
        Row("ff_in", "mlp.c_fc"),
        Row("ff_out", "mlp.c_proj"),
    ),
)


def plain_attention(heads: int) -> Table:
    """`AttentionBlock` with its legacy order: q, k and v of a head lie together."""
    return (
        Row("norm", "norm"),
        *(
            Row(f"attn/{x}", "qkv", Layout(ones=1, part=i, of=3, heads=heads))
            for i, x in enumerate("qkv")
        ),
        Row("attn/out", "proj_out", Layout(ones=1)),
    )


def unet(network: our_unet.UNet, prefix: str = UNET) -> Table:
    """`UNetModel`."""
    last = len(network.mults) - 1

    def attend(level):
        return blocks.TRANSFORMER if network.transformer else plain_attention(network._heads(level))

    def resampled(way, level, theirs, conv):
        name = f"{way}_{level}/{way}sample"
        return Row(f"{name}/conv", f"{theirs}.{conv}"), *under(name, theirs, UNET_RES)

    rows = [
        Row("time/in", "time_embed.0"),
        Row("time/out", "time_embed.2"),
        Row("vector/in", "label_emb.0.0"),
        Row("vector/out", "label_emb.0.2"),
        Row("vector", "label_emb"),  # of classes: a table
        Row("conv_in", "input_blocks.0.0"),
        *under("mid/res_0", "middle_block.0", UNET_RES),
        *under("mid/attn", "middle_block.1", attend(last)),
        *under("mid/res_1", f"middle_block.{2 if network.middle else 1}", UNET_RES),
        Row("norm_out", "out.0"),
        Row("conv_out", "out.2"),
    ]
    n = 1
    for i in range(last + 1):
        for j in range(network.blocks):
            rows += under(f"down_{i}/res_{j}", f"input_blocks.{n}.0", UNET_RES)
            rows += under(f"down_{i}/attn_{j}", f"input_blocks.{n}.1", attend(i))
            n += 1
        if i < last:
            rows += resampled("down", i, f"input_blocks.{n}.0", "op")
            n += 1
    n = 0
    for i in range(last + 1):
        level = last - i
        attends = bool(network._depths()[level])
        for j in range(network.blocks + 1):
            rows += under(f"up_{i}/res_{j}", f"output_blocks.{n}.0", UNET_RES)
            rows += under(f"up_{i}/attn_{j}", f"output_blocks.{n}.1", attend(level))
            n += 1
        # It is the last member of the level's last block.
        rows += resampled("up", i, f"output_blocks.{n - 1}.{1 + attends}", "conv")
    return _prefixed(prefix, rows)


def controlnet(network: our_controlnet.ControlNet, prefix: str = CONTROL) -> Table:
    """`ControlNet` of lllyasviel: a U-Net's way down, and the convolutions of its own."""
    hint = 2 * (len(network.hint) - 1)  # of the hint's convolutions, between the first and the last
    rows = [
        Row("hint/conv_in", "input_hint_block.0"),
        *(Row(f"hint/conv_{i}", f"input_hint_block.{2 * i + 2}") for i in range(hint)),
        Row("hint/conv_out", f"input_hint_block.{2 * hint + 2}"),
        Row("zero_mid", "middle_block_out.0"),
        Row("zero_{i}", "zero_convs.{i}.0"),
    ]
    return (*_prefixed(prefix, rows), *unet(network.unet, prefix))


def autoencoder(model: Any, prefix: str = VAE) -> Table:
    """`AutoencoderKL` and `VQModel`; all that is read of `model` is `mults`. The prefix of a file of its own is ""."""
    levels = len(model.mults)

    def half(name, way, number):
        rows = [
            Row("conv_in", "conv_in"),
            *under("mid/res_0", "mid.block_1", VAE_RES),
            *under("mid/attn", "mid.attn_1", VAE_ATTENTION),
            *under("mid/res_1", "mid.block_2", VAE_RES),
            Row("norm_out", "norm_out"),
            Row("conv_out", "conv_out"),
        ]
        for i in range(levels):
            theirs = f"{way}.{number(i)}"
            rows += under(f"{way}_{i}/res_{{j}}", f"{theirs}.block.{{j}}", VAE_RES)
            rows += under(f"{way}_{i}/attn_{{j}}", f"{theirs}.attn.{{j}}", VAE_ATTENTION)
            rows += [Row(f"{way}_{i}/{way}sample/conv", f"{theirs}.{way}sample.conv")]
        return under(name, name, rows)

    rows = (
        *half("encoder", "down", lambda i: i),
        *half("decoder", "up", lambda i: levels - 1 - i),
        Row("quant_conv", "quant_conv"),
        Row("post_quant_conv", "post_quant_conv"),
        Row("codebook", "quantize.embedding.weight"),
    )
    return _prefixed(prefix, rows)


def bert(model: text.TextTransformer, prefix: str = TEXT + "transformer.") -> Table:
    """`TransformerWrapper` of the text-to-image model with 1.45 B parameters, without its head."""
    rows = [
        Row("token", "token_emb"),
        Row("position", "pos_emb.emb.weight"),
        Row("norm", "norm"),
    ]
    for i in range(model.layers):
        attends, feeds = (f"attn_layers.layers.{n}" for n in (2 * i, 2 * i + 1))
        rows += [
            Row(f"layer_{i}/norm_attn", f"{attends}.0"),
            Row(f"layer_{i}/attn/{{x}}", f"{attends}.1.to_{{x}}"),
            Row(f"layer_{i}/norm_ff", f"{feeds}.0"),
            Row(f"layer_{i}/ff_in", f"{feeds}.1.net.0.0"),
            Row(f"layer_{i}/ff_out", f"{feeds}.1.net.2"),
        ]
    return _prefixed(prefix, rows)


def clip(prefix: str = TEXT + "transformer.") -> Table:
    """`FrozenCLIPEmbedder`: transformers' `CLIPTextModel` behind a prefix, in the first encoder of XL's files too."""
    return _prefixed(prefix, their_clip.text_table())


def open_clip(prefix: str = TEXT + "model.") -> Table:
    """`FrozenOpenCLIPEmbedder`: the text tower of open_clip, which keeps q, k and v in one tensor."""
    rows = (
        Row("token", "token_embedding"),
        Row("position", "positional_embedding"),
        *OPEN_CLIP_LAYERS,
        Row("norm", "ln_final"),
        Row("projection/kernel", "text_projection", KEPT),
    )
    return _prefixed(prefix, rows)


def open_clip_unused(model: our_clip.TextEncoder, prefix: str = TEXT + "model.") -> tuple[str, ...]:
    """What a file has of open_clip's tower and the encoder has not, for the `ignore` of `table.load`.

    Stable Diffusion 2 reads what enters the last of 24 layers and no projection: its encoder is built without them, as
    diffusers does, and a file that we write lacks them. Its own code builds the whole tower and asks for all of it.
    """
    last = rf"{re.escape(prefix)}transformer\.resblocks\.{model.layers}\..*"
    return (last,) if model.projection else (last, rf"{re.escape(prefix)}text_projection")


def _prefixed(prefix: str, rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(row._replace(theirs=prefix + row.theirs) for row in rows)


def split(
    tensors: Mapping[str, Any], prefixes: Mapping[str, str], ignore: Sequence[str] = ()
) -> dict[str, dict[str, Any]]:
    """The tensors of each component, under their whole names; of what is `BESIDE` them nothing is left.

    `prefixes` are those of the components, as `recognise` finds them. Give regexes of whole names to `ignore` to do
    without a component.

    Raises:
      Mismatch: tensors that no component claims.
    """
    beside = re.compile("|".join(f"(?:{pattern})" for pattern in (*BESIDE, *ignore)))
    kept = {name: tensor for name, tensor in tensors.items() if not beside.fullmatch(name)}
    parts = {
        component: {name: tensor for name, tensor in kept.items() if name.startswith(prefix)}
        for component, prefix in prefixes.items()
    }
    unclaimed = sorted(kept.keys() - {name for part in parts.values() for name in part})
    if unclaimed:
        raise Mismatch(
            f"{len(unclaimed)} tensors belong to none of {sorted(prefixes)}: {', '.join(unclaimed[:5])}"
            f"{', ...' if len(unclaimed) > 5 else ''}; give regexes of such names to `ignore` to do without them"
        )
    return parts


def averaged(tensors: Mapping[str, Any], prefix: str = UNET) -> dict[str, Any]:
    """The tensors with those of the U-Net replaced by their averages over training (`LitEma`), where a file has both.

    Raises:
      Mismatch: the file has no average of a tensor, as most published files.
    """
    inner = {
        name: f"model_ema.{name.removeprefix('model.').replace('.', '')}"
        for name in tensors
        if name.startswith(prefix)
    }
    absent = [average for average in inner.values() if average not in tensors]
    if absent or not inner:
        raise Mismatch(
            f"the file lacks {len(absent)} of {len(inner)} averages {absent[:1]}; load its weights without them"
        )
    return {name: tensors[inner.get(name, name)] for name in tensors}


def to_original(components: Iterable[tuple[Table, Any]]) -> dict[str, np.ndarray]:
    """The tensors of a single file, from the table and the parameters of each component; see `files.write`.

    Raises:
      Mismatch: a leaf without a row, or two components with the same name.
    """
    tensors: dict[str, np.ndarray] = {}
    for rows, params in components:
        part = export(rows, params)
        if both := sorted(tensors.keys() & part.keys()):
            raise Mismatch(f"two components have the tensor {both[0]!r}; give each its own prefix")
        tensors |= part
    return tensors
