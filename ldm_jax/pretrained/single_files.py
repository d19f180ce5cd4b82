"""A pretrained model of a single file in the original layout, as a `Source`.

What its tensors' names and shapes do not tell comes from a config, and tokenizers from folders of their own.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ldm_jax.models import text
from ldm_jax.pretrained import components, controlnets, kinds, sources
from ldm_jax.pretrained.components import Component, Tensors
from ldm_jax.weights import (
    autoencoder,
    files,
    folder,
    original,
    original_noise,
    original_unclip,
    original_yaml,
    pickles,
    prompts,
    recognise,
    recognise_controlnet,
    scheduler,
    unet,
    vq,
)
from ldm_jax.weights.table import Table

# Pipelines with a second table of noise.
SECOND = {
    "StableDiffusionUpscalePipeline": "low_res_scheduler",
    "StableUnCLIPImg2ImgPipeline": "image_noising_scheduler",
}
# What diffusers calls the pipelines whose U-Net reads so many channels beside the latents' four.
READS = {0: "", 1: "Depth2Img", 3: "Upscale", 4: "InstructPix2Pix", 5: "Inpaint"}
REFINER = dict(requires_aesthetics_score=True, force_zeros_for_empty_prompt=False)


def open_file(
    path: Path,
    config: str | Path | Mapping[str, Any] | None,
    tokenizers: Sequence[str | Path],
    ema: bool,
) -> sources.Source:
    """A single file of the original layout: safetensors, or of torch, whose pickle may make tensors and nothing else.

    `config` says what shapes do not tell: a folder of diffusers, the original YAML file, or {component: settings}.

    Raises:
      FileNotFoundError, ValueError: no such file, one that cannot be read, or no model that is known here.
    """
    read = files.read if path.suffix == ".safetensors" else pickles.read
    found = original.averaged(read(path)) if ema else read(path)
    asked, beside = _asked(config)
    steering = ()
    if recognise_controlnet.inside(found):
        within = {k: found[k] for k in found if k.startswith(original.CONTROL)}
        steering = (controlnets.of_tensors(within, asked.get(controlnets.NAME, {})),)
        found = {k: found[k] for k in found if k not in within}
    what = recognise.recognise(found, asked)
    sees = original_unclip.inside(found)
    index = _index(path, what, sees) | beside
    seen = original_unclip.recognise(found, asked) if sees else original_unclip.Parts({}, {})
    prefixes = what.prefixes | (original_unclip.PREFIXES if sees else {})
    parts = original.split(found, prefixes, original_unclip.BESIDE if sees else ())
    names = [name for name in sources.NETWORKS if name in parts]
    words = _tokenizers(names, config, tokenizers)
    networks, known = {}, what.configs | seen.configs
    for name in (*names, *seen.configs):
        settings = known[name]
        kind = (
            settings["architectures"][0] if "architectures" in settings else settings["_class_name"]
        )
        networks[name] = kind, settings

    def tensors(name, component):
        if name in seen.made:
            return component.stored(seen.made[name])
        rows, ignore = table(name, component, prefixes[name])
        if name in seen.configs:
            ignore = original_unclip.BESIDE
        return Tensors(parts[name], rows, (*component.ignore, *ignore, *original.BESIDE))

    for name, (kind, _) in networks.items():
        at = kinds.original_name(name, index["_class_name"])
        index[at] = [components.KINDS[kind].library if kind in components.KINDS else None, kind]
    tokenizer = "BertTokenizer" if "bert" in index else "CLIPTokenizer"
    index |= {name: ["transformers", tokenizer] for name in words}
    noise = {"scheduler": what.configs["scheduler"]}
    if name := SECOND.get(index["_class_name"]):
        noise[name] = original_noise.scheduler(name, found) | asked.get(name, {})
    index |= {name: ["diffusers", config["_class_name"]] for name, config in noise.items()}
    processors = {"feature_extractor": original_unclip.PROCESSOR} if sees else {}
    index |= {name: ["transformers", "CLIPImageProcessor"] for name in processors}
    return sources.Source(index, networks, words, noise, tensors, processors, steering)


def _index(path: Path, what: recognise.Recognised, sees: bool = False) -> dict[str, Any]:
    """The class of diffusers that the networks make up, and what its index says beside them.

    `sees`: with an image encoder, too.

    Raises:
      ValueError: networks that make up no pipeline that is known here.
    """
    texts = [name for name in sources.TEXTS if name in what.configs]
    plain = what.configs.get("unet", {}).get("_class_name") == "UNet2DModel"
    if not {"unet", "vae"} <= what.configs.keys() or plain == bool(texts):
        raise ValueError(
            f"{path} is a model of the family {what.family!r} with {sorted(what.configs)}; a pipeline needs a U-Net, "
            "an autoencoder, and text encoders if the U-Net reads tokens"
        )
    if plain:
        return {"_class_name": "LDMPipeline"}
    if what.configs[texts[0]].get("_class_name") == "LDMBertModel":
        return {"_class_name": "LDMTextToImagePipeline"}
    if sees:
        return {"_class_name": "StableUnCLIPImg2ImgPipeline"}
    if what.family.endswith("unclip"):
        raise ValueError(
            f"{path} is a model of the family {what.family!r} and has no image encoder ({original_unclip.VISUAL}...)"
        )
    xl = "XL" if "text_encoder_2" in texts else ""
    reads = unet.channels(what.configs["unet"]).spatial
    if reads not in READS:
        raise ValueError(
            f"{path} has a U-Net that reads {reads} channels beside the latents; known are {READS}"
        )
    if texts == ["text_encoder_2"]:
        return REFINER | {"_class_name": "StableDiffusionXLImg2ImgPipeline"}
    return {"_class_name": f"StableDiffusion{xl}{READS[reads]}Pipeline"}


def table(name: str, component: Component, prefix: str) -> tuple[Table, Sequence[str]]:
    """The original names of a component below its prefix, and what of them is not read."""
    if name == "unet":
        return original.unet(component.module, prefix), ()
    if name in original_unclip.PREFIXES:
        return original_unclip.tables(name), ()
    if name == "vae":
        return original.autoencoder(component.module, prefix), ()
    if isinstance(component.module, text.TextTransformer):
        return original.bert(component.module, prefix), ()
    if prefix.endswith("model."):
        return original.open_clip(prefix), original.open_clip_unused(component.module, prefix)
    return original.clip(prefix), ()


def _asked(config: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of each component that go before what is recognised, and what of an index goes with them."""
    if config is None:
        return {}, {}
    if isinstance(config, Mapping):
        return dict(config), {}
    if Path(config).is_dir():
        opened = folder.open_folder(config)
        if lacking := [n for n in kinds.needed(opened.index) if n not in opened.parts]:
            raise ValueError(f"{config}, given as config, lacks {lacking}; give a whole folder")
        beside = {k: v for k, v in opened.index.items() if not isinstance(v, list)}
        # A file has its own ControlNet, or none.
        beside["_class_name"] = beside["_class_name"].replace("ControlNet", "")
        parts = kinds.renamed(opened.parts)
        kept = {
            n: p.config
            for n, p in parts.items()
            if n in (*sources.NETWORKS, *sources.SCHEDULERS, "image_encoder")
        }
        # What these leave out has the value that their class gives it, and not the one that is recognised.
        kept["scheduler"] = scheduler.to_config(
            scheduler.read(kept["scheduler"]), kept["scheduler"]
        )
        family = vq if parts["vae"].kind == "VQModel" else autoencoder
        kept["vae"] = {"scaling_factor": family.scaling_factor(kept["vae"])} | kept["vae"]
        return kept, beside
    return original_yaml.from_yaml(config), {}


def _tokenizers(
    networks: Sequence[str], config: Any, given: Sequence[str | Path]
) -> dict[str, prompts.Tokenizer]:
    names = [name.replace("text_encoder", "tokenizer") for name in networks if "text" in name]
    folders = list(map(Path, given))
    if not folders and isinstance(config, str | Path) and Path(config).is_dir():
        folders = [Path(config) / name for name in names]
    if len(folders) != len(names):
        raise ValueError(
            f"a single file holds no tokenizer, and the model needs {names}; give as many folders as "
            "`tokenizers`, or a folder of diffusers as `config`"
        )
    return {name: prompts.load(path) for name, path in zip(names, folders, strict=True)}
