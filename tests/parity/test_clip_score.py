"""The CLIP score against transformers' CLIPModel with random weights, from the folder that it saves."""

import numpy as np
import pytest
from PIL import Image

from ldm_jax.models import clip
from ldm_jax.quality import clip_score, pictures

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.parity

SIDE = 24  # of the pictures that `clip_model` reads
CAPTIONS = ("a painting of a horse", "three cats by the sea", "small red houses", "", "25 of them")


def test_the_score_equals_transformers(clip_model):
    folder, tokenizer, network = clip_model
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


def test_folders_of_other_models(clip_model, tmp_path):
    with pytest.raises(ValueError, match="clip needs a CLIP model"):
        clip_score.load(None)
    with pytest.raises(FileNotFoundError, match=r"needs config\.json and model\.safetensors"):
        clip_score.load(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((clip_model[0] / name).read_bytes())
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"CLIPModel"', '"CLIPTextModel"'))
    with pytest.raises(ValueError, match="give the folder of a CLIPModel"):
        clip_score.load(tmp_path)


def test_captions_of_a_folder(clip_model, tmp_path):
    from tests import tiny

    folder = tiny.pictures(tmp_path / "pictures", n=6, size=SIDE)
    of = pictures.of_folder(folder)
    assert of.captions[:2] == ("a red square", "a green square")
    assert np.array(Image.open(folder / "000.png")).shape == of.read(0).shape
    assert 0 <= clip_score.load(clip_model[0])(of, of.captions) <= 100
