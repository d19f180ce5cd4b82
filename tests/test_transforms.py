import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import transforms


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def rgb(data, **options):
    return np.asarray(transforms.decode(data, **options))


def view(source, target, crop="center", flip=False, seed=0):
    return transforms.window(source, target, crop=crop, flip=flip, rng=np.random.default_rng(seed))


def noise(height, width, channels=3, seed=0):
    shape = (height, width, channels) if channels else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "YCbCr"])
def test_every_opaque_mode_gives_the_colour_of_its_pixels(mode):
    image = Image.new("RGB", (5, 4), (255, 255, 255)).convert(mode)
    data = encoded(image, "TIFF" if mode in ("CMYK", "YCbCr") else "PNG")
    np.testing.assert_array_equal(rgb(data), np.full((4, 5, 3), 255))


def test_a_palette_gives_its_colours():
    image = Image.new("P", (3, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    np.testing.assert_array_equal(rgb(encoded(image))[1, 2], [10, 20, 30])


def test_transparency_becomes_white():
    half = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    half.putpixel((0, 0), (255, 0, 0, 255))
    half.putpixel((1, 0), (0, 0, 0, 51))  # 20 % black on white: 204
    pixels = rgb(encoded(half))
    assert pixels[0, 0].tolist() == [255, 0, 0]
    assert pixels[0, 1].tolist() == [204, 204, 204]
    assert pixels[1, 1].tolist() == [255, 255, 255]
    assert rgb(encoded(Image.new("LA", (2, 2), (0, 0))))[0, 0].tolist() == [255, 255, 255]
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    assert rgb(encoded(palette, transparency=0))[0, 0].tolist() == [255, 255, 255]
    keyed = encoded(Image.new("RGB", (2, 2), (1, 2, 3)), transparency=(1, 2, 3))
    assert rgb(keyed)[0, 0].tolist() == [255, 255, 255]


def test_sixteen_bit_greys_are_scaled_not_clipped():
    values = np.array([[0, 255, 256, 40000, 65535]], np.uint16)
    expected = np.array([0, 0, 1, 156, 255], np.uint8)
    np.testing.assert_array_equal(rgb(encoded(Image.fromarray(values)))[0, :, 0], expected)


def test_the_rotation_of_a_camera_is_applied():
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # the top of the scene is at the right of the file
    pixels = rgb(encoded(image, exif=exif))
    assert pixels.shape == (4, 2, 3)
    assert pixels[0, 1].tolist() == [255, 255, 255]


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert rgb(data)[0, 0].tolist() == [255, 0, 0]


def test_arrays_are_pictures_too():
    pixels = noise(4, 5)
    np.testing.assert_array_equal(rgb(pixels), pixels)
    np.testing.assert_array_equal(rgb(pixels[..., :1])[..., 2], pixels[..., 0])
    with pytest.raises(transforms.BadImage, match="float32"):
        transforms.decode(pixels.astype(np.float32))


def test_a_bomb_is_refused_by_its_header():
    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    with pytest.raises(transforms.BadImage, match=r"30000x30000|900000000"):
        transforms.decode(bomb)
    assert rgb(encoded(Image.new("1", (8, 8))), max_pixels=64).shape == (8, 8, 3)
    with pytest.raises(transforms.BadImage, match="8x9"):
        rgb(encoded(Image.new("1", (8, 9))), max_pixels=64)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_hostile_bytes_are_bad_images_and_nothing_else(kind):
    data = encoded(Image.fromarray(noise(24, 24)), kind)
    rng = np.random.default_rng(0)
    for trial in range(60):
        broken = bytearray(data[: rng.integers(0, len(data))] if trial % 2 else data)
        for at in rng.integers(0, max(len(broken), 1), 6):
            if broken:
                broken[at] ^= 1 << rng.integers(8)
        try:
            image = transforms.decode(bytes(broken))
        except transforms.BadImage:
            continue
        assert image.mode == "RGB"


@pytest.mark.parametrize("data", [b"", b"no picture", None, 3])
def test_what_is_no_picture_says_so(data):
    with pytest.raises(transforms.BadImage):
        transforms.decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_truncated_file_is_not_filled_with_grey(kind):
    data = encoded(Image.fromarray(noise(64, 64)), kind)
    with pytest.raises(transforms.BadImage, match="truncated"):
        transforms.decode(data[: len(data) // 2])


def test_a_picture_of_the_right_size_is_copied():
    pixels = noise(6, 8)
    shown = transforms.show(Image.fromarray(pixels), view((8, 6), (6, 8)), (6, 8))
    np.testing.assert_array_equal(shown, pixels)


def test_the_centre_crop_is_whole_pixels_where_nothing_is_resized():
    pixels = noise(6, 10)
    shown = transforms.show(Image.fromarray(pixels), view((10, 6), (6, 6)), (6, 6))
    np.testing.assert_array_equal(shown, pixels[:, 2:8])


def test_random_crops_reach_every_place_and_keep_the_pixels():
    pixels = np.broadcast_to(np.arange(9, dtype=np.uint8)[None, :, None], (4, 9, 3))
    seen = set()
    for seed in range(100):
        window = view((9, 4), (4, 4), crop="random", flip=True, seed=seed)
        row = transforms.show(Image.fromarray(pixels), window, (4, 4))[0, :, 0].tolist()
        ordered = sorted(row)
        assert ordered == list(range(ordered[0], ordered[0] + 4))
        seen.add((ordered[0], row != ordered))
    assert seen == {(left, flipped) for left in range(6) for flipped in (False, True)}


def test_the_window_is_the_largest_of_its_aspect():
    assert view((100, 50), (10, 10)).box == (25, 0, 75, 50)
    assert view((50, 100), (10, 20)).box == (0, 37.5, 50, 62.5)
    for seed in range(50):
        left, top, right, bottom = view((101, 37), (16, 16), crop="random", seed=seed).box
        assert 0 <= left <= right <= 101
        assert (top, bottom) == (0, 37)
        assert right - left == pytest.approx(37)


def test_downscaling_does_not_alias():
    # A wave above the new Nyquist limit must vanish; taking every fourth pixel would not do.
    wave = 127.5 + 120 * np.cos(np.pi * np.arange(128) * 0.9)
    pixels = np.broadcast_to(wave[None, :, None], (128, 128, 3)).astype(np.uint8)
    shown = transforms.show(Image.fromarray(pixels), view((128, 128), (32, 32)), (32, 32))
    inner = shown[4:-4, 4:-4].astype(float)  # the border has one-sided filters
    assert np.abs(inner - 127).max() < 4
    assert np.abs(pixels[::4, ::4].astype(float) - 127).max() > 100


def test_resizing_keeps_a_slope():
    # The pixel centres of a 2:1 reduction lie between two pixels of the source.
    slope = np.arange(64, dtype=np.uint8) * 4
    pixels = np.broadcast_to(slope[None, :, None], (64, 64, 3))
    shown = transforms.show(Image.fromarray(pixels), view((64, 64), (32, 32)), (32, 32))
    np.testing.assert_allclose(shown[0, 4:-4, 0], slope[8:-8:2] + 2, atol=1)


def test_a_large_jpeg_is_reduced_while_decoding_and_looks_the_same():
    smooth = np.asarray(Image.fromarray(noise(8, 8)).resize((512, 512), Image.Resampling.BICUBIC))
    data = encoded(Image.fromarray(smooth), "JPEG", quality=95)
    quick = transforms.decode(data, at_least=(32, 32))
    assert quick.size == (64, 64)
    full = transforms.decode(data)
    assert full.size == (512, 512)
    shown = [
        transforms.show(image, view(image.size, (32, 32)), (32, 32)).astype(float)
        for image in (quick, full)
    ]
    assert np.abs(shown[0] - shown[1]).mean() < 1.5


def test_labels_follow_the_picture():
    # A picture whose red channel is its own label map, in 8 x 8 blocks: the two must stay together.
    labels = np.repeat(np.repeat(noise(5, 9, 0) % 7, 8, 0), 8, 1)
    pixels = np.repeat(labels[..., None] * 30, 3, -1).astype(np.uint8)
    for seed in range(20):
        window = view((72, 40), (20, 20), crop="random", flip=True, seed=seed)
        shown = transforms.show(Image.fromarray(pixels), window, (20, 20))[..., 0] / 30
        followed = transforms.show_labels(labels.astype(np.int32), window, (20, 20))
        agree = np.abs(shown - followed) < 0.2
        assert agree.mean() > 0.4  # the inner pixels of the blocks; Lanczos blurs their edges
        mirrored = np.abs(shown - followed[:, ::-1]) < 0.2
        assert agree.mean() > mirrored.mean()
    full = view((72, 40), (40, 72))
    np.testing.assert_array_equal(transforms.show_labels(labels, full, (40, 72)), labels)


def test_label_maps_keep_their_numbers():
    palette = Image.fromarray(np.array([[3, 1]], np.uint8), "P")
    palette.putpalette([0, 0, 0] * 4)
    assert transforms.decode_labels(encoded(palette)).tolist() == [[3, 1]]
    assert transforms.decode_labels(np.array([[[7], [8]]], np.uint8)).tolist() == [[7, 8]]
    with pytest.raises(transforms.BadImage, match="map of labels"):
        transforms.decode_labels(encoded(Image.new("RGB", (2, 2))))
    with pytest.raises(transforms.BadImage, match="does not fit"):
        transforms.show_labels(np.zeros((4, 8), np.int32), view((4, 8), (2, 2)), (2, 2))


def test_to_unit_spans_the_interval():
    x = transforms.to_unit(np.array([0, 51, 255], np.uint8))
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, [-1, -0.6, 1], atol=1e-7)


def test_the_pictures_of_a_camera_with_two_frames_open():
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("white", "black")]
    data = encoded(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert rgb(data).min() > 250


def ramp(height, width):
    """Each pixel says in which column (red) and row (green) it stands."""
    rows, columns = np.mgrid[:height, :width]
    return np.stack([columns, rows, 0 * rows], -1).astype(np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(("height", "width"), [(20, 50), (50, 20)])
def test_sizes_say_where_the_crop_lies(height, width, flip):
    picture, original = transforms.decode_sized(encoded(Image.fromarray(ramp(height, width))))
    seen = set()
    for seed in range(20):
        cut = view(picture.size, (20, 20), "random", flip, seed)
        shown = transforms.show(picture, cut, (20, 20))
        # In a mirrored picture columns are counted from its own left.
        column = width - 1 - int(shown[0, 0, 0]) if cut.flip else int(shown[0, 0, 0])
        place = transforms.sizes(original, cut, (20, 20)).tolist()
        assert place == [height, width, shown[0, 0, 1], column, 20, 20]
        seen.add((*place[2:4], cut.flip))
    assert len(seen) > 5


def test_sizes_are_those_before_and_after_the_picture_was_resized():
    # Twice as large as the target: the crop's place is in the resized picture.
    cut = transforms.Window((60, 20), (13.0, 0.0, 33.0, 20.0), flip=False)
    assert transforms.sizes((20, 60), cut, (10, 10)).tolist() == [20, 60, 0, 6, 10, 10]
    mirrored = cut._replace(flip=True)
    assert transforms.sizes((20, 60), mirrored, (10, 10)).tolist() == [20, 60, 0, 14, 10, 10]


def test_the_original_size_is_before_the_reduced_decoding_and_after_the_rotation():
    photograph = Image.fromarray(ramp(200, 240).repeat(4, 0).repeat(4, 1))
    data = encoded(photograph, "JPEG")
    picture, original = transforms.decode_sized(data, at_least=(64, 64))
    assert (picture.size, original) == ((240, 200), (800, 960))
    exif = photograph.getexif()
    exif[0x0112] = 6
    picture, original = transforms.decode_sized(encoded(photograph, "JPEG", exif=exif))
    assert (picture.size, original) == ((800, 960), (960, 800))
