"""Edits by a pretrained model from a reduced folder: what is kept, what comes back, what is refused."""

import jax
import jaxtyping
import numpy as np
import pytest

from ldm_jax.pretrained import from_pretrained
from ldm_jax.training import sharding
from tests import pretrained_folder as reduced
from tests.test_pretrained import compiled, pictures

PROMPTS = ["a cat on a mat", "red, and Blue!"]
STEPS = 4
X, MASKS = pictures(), np.zeros((2, 16, 16), np.float32)
MASKS[:, 4:10, 8:] = 1


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    folder = reduced.write(tmp_path_factory.mktemp("edits") / "sd")
    return from_pretrained(folder, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def test_inpainting_with_any_model(pipe, caplog):
    """The rest of the picture is exactly the given one; masks, prompts, seeds and strengths do not compile anew."""
    kept = MASKS == 0

    def paint(**options):
        return pipe.inpaint(PROMPTS, X, options.pop("masks", MASKS), steps=STEPS, **options)

    new = paint()
    np.testing.assert_array_equal(new[kept], X[kept])
    assert np.abs(new[~kept] - X[~kept]).max() > 0.1
    found = []
    assert (
        compiled(caplog, lambda: found.append(paint(masks=1 - MASKS, seed=3, guidance=2.0))) == []
    )
    np.testing.assert_array_equal(found[0][~kept], X[~kept])
    assert "jit(draw)" not in compiled(caplog, lambda: paint(strength=0.5))
    # Without pasting, what is kept has passed the autoencoder.
    through = paint(masks=np.zeros_like(MASKS), exact=False)
    np.testing.assert_allclose(through, pipe.decode(pipe.encode(X)), rtol=1e-4, atol=1e-4)


def test_repaint_and_margins(pipe):
    new = pipe.inpaint(PROMPTS, X, MASKS, steps=STEPS, solver="ddpm", repaint=(2, 2))
    np.testing.assert_array_equal(new[MASKS == 0], X[MASKS == 0])
    plain = pipe.inpaint(PROMPTS, X, MASKS, steps=STEPS, solver="ddpm")
    assert np.abs(new - plain).max() > 0.01
    large = pipe.outpaint(PROMPTS, X, (0, 0, 4, 2), steps=STEPS)
    assert large.shape == (2, 16, 22, 3)
    np.testing.assert_array_equal(large[:, :, 4:20], X)


def test_inversions_bring_images_back(pipe):
    back = pipe.decode(pipe.encode(X))
    errors = []
    for iterations in (1, 20):
        z = pipe.invert(X, PROMPTS, steps=8, iterations=iterations)
        assert z.shape == (2, 8, 8, 4)
        again = pipe.text_to_image(PROMPTS, latents=z, steps=8, guidance=1.0)
        errors.append(np.abs(again - back).mean() / np.abs(back).mean())
    assert errors[1] < errors[0] / 3, errors
    same = pipe.edit(PROMPTS, X, PROMPTS, steps=STEPS, strength=0.75, guidance=3.5)
    np.testing.assert_allclose(same, back, rtol=1e-3, atol=1e-3)
    other = pipe.edit(PROMPTS[::-1], X, PROMPTS, steps=STEPS, strength=0.75)
    assert np.abs(other - back).max() > 0.01
    # The more is taken, the more changes; one strength for each image.
    each = pipe.edit(PROMPTS[::-1], X, PROMPTS, steps=STEPS, strength=(0.25, 0.75))
    np.testing.assert_allclose(each[1], other[1], rtol=1e-3, atol=1e-3)
    assert np.abs(each[0] - back[0]).mean() < np.abs(other[0] - back[0]).mean()


def test_diffedit(pipe):
    found = pipe.diffedit(PROMPTS[::-1], X, PROMPTS, steps=STEPS, maps=2, limit=2.5)
    changed = (found != X).any(-1).mean()
    assert 0.01 < changed < 0.9
    given = pipe.diffedit(PROMPTS[::-1], X, PROMPTS, masks=MASKS, steps=STEPS)
    np.testing.assert_array_equal(given[MASKS == 0], X[MASKS == 0])
    assert np.abs(given - X).max() > 0.1


def test_interpolation(pipe):
    frames = pipe.interpolate(PROMPTS, 3, seeds=(5, 9), steps=STEPS)
    assert frames.shape == (3, 16, 16, 3)
    for i, (prompt, seed) in enumerate(zip(PROMPTS, (5, 9), strict=True)):
        end = pipe.text_to_image(prompt, steps=STEPS, seed=seed)[0]
        np.testing.assert_allclose(frames[2 * i], end, rtol=1e-3, atol=1e-3)


def test_large_pictures(pipe, caplog):
    wide = pipe.panorama(PROMPTS, 16, 36, steps=STEPS)
    assert wide.shape == (2, 16, 36, 3)
    assert np.isfinite(wide).all()
    # In one window it is the plain picture.
    one = pipe.panorama(PROMPTS, 16, 16, steps=STEPS)
    np.testing.assert_allclose(one, pipe.text_to_image(PROMPTS, steps=STEPS), rtol=1e-4, atol=1e-4)
    large = pipe.high_resolution(PROMPTS, X, 24, 24, steps=STEPS)
    assert large.shape == (2, 24, 24, 3)
    parts = pipe.high_resolution(PROMPTS, X, 24, 24, steps=STEPS, window=16)
    assert np.abs(parts - large).max() > 1e-3


def test_an_autoencoder_in_tiles(pipe, caplog):
    z = np.random.default_rng(0).standard_normal((1, 12, 20, 4)).astype(np.float32)
    tiled = pipe.with_tiles(8, 4)
    whole, parts = pipe.decode(z), tiled.decode(z)
    assert 0 < np.abs(parts - whole).mean() < 0.3 * np.abs(whole).mean()
    x = pictures(1, 40)
    assert tiled.encode(x).shape == pipe.encode(x).shape
    np.testing.assert_array_equal(tiled.decode(z[:, :8, :8]), pipe.decode(z[:, :8, :8]))
    assert compiled(caplog, lambda: pipe.with_tiles(8, 4).decode(z)) == []


def test_seamless(pipe):
    """Rolled noise gives the rolled picture, along the axis that was asked for."""
    z = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)

    def draw(model, z):
        return model.text_to_image(PROMPTS[0], latents=z, steps=STEPS)

    pipe.text_to_image(PROMPTS[0], latents=z, steps=STEPS)  # its blocks were traced without
    ring = pipe.seamless(height=False)
    picture = draw(ring, z)
    np.testing.assert_allclose(
        draw(ring, np.roll(z, 4, 2)), np.roll(picture, 8, 2), rtol=1e-3, atol=1e-3
    )
    assert np.abs(draw(ring, np.roll(z, 4, 1)) - np.roll(picture, 8, 1)).max() > 0.01
    x = pictures(1)
    np.testing.assert_allclose(
        ring.encode(np.roll(x, 8, 2)), np.roll(ring.encode(x), 4, 2), rtol=1e-3, atol=1e-3
    )


# name: verb, arguments, options, what the error says
WRONG = {
    "masks": ("inpaint", (PROMPTS, X, MASKS[:, :8]), {}, r"masks of shape \(2, 8, 16\)"),
    "strength": ("inpaint", (PROMPTS, X, MASKS), dict(strength=0), r"must be in \(0, 1\]"),
    "strengths": ("edit", (PROMPTS, X), dict(strength=(0.5,) * 3), "3 strengths and 2 images"),
    "a jump": ("inpaint", (PROMPTS, X, MASKS), dict(repaint=(60, 2)), "jump=60 and times=2"),
    "images to inpaint": ("inpaint", (["one"], X, MASKS), {}, "1 prompts and 2 images"),
    "margins": ("outpaint", (PROMPTS, X, (0, 0, 0, 0)), {}, "add nothing"),
    "a margin": (
        "outpaint",
        (PROMPTS, X, (0, 3, 0, 0)),
        {},
        r"the nearest that works is \(20, 16\)",
    ),
    "images to invert": ("invert", (X[:, :15],), {}, r"divides; the nearest is \(16, 16\)"),
    "masks to edit": (
        "diffedit",
        (PROMPTS, X),
        dict(masks=MASKS[:1]),
        r"masks of shape \(1, 16, 16\)",
    ),
    "prompts to edit": ("edit", (["a", "b", "c"], X), {}, "3 prompts and 2 images"),
    "three prompts": ("interpolate", (["a", "b", "c"],), {}, "3 prompts, 2 seeds and n=8"),
    "windows": ("panorama", (PROMPTS, 16, 32), dict(overlap=16), "cannot overlap by 16 pixels"),
    "a large size": ("panorama", (PROMPTS, 16, 33), {}, r"the nearest that works is \(16, 32\)"),
    "a smaller size": ("high_resolution", (PROMPTS, X, 8, 8), {}, "is smaller than the images"),
    "tiles": ("with_tiles", (8, 8), {}, "tiles of 8 cannot overlap by 8"),
    "no axis": ("seamless", (False, False), {}, "make nothing seamless"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_inputs_are_told_before_any_compile(what, pipe, caplog, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    verb, args, options, says = WRONG[what]

    def run():
        with pytest.raises(ValueError, match=says) as told:
            getattr(pipe, verb)(*args, **options)
        assert "\n" not in str(told.value)

    big = {"jit(draw)", "jit(encode)", "jit(decode)", "jit(invert)", "jit(contrast)"}
    assert not big & set(compiled(caplog, run))


def test_tiles_and_a_torus_exclude_each_other(pipe):
    with pytest.raises(ValueError, match="in tiles cannot be made seamless"):
        pipe.with_tiles(8, 4).seamless()
    with pytest.raises(ValueError, match="cannot work in tiles"):
        pipe.seamless().with_tiles(8, 4)
