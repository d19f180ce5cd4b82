"""Which model an original checkpoint is, from the names and shapes of its tensors alone.

Widths, depths and channels can be counted and measured. What cannot, comes from the published families, which the width
of the U-Net and of its tokens tell apart: the number of heads, the scale of latents, the noise of training, and what is
predicted. The last is only a guess for Stable Diffusion 2, whose base model predicts ε and whose 768 model, of the same
shapes, v: as diffusers we take v, unless a mask or a depth joins the input, which only descendants of the base model
have. Whatever is guessed, or not known at all, a `config` says.
"""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.weights import original, original_configs

V = "v_prediction"


class Family(NamedTuple):
    """What the shapes of a published family do not tell."""

    name: str
    heads: int | None = None  # of attention at every level, or ...
    head_dim: int | None = None  # ... the width of each
    scale: float = 0.18215  # latents are multiplied by it
    noise: tuple[float, float] = (0.00085, 0.012)  # the first and the last beta
    prediction: str = "epsilon"


# By the width of the tokens (None: no cross-attention) and of the U-Net's first level.
FAMILIES = {
    (768, 320): Family("stable-diffusion-1", heads=8),
    (1024, 320): Family("stable-diffusion-2", head_dim=64, prediction=V),
    (1024, 256): Family(
        "stable-diffusion-2-upscaler", heads=8, scale=0.08333, noise=(1e-4, 0.02), prediction=V
    ),
    (2048, 320): Family("stable-diffusion-xl", head_dim=64, scale=0.13025),
    (1280, 384): Family("stable-diffusion-xl-refiner", head_dim=64, scale=0.13025),
    (1280, 320): Family("ldm-text", heads=8),
    # CelebA-HQ, FFHQ and LSUN bedrooms.
    (None, 224): Family("ldm-unconditional", head_dim=32, scale=1.0, noise=(0.0015, 0.0195)),
}
VARIANTS = {9: "inpainting", 8: "instruct", 5: "depth"}  # by the channels that a U-Net reads
VAE_ONLY = "autoencoder"
OTHER = "other"  # a U-Net of no published family, which a config describes


class Recognised(NamedTuple):
    """A checkpoint's family ("stable-diffusion-2-inpainting"), and of each component the config and the prefix.

    Keys of `configs`: unet, vae, text_encoder, text_encoder_2 (that of XL with a projection), scheduler.
    """

    family: str
    configs: dict[str, dict[str, Any]]
    prefixes: dict[str, str]


class Part:
    """The shapes of a component, and what its blocks are numbered to."""

    def __init__(self, tensors: Mapping[str, Any], prefix: str):
        n = len(prefix)
        self.shapes = {
            name[n:]: tuple(t.shape) for name, t in tensors.items() if name.startswith(prefix)
        }

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise ValueError(
                f"the checkpoint has no tensor {name!r} where the layout of its other tensors has one; it is cut off, "
                "or of a kind that is not known here"
            )
        return self.shapes[name]

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def count(self, stem: str) -> int:
        """Of how many the name is `stem` and a number: the numbers run from 0."""
        pattern = re.compile(re.escape(stem) + r"\.(\d+)\..*")
        found = {int(m[1]) for name in self.shapes if (m := pattern.fullmatch(name))}
        if found != set(range(len(found))):
            raise ValueError(f"of {stem!r} the checkpoint has the numbers {sorted(found)} only")
        return len(found)


def recognise(
    tensors: Mapping[str, Any], config: Mapping[str, Mapping[str, Any]] = {}
) -> Recognised:
    """What the tensors, of which nothing but names and shapes is read, are the weights of.

    `config` has settings for each component that go before what is recognised, in diffusers' words: for example
    {"scheduler": {"prediction_type": "epsilon"}}, or all that `original_yaml.from_yaml` finds. A file of an
    autoencoder alone does not tell the scale of its latents; then its config has none.

    Raises:
      ValueError: no original checkpoint, or one whose shapes do not tell all that must be known.
    """
    if any(name in tensors for name in ("edm_mean", "edm_std", "edm_vpred.sigma_max")):
        raise ValueError(
            "this is a model of Karras et al.'s noise (edm_mean, or edm_vpred), which we cannot load"
        )
    prefixes = {
        name: prefix
        for name, prefix, mark in (
            ("unet", original.UNET, "input_blocks.0.0.weight"),
            ("vae", original.VAE, "encoder.conv_in.weight"),
            ("vae", "", "encoder.conv_in.weight"),
        )
        if prefix + mark in tensors
    }
    if not prefixes:
        some = ", ".join(sorted(tensors)[:3])
        raise ValueError(
            f"these are no tensors of an original checkpoint ({some}, ...); expected names like "
            f"'{original.UNET}input_blocks.0.0.weight' or '{original.VAE}encoder.conv_in.weight'"
        )
    texts = _texts(tensors)
    prefixes |= {name: prefix for name, (prefix, _) in texts.items()}
    found = {name: text for name, (_, text) in texts.items()}
    family, scale = VAE_ONLY, None
    if "unet" in prefixes:
        known, settings = unet(Part(tensors, prefixes["unet"]), tensors)
        family, scale = known.name, None if known.name == OTHER else known.scale
        found["unet"] = with_heads(settings, known, config.get("unet", {}))
        found["scheduler"] = original_configs.scheduler(
            *known.noise,
            V if "v_pred" in tensors else known.prediction,
            zero_snr="ztsnr" in tensors,
        )
    if "vae" in prefixes:
        found["vae"] = _autoencoder(Part(tensors, prefixes["vae"]), scale)
        if family.startswith("stable-diffusion-xl"):
            found["vae"]["force_upcast"] = True
    asked = {name: config[name] for name in found.keys() & config.keys()}
    if family == OTHER:
        _check_other(found, asked)
    return Recognised(
        family, {name: c | asked.get(name, {}) for name, c in found.items()}, prefixes
    )


def _check_other(found: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raises: ValueError: what shapes cannot tell of an unknown family is not in the config."""
    needed = {
        "scheduler": ("beta_start", "beta_end", "prediction_type"),
        "vae": ("scaling_factor",),
    }
    absent = [
        f"{part}.{key}"
        for part, keys in needed.items()
        for key in keys
        if part in found and key not in asked.get(part, {})
    ]
    if absent:
        raise ValueError(
            f"a U-Net of this width and with tokens of this width is of no published family; give {', '.join(absent)} "
            "in config, or the model's YAML file"
        )


def with_heads(
    settings: Mapping[str, Any], known: Family, asked: Mapping[str, Any]
) -> dict[str, Any]:
    """The config of a U-Net of this family; what is asked for goes before what is known of heads."""
    heads, head_dim = known.heads, known.head_dim
    if heads is None and head_dim is None and (given := asked.get("attention_head_dim")):
        plain = settings["context"] is None
        heads, head_dim = (None, given) if plain else (given, None)
    return original_configs.unet(**settings, heads=heads, head_dim=head_dim)


def unet(
    part: Part, tensors: Mapping[str, Any], whole: bool = True
) -> tuple[Family, dict[str, Any]]:
    """The family, and all settings of the U-Net's config but the heads; not `whole`: it has a way down only."""
    width, reads = part["input_blocks.0.0.weight"][:2]
    levels: list[list[str]] = [[]]  # of each the numbers of its blocks
    for n in range(1, part.count("input_blocks")):
        if f"input_blocks.{n}.0.op.weight" in part:
            levels.append([])
        else:
            levels[-1].append(f"input_blocks.{n}")
    blocks = {len(level) for level in levels}
    if len(blocks) > 1 or 0 in blocks:
        raise ValueError(
            f"the levels of this U-Net have {[len(level) for level in levels]} blocks, and all must have as many; "
            "give the model's YAML file as config and build the network from that"
        )
    firsts = [level[0] for level in levels]
    widths = [{part[f"{at}.0.out_layers.3.weight"][0] for at in level} for level in levels]
    if any(len(found) > 1 for found in widths):
        raise ValueError(
            "the blocks of this U-Net change width without a convolution that halves: blocks do it (resblock_updown), "
            "which shapes do not tell; build the network from the model's YAML file"
        )
    widths = [found.pop() for found in widths]
    attending = [first for first in (*firsts, "middle_block") if f"{first}.1.norm.weight" in part]
    key = "{}.1.transformer_blocks.0.attn2.to_k.weight".format
    contexts = {part[key(at)][1] for at in attending if key(at) in part}
    if len(contexts) > 1:
        raise ValueError(f"the attention of this U-Net reads tokens of the widths {contexts}")
    context = contexts.pop() if contexts else None

    def depth(at):
        if at not in attending:
            return 0
        return part.count(f"{at}.1.transformer_blocks") if context else 1

    def only_cross(at, own):
        name = f"{at}.1.transformer_blocks.0.attn1.to_k.weight"
        return name in part and part[name][1] != own

    emb = f"{firsts[0]}.0.emb_layers.1.weight"
    label = "label_emb.0.0.weight"
    settings = dict(
        channels=(reads, part["out.2.weight"][0] if whole else reads),
        widths=widths,
        blocks=blocks.pop(),
        depths=[depth(first) for first in firsts],
        middle=depth("middle_block"),
        context=context,
        linear=any(len(part[f"{at}.1.proj_in.weight"]) == 2 for at in attending if context),
        only_cross=[only_cross(*pair) for pair in zip(firsts, widths, strict=True)],
        vector=part[label][1] if label in part else 0,
        sizes=any(name.startswith("conditioner.") for name in tensors),
        classes=part["label_emb.weight"][0] if "label_emb.weight" in part else 0,
        scale_shift=part[emb][0] == 2 * widths[0],
    )
    known = FAMILIES.get((context, width), Family(OTHER))
    if known.name.startswith("stable-diffusion-xl"):
        settings["sizes"] = True  # also where the text encoders are not in the file
    elif known.name == "stable-diffusion-2" and settings["vector"]:
        known = known._replace(name=f"{known.name}-unclip")
    if reads in VARIANTS and known.name.startswith("stable-diffusion"):
        known = known._replace(name=f"{known.name}-{VARIANTS[reads]}", prediction="epsilon")
    return known, settings


def _autoencoder(part: Part, scale: float | None) -> dict[str, Any]:
    levels = range(part.count("encoder.down"))
    blocks = {part.count(f"encoder.down.{i}.block") for i in levels}
    if len(blocks) != 1:
        raise ValueError(f"the levels of this autoencoder have {sorted(blocks)} blocks")
    codes = "quantize.embedding.weight"
    return original_configs.autoencoder(
        channels=(part["encoder.conv_in.weight"][1], part["decoder.conv_out.weight"][0]),
        widths=[part[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in levels],
        blocks=blocks.pop(),
        z_channels=part["decoder.conv_in.weight"][1],
        embed=part["post_quant_conv.weight"][1],
        attends=[f"encoder.down.{i}.attn.0.q.weight" in part for i in levels],
        codes=part[codes][0] if codes in part else 0,
        scale=scale,
    )


def _texts(tensors: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Prefix and config of each text encoder."""
    found = {}
    for prefix in (original.TEXT, "conditioner.embedders.0.", "conditioner.embedders.1."):
        xl = prefix != original.TEXT
        if f"{prefix}transformer.text_model.embeddings.position_embedding.weight" in tensors:
            at = f"{prefix}transformer."
            found["text_encoder"] = at, _clip(Part(tensors, f"{at}text_model."))
        elif f"{prefix}model.positional_embedding" in tensors:
            at = f"{prefix}model."
            config = _open_clip(Part(tensors, at), projects=xl)
            found["text_encoder_2" if xl else "text_encoder"] = at, config
        elif f"{prefix}transformer.token_emb.weight" in tensors:
            at = f"{prefix}transformer."
            found["text_encoder"] = at, _bert(Part(tensors, at))
    return found


def _clip(part: Part) -> dict[str, Any]:
    length, width = part["embeddings.position_embedding.weight"]
    return original_configs.clip_text(
        width=width,
        layers=part.count("encoder.layers"),
        projection=width,
        act="quick_gelu",  # all that files of this layout have are OpenAI's
        vocab=part["embeddings.token_embedding.weight"][0],
        length=length,
        inner=part["encoder.layers.0.mlp.fc1.weight"][0],
    )


def _open_clip(part: Part, projects: bool) -> dict[str, Any]:
    """Stable Diffusion 2 reads what enters the last layer, XL what the last layer and the projection give.

    Files that were written from diffusers' folders lack the last layer, and then the projection too.
    """
    length, width = part["positional_embedding"]
    whole = "text_projection" in part
    return original_configs.clip_text(
        width=width,
        layers=part.count("transformer.resblocks") - (whole and not projects),
        projection=part["text_projection"][1] if whole else width,
        vocab=part["token_embedding.weight"][0],
        length=length,
        inner=part["transformer.resblocks.0.mlp.c_fc.weight"][0],
        projects=projects,
    )


def _bert(part: Part) -> dict[str, Any]:
    vocab, width = part["token_emb.weight"]
    return original_configs.bert_text(
        width=width,
        layers=part.count("attn_layers.layers") // 2,
        vocab=vocab,
        length=part["pos_emb.emb.weight"][0],
        heads=part["attn_layers.layers.0.1.to_q.weight"][0] // 64,
    )
