"""The CLIP score against transformers' CLIPModel with random weights, from the folder that it saves."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.models import clip
from ldm_jax.quality import clip_score, pictures
from tests import clip_files
from tests.parity import weights

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIDE = 24
CAPTIONS = ("a painting of a horse", "three cats by the sea", "small red houses", "", "25 of them")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
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
        vision_config=dict(**shared, image_size=SIDE, patch_size=8),
        projection_dim=16,
    )
    network = weights.randomised(transformers.CLIPModel(config))
    network.save_pretrained(folder)
    return folder, tokenizer, network


def test_the_score_equals_transformers(model):
    folder, tokenizer, network = model
    x = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), SIDE, SIDE, 3), dtype=np.uint8)
    judge = clip_score.load(folder, batch=2)
    found = judge(pictures.of_array("noise", x), CAPTIONS)

    scaled = (x / 255 - np.array(clip.MEAN)) / np.array(clip.STD)  # of their size: not resized
    tokens = tokenizer(list(CAPTIONS), padding="max_length", max_length=77, return_tensors="pt")
    with torch.no_grad():
        pixels = torch.tensor(np.moveaxis(scaled, -1, 1), dtype=torch.float32)
        out = network(input_ids=tokens.input_ids, pixel_values=pixels)
    cosines = (out.image_embeds * out.text_embeds).sum(-1).numpy()
    assert cosines.min() < 0 < cosines.max()  # some are clipped
    assert found == pytest.approx(100 * cosines.clip(0).mean(), abs=1e-3)


def test_folders_of_other_models(model, tmp_path):
    with pytest.raises(ValueError, match="clip needs a CLIP model"):
        clip_score.load(None)
    with pytest.raises(FileNotFoundError, match=r"needs config\.json and model\.safetensors"):
        clip_score.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((model[0] / name).read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"CLIPModel"', '"CLIPTextModel"'))
    with pytest.raises(ValueError, match="give the folder of a CLIPModel"):
        clip_score.load(tmp_path)


def test_captions_of_a_folder(model, tmp_path):
    from tests import tiny

    folder = tiny.pictures(tmp_path / "pictures", n=6, size=SIDE)
    of = pictures.of_folder(folder)
    assert of.captions[:2] == ("a red square", "a green square")
    assert np.array(Image.open(folder / "000.png")).shape == of.read(0).shape
    assert 0 <= clip_score.load(model[0])(of, of.captions) <= 100
