import numpy as np
import pytest

from ldm_jax import media
from ldm_jax.data import transforms


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_to_uint8_undoes_to_unit_and_clips():
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(media.to_uint8(transforms.to_unit(every)), every)
    assert media.to_uint8(np.array([-7.0, 0.0, 1.001], np.float32)).tolist() == [0, 128, 255]
    with pytest.raises(ValueError, match="1 of 2 values are NaN"):
        media.to_uint8(np.array([np.nan, 0.0]))


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_a_png_keeps_its_pixels_and_its_provenance(tmp_path, shape):
    image, text = noise(*shape), {"prompt": "ein roter Kreis, größer\n漢", "seed": "3"}
    media.save_png(tmp_path / "new" / "a.png", image, text)
    np.testing.assert_array_equal(media.read_png(tmp_path / "new" / "a.png"), image)
    assert media.read_png_text(tmp_path / "new" / "a.png") == text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_one_channel_is_grey(tmp_path):
    image = noise(4, 4, 1)
    media.save_png(tmp_path / "a.png", image)
    np.testing.assert_array_equal(media.read_png(tmp_path / "a.png"), image[..., 0])
    assert media.read_png_text(tmp_path / "a.png") == {}


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(ValueError, match="float32; use to_uint8"):
        media.save_png(tmp_path / "a.png", noise(4, 4, 3).astype(np.float32))
    with pytest.raises(ValueError, match=r"\(4, 4, 2\)"):
        media.save_png(tmp_path / "a.png", noise(4, 4, 2))
    assert not list(tmp_path.iterdir())


def test_a_grid_shows_each_picture_in_its_place():
    images = noise(5, 8, 6, 3)
    sheet = media.grid(images, 3, scale=2, gap=4)
    assert sheet.shape == (2 * (16 + 4) + 4, 3 * (12 + 4) + 4, 3)
    for i, image in enumerate(images):
        top, left = 4 + (i // 3) * 20, 4 + (i % 3) * 16
        tile = sheet[top : top + 16, left : left + 12]
        np.testing.assert_array_equal(tile, image.repeat(2, 0).repeat(2, 1))
    assert (sheet[24:, -16:] == 255).all()  # the sixth place is empty
    assert (sheet[:4] == 255).all()


def test_captions_are_written_below_and_stay_within_their_column():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    bare = media.grid(images, 2)
    long = "a picture of a large yellow triangle " * 9
    sheet = media.grid(images, 2, [long + "unbreakable" * 9, ""])
    assert sheet.shape[1] == bare.shape[1] == 2 * 128 + 3 * 8
    below = sheet[8 + 128 :]
    assert (below[:, 8 : 8 + 128] < 128).any()
    assert (below[:, 8 + 128 + 8 :] == 255).all()
    assert (below[-6:] == 255).all()


def test_a_grey_grid_is_grey():
    sheet = media.grid(noise(2, 4, 4, 1), 2)
    assert (sheet[..., 0] == sheet[..., 2]).all()


def test_bad_grids_are_named():
    with pytest.raises(ValueError, match="1 captions for 2 pictures"):
        media.grid(noise(2, 4, 4, 3), 2, ["one"])
    with pytest.raises(ValueError, match="to_uint8"):
        media.grid(noise(2, 4, 4, 3).astype(np.float32), 2)
    with pytest.raises(ValueError, match="in 0 columns"):
        media.grid(noise(2, 4, 4, 3), 0)
