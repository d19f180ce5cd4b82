"""Edits by a pretrained model from a reduced folder: what is kept, what comes back, what is refused."""

import jax
import jaxtyping
import numpy as np
import pytest

from ldm_jax.pretrained import from_pretrained
from ldm_jax.training import sharding
from tests import pretrained_folder as reduced
from tests.test_pretrained import compiled, pictures

pytestmark = pytest.mark.slow
PROMPTS = ["a cat on a mat", "red, and Blue!"]
STEPS = 4
X, MASKS = pictures(), np.zeros((2, 16, 16), np.float32)
MASKS[:, 4:10, 8:] = 1


SMALL = dict(
    block_out_channels=[8],
    down_block_types=["CrossAttnDownBlock2D"],
    up_block_types=["CrossAttnUpBlock2D"],
)
# Programs are compiled once for many tests: one number of steps, no guidance unless it matters.
PLAIN = dict(steps=STEPS, guidance=1.0)


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    """A model of one level."""
    folder = reduced.write(tmp_path_factory.mktemp("edits") / "sd", **SMALL)
    return from_pretrained(folder, mesh=sharding.make_mesh(devices=jax.devices()[:1]))


def test_inpainting_with_any_model(pipe, caplog):
    """The rest of the picture is exactly the given one; masks, seeds and prompts do not compile anew."""
    kept = MASKS == 0

    def paint(masks=MASKS, **options):
        return pipe.inpaint(PROMPTS, X, masks, **PLAIN | options)

    new = paint()
    np.testing.assert_array_equal(new[kept], X[kept])
    assert np.abs(new[~kept] - X[~kept]).max() > 0.1
    found = []
    pipe.encode(X)
    assert compiled(caplog, lambda: found.append(paint(1 - MASKS, seed=3))) == []
    np.testing.assert_array_equal(found[0][~kept], X[~kept])
    weak = paint(strength=0.5)
    assert np.abs(weak - new)[~kept].max() > 0.01
    # Without pasting, what is kept has passed the autoencoder.
    through = paint(np.zeros_like(MASKS), exact=False)
    np.testing.assert_allclose(through, pipe.decode(pipe.encode(X)), rtol=1e-4, atol=1e-4)
    # Margins are a mask as well.
    large = pipe.outpaint(PROMPTS, X[:, :, :10], (0, 0, 4, 2), **PLAIN)
    assert large.shape == X.shape
    np.testing.assert_array_equal(large[:, :, 4:14], X[:, :, :10])
    again = pipe.inpaint(PROMPTS, X, MASKS, solver="ddpm", repaint=(2, 2), **PLAIN)
    np.testing.assert_array_equal(again[kept], X[kept])
    assert np.abs(again - new)[~kept].max() > 0.01


def test_inversions_bring_images_back(pipe):
    back = pipe.decode(pipe.encode(X))
    # Estimates of the noise that vary less than the latents: only then can steps be inverted.
    network = dict(pipe.params["network"])
    network["conv_out"] = jax.tree.map(lambda a: a / 300, network["conv_out"])
    tame = pipe.with_params({"unet": network})
    z = tame.invert(X, PROMPTS, steps=STEPS)
    assert z.shape == (2, 8, 8, 4)
    again = tame.text_to_image(PROMPTS, latents=z, **PLAIN)
    assert np.abs(again - back).mean() < 0.1 * np.abs(back).mean()
    same = dict(steps=STEPS, guidance=1.0, source_guidance=1.0)
    brought = pipe.edit(PROMPTS, X, PROMPTS, strength=0.75, **same)
    np.testing.assert_allclose(brought, back, rtol=1e-3, atol=1e-3)
    other = pipe.edit(PROMPTS[::-1], X, PROMPTS, strength=0.75, **same)
    assert np.abs(other - back).max() > 0.01


def test_diffedit(pipe):
    found = pipe.diffedit(PROMPTS[::-1], X, PROMPTS, maps=2, limit=2.5, **PLAIN)
    changed = (found != X).any(-1).mean()
    assert 0.01 < changed < 0.9
    given = pipe.diffedit(PROMPTS[::-1], X, PROMPTS, masks=MASKS, **PLAIN)
    np.testing.assert_array_equal(given[MASKS == 0], X[MASKS == 0])
    assert np.abs(given - X).max() > 0.1


def test_interpolation(pipe):
    frames = pipe.interpolate(PROMPTS, 3, seeds=(5, 6), **PLAIN)
    assert frames.shape == (3, 16, 16, 3)
    ends = pipe.text_to_image(PROMPTS, seed=5, **PLAIN)
    np.testing.assert_allclose(frames[::2], ends, rtol=1e-3, atol=1e-3)


def test_large_pictures(pipe):
    wide = pipe.panorama(PROMPTS, 16, 28, **PLAIN)
    assert wide.shape == (2, 16, 28, 3)
    assert np.isfinite(wide).all()
    assert np.abs(wide - pipe.panorama(PROMPTS, 16, 28, seed=1, **PLAIN)).max() > 0.1
    parts = pipe.high_resolution(PROMPTS, X, 16, 28, window=16, **PLAIN)
    assert parts.shape == (2, 16, 28, 3)
    assert np.abs(parts - wide).max() > 0.1
    # At its own size and in one piece it is image_to_image.
    one = pipe.high_resolution(PROMPTS, X, 16, 16, strength=0.5, **PLAIN)
    same = pipe.image_to_image(PROMPTS, X, strength=0.5, **PLAIN)
    np.testing.assert_allclose(one, same, rtol=1e-4, atol=1e-4)
    each = pipe.image_to_image(PROMPTS, X, strength=(0.5, 1.0), **PLAIN)
    np.testing.assert_allclose(each[0], same[0], rtol=1e-4, atol=1e-4)
    assert np.abs(each[1] - same[1]).max() > 0.01


def test_an_autoencoder_in_tiles(pipe, caplog):
    z = np.random.default_rng(0).standard_normal((2, 8, 14, 4)).astype(np.float32)
    tiled = pipe.with_tiles(8, 4)
    whole, parts = pipe.decode(z), tiled.decode(z)
    assert 0 < np.abs(parts - whole).mean() < 0.3 * np.abs(whole).mean()
    assert compiled(caplog, lambda: pipe.with_tiles(8, 4).decode(z)) == []
    x = np.concatenate([X, X[:, :, :12]], axis=2)
    assert tiled.encode(x).shape == (2, 8, 14, 4)


def test_seamless(pipe):
    """Rolled noise gives the rolled picture, along the axis that was asked for."""
    z = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    pipe.text_to_image(PROMPTS, **PLAIN)  # blocks that were traced without are not taken for these
    ring = pipe.seamless(height=False)

    def draw(z):
        return ring.text_to_image(PROMPTS, latents=z, **PLAIN)

    picture = draw(z)
    np.testing.assert_allclose(draw(np.roll(z, 4, 2)), np.roll(picture, 8, 2), atol=1e-3)
    assert np.abs(draw(np.roll(z, 4, 1)) - np.roll(picture, 8, 1)).max() > 0.01
    rolled = ring.encode(np.roll(X, 8, 2))
    np.testing.assert_allclose(rolled, np.roll(ring.encode(X), 4, 2), atol=1e-3)


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
    "pairs": ("prompt_to_prompt", ("a", PROMPTS), {}, "1 source prompts and 2 prompts"),
    "a noisy pair": ("prompt_to_prompt", ("a", "b"), dict(solver="ddpm"), "pairs need the same"),
    "a share": ("prompt_to_prompt", ("a", "b"), dict(cross=1.2), r"cross=1.2 must be in \[0, 1\]"),
    "a word": (
        "prompt_to_prompt",
        ("a", "b"),
        dict(weights={"cat": 2.0}),
        "the word 'cat' is in none of the prompts",
    ),
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


def test_prompt_to_prompt(pipe):
    same, again = pipe.prompt_to_prompt(PROMPTS[0], PROMPTS[0], **PLAIN)
    np.testing.assert_allclose(same, again, rtol=1e-4, atol=1e-4)
    source, edited = pipe.prompt_to_prompt(PROMPTS[0], "a red on a mat", cross=1.0, **PLAIN)
    _, free = pipe.prompt_to_prompt(PROMPTS[0], "a red on a mat", cross=0.0, own=0.0, **PLAIN)
    np.testing.assert_allclose(source, same, rtol=1e-4, atol=1e-4)
    assert np.abs(edited - source).max() > 1e-3
    assert np.abs(edited - free).max() > 1e-3
    _, more = pipe.prompt_to_prompt(
        PROMPTS[0], "a red on a mat", cross=1.0, weights={"red": 4.0}, **PLAIN
    )
    assert np.abs(more - edited).max() > 1e-3
