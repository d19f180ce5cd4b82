"""Files of LoRAs: which kernel of ours each tensor changes.

A name in such a file is the name of a module, spelled in one of many ways, and a part of its delta:

    unet.down_blocks.0 ... attn1.to_q . lora_A.weight                          diffusers, PEFT
    unet.down_blocks.0 ... attn1.processor.to_q _lora.down.weight              diffusers before PEFT
    lora_unet_down_blocks_0 ... attn1_to_q . lora_down.weight                  kohya
    lora_unet_input_blocks_1_1 ... attn1_to_q . hada_w1_a                      LyCORIS, blocks as CompVis numbers them

Names with underscores cannot be taken apart again. So nothing is parsed: tables say what others call each kernel of
ours, `their_names` spells each of these names in every way, and reading is looking up.
"""

import difflib
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from ldm_jax import tree
from ldm_jax.types import Params
from ldm_jax.weights import files, lora_parts, table
from ldm_jax.weights.lora import Delta


class Leaf(NamedTuple):
    """A kernel of ours, and how theirs differs from it."""

    component: str
    name: str
    shape: tuple[int, ...]
    layout: table.Layout

    @property
    def whole(self) -> tuple[int, ...]:
        """The shape of their tensor, as [out, in, *space] whichever way they store it."""
        plain = self.layout._replace(keep=False, ones=0)
        return table.their_shape(self.name, self.shape, plain)


Names = Mapping[str, Sequence[Leaf]]  # several leaves where their tensor holds several of ours

# Besides "component." and "lora_component_". The empty prefix is the first component's, as are those of `BARE`.
PREFIXES = {
    "unet": ("diffusion_model.",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
BARE = ("", "base_model.model.")

PARTS = re.compile(
    r"(?P<module>.+?)(?:"
    r"(?:\.lora|_lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    r"|\.lora_(?P<new>A|B|down|up|mid)(?:\.\w+)?\.weight"
    r"|\.(?P<dora>dora_scale|lora_magnitude_vector)(?:\.\w+)*"
    r"|\.(?P<lycoris>hada_[wt]\w+|lokr_[wt]\w+)"
    # diffusers' conversion of kohya's files names some alphas after the half before them.
    r"|(?:[._]lora(?:_linear_layer)?\.(?:down|up)\.weight)?\.(?P<alpha>alpha))"
)
UNSUPPORTED = {
    r"\.(diff|diff_b|w_norm|b_norm)": "whole differences of weights, biases or norms",
    r"\.lora_B(\.\w+)?\.bias": "a LoRA with biases",
    r"\.lora_embedding_[AB]\b.*": "a LoRA of embeddings",
    r"\.(a1|a2|b1|b2|bm1|bm2)\.weight": "GLoRA",
    r"\.(oft_\w+|boft_\w+|rescale)": "OFT",
    r"\.(on_input)": "IA3",
}


def _roots(module: str) -> set[str]:
    """transformers had "text_model." before the names in CLIP's text encoder, and no longer has."""
    if not module.startswith(("encoder.layers.", "text_model.encoder.layers.")):
        return {module}
    return {module.removeprefix("text_model."), "text_model." + module.removeprefix("text_model.")}


def _spellings(module: str) -> set[str]:
    """What else a module of a diffusers or transformers network is called, with dots."""
    roots = _roots(module)
    attention = {re.sub(r"\.to_(q|k|v|out)(\.0)?$", r".to_\1", name) for name in roots}
    return {
        *roots,
        *attention,
        *(re.sub(r"\.(to_\w+)$", r".processor.\1", name) for name in attention),
        *(re.sub(r"\.self_attn\.(q|k|v|out)_proj$", r".self_attn.to_\1", name) for name in roots),
    }


def their_names(components: Mapping[str, tuple[Params, Sequence[table.Table]]]) -> Names:
    """Every name that a file may have for a kernel of these networks.

    `components` are named as diffusers names them ("unet", "text_encoder", "text_encoder_2"), each with its parameters
    (or their shapes) and the tables that say what others call them: diffusers', and where there is one the original.
    Names without a component's prefix are those of the first.

    Raises:
      ValueError: a name that would mean two kernels.
    """
    names: dict[str, tuple[Leaf, ...]] = {}
    for i, (component, (params, tables)) in enumerate(components.items()):
        special = PREFIXES.get(component, ()) + (BARE if i == 0 else ())
        prefixes = (f"{component}.", f"lora_{component}_", *special)
        for rows in tables:
            modules = defaultdict(list)
            for name, leaf in zip(tree.names(params), jax.tree.leaves(params), strict=True):
                place = table.find(rows, name) if name.endswith("/kernel") else None
                if place:
                    module = place.name.removesuffix(".weight")
                    modules[module].append(Leaf(component, name, tuple(leaf.shape), place.layout))
            for module, leaves in modules.items():
                flat = {name.replace(".", "_") for name in _roots(module)}
                dotted = _spellings(module)
                for name in (
                    p + n for p in prefixes for n in (flat if p.endswith("_") else dotted)
                ):
                    known = names.setdefault(name, tuple(leaves))
                    if {leaf.name for leaf in known} != {leaf.name for leaf in leaves}:
                        raise ValueError(
                            f"{name!r} would mean both {known[0].name!r} and {leaves[0].name!r}; "
                            "give tables that do not contradict each other"
                        )
    return names


def load(path: str | Path, names: Names, ignore: Sequence[str] = ()) -> dict[str, dict[str, Delta]]:
    """The LoRA in a `.safetensors` file; see `read`."""
    return read(files.read(path), names, files.metadata(path), ignore)


def read(
    tensors: Mapping[str, Any],
    names: Names,
    metadata: Mapping[str, str] = {},
    ignore: Sequence[str] = (),
) -> dict[str, dict[str, Delta]]:
    """For each component the changes of our leaves, in the types of the file.

    `metadata` is the header of the file: newer files of diffusers have their alphas there. Alphas that came apart from
    the tensors are given as `tensors | {"unet.mid_block ... to_q.alpha": 8.0}`; without any, alpha is the rank. Tensors
    whose names start with one of `ignore` are left out ("lora_te_", to have the U-Net's alone).

    Raises:
      Mismatch: anything that is not understood or does not fit, all at once: unknown names, kinds that we lack, halves
        without the other, ranks that differ, shapes of another base model.
    """
    found: dict[str, list[str]] = defaultdict(list)
    modules: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    for name in sorted(tensors):
        if name.startswith(tuple(ignore)):
            continue
        match = PARTS.fullmatch(name)
        if match and match["module"] in names:
            part = (
                match["old"] or match["new"] or match["lycoris"] or match["alpha"] or match["dora"]
            )
            part = {"A": "down", "B": "up"}.get(part, part)
            if part in modules[match["module"]]:
                found["tensors are there twice"].append(repr(name))
            modules[match["module"]][part] = np.asarray(tensors[name])
            continue
        kind = next((k for end, k in UNSUPPORTED.items() if re.search(end + "$", name)), None)
        if kind:
            found[f"tensors are not supported: {kind}"].append(repr(name))
        else:
            found["tensors have unknown names"].append(_with_nearest(name, match, names))
    settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    loras: dict[str, dict[str, Delta]] = defaultdict(dict)
    for module, parts in modules.items():
        leaves = names[module]
        try:
            delta = lora_parts.assemble(parts, leaves[0].whole)
            if delta.alpha is None:
                alpha = _alpha(settings, leaves[0].component, module, delta.down.shape[0])
                delta = delta._replace(alpha=np.float32(alpha))
            changes = [lora_parts.in_our_axes(delta, leaf.layout) for leaf in leaves]
        except lora_parts.Unfit as unfit:
            found[unfit.trouble].append(f"{module!r} {unfit}")
            continue
        for leaf, change in zip(leaves, changes, strict=True):
            if leaf.name in loras[leaf.component]:
                found["kernels are changed twice"].append(f"{leaf.name!r} ({module!r})")
            loras[leaf.component][leaf.name] = change
    if found:
        raise table.Mismatch(_told(found, modules, names))
    return dict(loras)


def _with_nearest(name: str, match: re.Match | None, names: Names) -> str:
    near = difflib.get_close_matches(match["module"], names, 1) if match else ()
    return f"{name!r} (nearest: {near[0]!r})" if near else repr(name)


def _alpha(settings: Mapping[str, Any], component: str, module: str, rank: int) -> float:
    """The alpha of a module by PEFT's settings, which hold for a component and by patterns for modules of it."""
    module = module.removeprefix(f"{component}.")
    alpha = settings.get(f"{component}.lora_alpha", rank)
    for pattern, other in settings.get(f"{component}.alpha_pattern", {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = other
            break
    # "Rank-stabilised": alpha / √rank instead of alpha / rank (Kalajdzievski 2023).
    return float(alpha * rank**0.5 if settings.get(f"{component}.use_rslora") else alpha)


def _told(found: Mapping[str, list[str]], modules: Mapping[str, Any], names: Names) -> str:
    """All that was found, the reason first where it is the base model."""
    widths = {
        (parts["down"].shape[1], leaf.shape[-2])
        for module, parts in modules.items()
        for leaf in names[module]
        if "down" in parts and re.search(r"cross_attn/[kv]/kernel$", leaf.name)
    }
    base = [
        f"it was made for another base model, whose cross-attention reads tokens of width {has} instead of {wants}; "
        for has, wants in sorted(widths)
        if has != wants
    ]
    troubles = [
        f"{len(items)} {what}: {', '.join(items[: table.NAMED])}{', ...' if len(items) > table.NAMED else ''}"
        for what, items in found.items()
    ]
    return (
        f"the LoRA does not fit: {''.join(base)}{'; '.join(troubles)}. Use it with the model that it was made for, and "
        "give the components that it changes, or the prefixes of the names to `ignore`"
    )
