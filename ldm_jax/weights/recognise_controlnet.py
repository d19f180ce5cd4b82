"""Which ControlNet a single file holds, from the names and shapes of its tensors.

Two layouts are published: the original one, below "control_model." (also within the file of a whole model) or without
a prefix, and that of diffusers without its config.json. What shapes do not tell comes from the family whose U-Net has
the same width and tokens, as in `recognise`; whether residuals are means over the positions (`global_pool_conditions`,
of "shuffle") nothing tells, and a config must.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.weights import original
from ldm_jax.weights.recognise import FAMILIES, OTHER, Family, Part, unet, with_heads

HINT = "input_hint_block.0.weight"
THEIR_HINT = "controlnet_cond_embedding.conv_in.weight"


class Recognised(NamedTuple):
    """A ControlNet's config in diffusers' words, and where its tensors are."""

    config: dict[str, Any]
    prefix: str | None  # of the original layout; None: the names are those of diffusers


def inside(tensors: Mapping[str, Any]) -> bool:
    """Whether there is a ControlNet in the original layout with its prefix."""
    return original.CONTROL + HINT in tensors


def recognise(tensors: Mapping[str, Any], asked: Mapping[str, Any] = {}) -> Recognised:
    """`asked` are settings in diffusers' words that go before what is recognised.

    Raises:
      ValueError: no ControlNet, or one whose shapes do not tell all that must be known.
    """
    if THEIR_HINT in tensors:
        part, prefix = Part(tensors, ""), None
        known, settings = _of_diffusers(part)
        blocks = part.count("controlnet_cond_embedding.blocks")
        convs = [f"controlnet_cond_embedding.blocks.{i}.weight" for i in range(1, blocks, 2)]
        first = THEIR_HINT
    else:
        found = [p for p in (original.CONTROL, "") if p + HINT in tensors]
        if not found:
            some = ", ".join(sorted(tensors)[:3])
            raise ValueError(
                f"these are no tensors of a ControlNet ({some}, ...); expected names like "
                f"'{original.CONTROL}{HINT}' or '{THEIR_HINT}'"
            )
        prefix = found[0]
        part = Part(tensors, prefix)
        known, settings = unet(part, {}, whole=False)
        last = 2
        while f"input_hint_block.{last + 2}.weight" in part:
            last += 2
        convs = [f"input_hint_block.{i}.weight" for i in range(4, last, 4)]
        first = HINT
    if settings["context"] is None:
        raise ValueError(
            "this ControlNet has no cross-attention and diffusers has no such one; it cannot be loaded"
        )
    config = with_heads(settings, known, asked)
    config = {k: v for k, v in config.items() if k not in ("out_channels", "up_block_types")}
    config |= dict(
        _class_name="ControlNetModel",
        conditioning_channels=part[first][1],
        conditioning_embedding_out_channels=tuple(part[name][0] for name in (first, *convs)),
    )
    return Recognised(config | dict(asked), prefix)


def _of_diffusers(part: Part) -> tuple[Family, dict[str, Any]]:
    """As `recognise.unet`, from the names that diffusers gives."""
    levels = [f"down_blocks.{i}" for i in range(part.count("down_blocks"))]
    blocks = {part.count(f"{at}.resnets") for at in levels}
    if len(blocks) != 1:
        raise ValueError(f"the levels of this ControlNet have {sorted(blocks)} blocks")
    stem = "{}.attentions.0.transformer_blocks".format
    depths = [part.count(stem(at)) for at in (*levels, "mid_block")]
    attending = [at for at, d in zip((*levels, "mid_block"), depths, strict=True) if d]
    contexts = {part[f"{stem(at)}.0.attn2.to_k.weight"][1] for at in attending}
    if len(contexts) > 1:
        raise ValueError(f"the attention of this ControlNet reads tokens of the widths {contexts}")
    widths = [part[f"{at}.resnets.0.conv1.weight"][0] for at in levels]
    vectors = {name: f"{name}.linear_1.weight" for name in ("add_embedding", "class_embedding")}
    vector = next((part[name][1] for name in vectors.values() if name in part), 0)
    settings = dict(
        channels=(part["conv_in.weight"][1],) * 2,
        widths=widths,
        blocks=blocks.pop(),
        depths=depths[:-1],
        middle=depths[-1],
        context=contexts.pop() if contexts else None,
        linear=any(len(part[f"{at}.attentions.0.proj_in.weight"]) == 2 for at in attending),
        only_cross=[
            at in attending and part[f"{stem(at)}.0.attn1.to_k.weight"][1] != width
            for at, width in zip(levels, widths, strict=True)
        ],
        vector=vector,
        sizes=vectors["add_embedding"] in part,
        classes=part["class_embedding.weight"][0] if "class_embedding.weight" in part else 0,
        scale_shift=part["down_blocks.0.resnets.0.time_emb_proj.weight"][0] == 2 * widths[0],
    )
    return FAMILIES.get((settings["context"], widths[0]), Family(OTHER)), settings
