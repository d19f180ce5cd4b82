"""Folders of Stable Diffusion 1.5, 2.1 and XL as diffusers keeps them: published configs, or reduced with weights."""

import functools

from ldm_jax.pretrained import components
from tests import clip_files, published_unets, test_autoencoder_weights, test_clip, tiny
from tests.pretrained_folder import SCHEDULER, component, put

NARROW = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
# Two levels, as few as there can be with and without attention.
UNET = dict(block_out_channels=[4, 8], layers_per_block=1, norm_num_groups=2, sample_size=8)
LEVELS = {
    False: dict(
        down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
        up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"],
    ),
    True: dict(
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D"],
        up_block_types=["CrossAttnUpBlock2D", "UpBlock2D"],
        transformer_layers_per_block=[1, 1],
        projection_class_embeddings_input_dim=6 * 256 + 8,
    ),
}
VAE = dict(
    block_out_channels=[4, 4],
    down_block_types=["DownEncoderBlock2D"] * 2,
    up_block_types=["UpDecoderBlock2D"] * 2,
    layers_per_block=1,
    norm_num_groups=2,
)
CLIP, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
# kind: U-Net, autoencoder, text encoders (class, config), target
KINDS = {
    "sd15": ("Stable Diffusion 1", "Stable Diffusion 1", [(CLIP, "sd1")], "epsilon"),
    "sd21": ("Stable Diffusion 2.1 v", "Stable Diffusion 2.1", [(CLIP, "sd2")], "v_prediction"),
    "sdxl": (
        "SDXL base",
        "Stable Diffusion XL",
        [(CLIP, "sd1"), (PROJECTED, "sdxl 2")],
        "epsilon",
    ),
}


def write(folder, kind, reduced=True):
    """The folder of a kind; reduced, it has random weights and two pixels a latent, else no weights at all."""
    of_unet, of_vae, of_texts, prediction = KINDS[kind]
    unet, vae = published_unets.UNETS[of_unet][0], test_autoencoder_weights.MODELS[of_vae][0]
    texts = [test_clip.SHARED_TEXT | test_clip.TEXTS[name][0] for _, name in of_texts]
    if reduced:
        unet = unet | UNET | LEVELS[kind == "sdxl"]
        unet |= dict(attention_head_dim=2, cross_attention_dim=8 * len(texts))
        vae = vae | VAE
        texts = [text | NARROW | dict(projection_dim=8, vocab_size=640) for text in texts]
    parts = {"unet": ("UNet2DConditionModel", unet), "vae": ("AutoencoderKL", vae)}
    index = {
        "_class_name": "StableDiffusionXLPipeline" if kind == "sdxl" else "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
    }
    for i, ((name, _), config) in enumerate(zip(of_texts, texts, strict=True)):
        ending = "" if i == 0 else f"_{i + 1}"
        parts[f"text_encoder{ending}"] = (name, config)
        index[f"tokenizer{ending}"] = ["transformers", "CLIPTokenizer"]
        clip_files.write(folder / f"tokenizer{ending}", pad=clip_files.END if i == 0 else "!")
    for seed, (name, (kind_of, config)) in enumerate(parts.items()):
        index[name] = [components.KINDS[kind_of].library, kind_of]
        if reduced:
            component(folder / name, kind_of, dict(config), seed)
        else:
            put(folder / name / "config.json", dict(config))
    noise = SCHEDULER | dict(prediction_type=prediction)
    put(folder / "scheduler" / "scheduler_config.json", noise)
    put(folder / "model_index.json", index)
    return folder


@functools.cache
def shared(kind):
    """The reduced folder of a kind."""
    return write(tiny.scratch() / f"folder_{kind}", kind)


def smaller(config, kind):
    """A config of fine-tuning on tiny pictures, from the reduced folder."""
    with config.unlocked():
        config.init.update(path=str(shared(kind)), dtype="float32", remat=False)  # compile sooner
        config.data.source.path = str(tiny.shared_pictures())
        config.data.validation = dict(split="all")
        config.data.update(batch=8, size=8, workers=0)
        config.mesh = dict(data=4, fsdp=2, tensor=1)
        config.log = dict(every=1, batches=1, samples=1)
        config.sampler.steps = 2
    return config
