"""Heat maps of a pretrained model: the same pictures, shares of attention, words where their tokens are."""

import jax
import numpy as np
import pytest

from ldm_jax.pretrained import from_pretrained
from ldm_jax.training import sharding
from tests import pretrained_folder as reduced
from tests.test_pretrained_edits import SMALL
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

PROMPTS = ["a cat on a mat", "red, and Blue!"]


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = reduced.write(tmp_path_factory.mktemp("explain") / "sd", **SMALL)
    return from_pretrained(folder, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


@pytest.mark.slow
def test_maps_beside_the_pictures_of_text_to_image(pipe):
    options = dict(steps=2, guidance=3.0, seed=4)
    found = pipe.explain(PROMPTS, **options)
    np.testing.assert_allclose(found.images, pipe.text_to_image(PROMPTS, **options), atol=1e-4)
    assert found.maps.shape == (2, 8, 8, 77)
    np.testing.assert_allclose(found.maps.sum(-1), 1, rtol=1e-3)
    assert [[word for word, _ in words] for words in found.words] == [
        ["a", "cat", "on", "a", "mat"],
        ["red", "and", "Blue"],
    ]
    sheets = found.sheets()
    assert len(sheets) == 2
    assert sheets[0].shape[1] > sheets[1].shape[1]  # six tiles and four
    # What another prompt's words take is another map.
    assert np.abs(found.maps[0] - found.maps[1]).max() > 1e-4


def test_what_cannot_be_explained(pipe):
    with pytest.raises(ValueError, match="one chunk without weights"):
        pipe.reading(weighted=True).explain("a (cat:1.2)")
    with pytest.raises(ValueError, match="no solver 'dim'"):
        pipe.explain("a cat", solver="dim")
