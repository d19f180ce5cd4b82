"""Before any reference is imported: transformers imports torchvision where it finds it, and so has to be able to."""

import importlib.util

import pytest

from tests import clip_files
from tests.parity import vision

if all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
    vision.available()


@pytest.fixture(scope="session")
def clip_model(tmp_path_factory):
    """A small CLIP of transformers with random weights, its tokenizer, and the folder that holds both."""
    import transformers

    from tests.parity import weights

    folder = clip_files.write(tmp_path_factory.mktemp("clip"))
    tokenizer = transformers.CLIPTokenizer.from_pretrained(folder)
    shared = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    config = transformers.CLIPConfig(
        text_config=dict(
            **shared,
            vocab_size=len(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ),
        vision_config=dict(**shared, image_size=24, patch_size=8),
        projection_dim=16,
    )
    network = weights.randomised(transformers.CLIPModel(config))
    network.save_pretrained(folder)
    return folder, tokenizer, network
