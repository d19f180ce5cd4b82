"""The diffusion transformer: sizes of the published models, any number of axes, conditions, taps, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import dit
from ldm_jax.nn import embeddings, modulated, taps
from ldm_jax.types import Cond
from tests.drawn import count, drawn
from tests.jaxprs import remats

KEY = jax.random.key(0)
T = jnp.array([0.3, 0.9])
WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# All parameters of the authors' code for latents of 32 x 32 x 4 and 1000 classes.
PUBLISHED = {
    ("S", 2): 32_963_360,
    ("S", 4): 32_945_024,
    ("S", 8): 33_148_160,
    ("B", 2): 130_512_416,
    ("B", 4): 130_475_648,
    ("B", 8): 130_881_536,
    ("L", 2): 458_102_816,
    ("L", 4): 458_053_760,
    ("L", 8): 458_594_816,
    ("XL", 2): 675_129_632,
    ("XL", 4): 675_074_432,
    ("XL", 8): 675_683_072,
}
SMALL = dict(width=8, depth=2, heads=2)


@pytest.mark.parametrize(("size", "patch"), PUBLISHED)
def test_published_models_have_their_exact_number_of_parameters(size, patch):
    width, depth, heads = WIDTHS[size]
    network = dit.DiT(width, depth, heads, patch, variance=True)
    cond = Cond(vector=jnp.zeros((1, width)))
    x = jnp.zeros((1, 32, 32, 4))
    y, variables = jax.eval_shape(network.init_with_output, KEY, x, jnp.zeros(1), cond)
    assert y.shape == (1, 32, 32, 8)
    classes, positions = 1001 * width, (32 // patch) ** 2 * width
    assert count(variables["params"]) + classes + positions == PUBLISHED[size, patch]


def inputs(*space, channels=3):
    return jax.random.normal(KEY, (2, *space, channels))


@pytest.mark.parametrize(
    ("space", "patch"), [((12,), 4), ((4, 6), 2), ((3, 4, 6), (1, 2, 2)), ((4, 4, 2), 2)]
)
def test_any_number_of_axes_and_every_condition(space, patch):
    network = dit.DiT(**SMALL, patch=patch, out_channels=5)
    cond = Cond(vector=jnp.ones((2, 8)), spatial=jnp.ones((2, *space, 2)))
    y, variables = jax.eval_shape(network.init_with_output, KEY, inputs(*space), T, cond)
    assert y.shape == (2, *space, 5)
    size = (patch,) * len(space) if isinstance(patch, int) else patch
    assert variables["params"]["patches"]["kernel"].shape == (*size, 5, 8)


def test_patches_are_read_row_by_row_and_put_back():
    x = jnp.arange(2.0 * 4 * 6 * 3).reshape(2, 4, 6, 3)
    y = dit.split(x, (2, 3))
    assert y.shape == (2, 2, 2, 18)
    np.testing.assert_array_equal(y[1, 0, 1].reshape(2, 3, 3), x[1, :2, 3:])
    np.testing.assert_array_equal(dit.joined(y, (2, 3)), x)
    video = jnp.arange(4.0 * 2 * 6).reshape(1, 4, 2, 6, 1)
    np.testing.assert_array_equal(dit.joined(dit.split(video, (4, 1, 2)), (4, 1, 2)), video)


def test_positions_are_sinusoids_of_each_axis_the_last_one_first():
    found = embeddings.places((3, 5), 12)
    w = 10_000.0 ** -(np.arange(3) / 3)
    for row, column in ((0, 0), (2, 1), (1, 4)):
        wanted = [np.sin(column * w), np.cos(column * w), np.sin(row * w), np.cos(row * w)]
        np.testing.assert_allclose(found[row, column], np.concatenate(wanted), atol=1e-6)
    odd = embeddings.places((2, 2, 2), 8)  # of 8, one pair for each of three axes
    assert odd.shape == (2, 2, 2, 8)
    assert not odd[..., 6:].any()
    np.testing.assert_allclose(odd[0, 1, 0, 2:4], [np.sin(1), np.cos(1)], atol=1e-6)
    with pytest.raises(ValueError, match="a width of 4 is too small for positions along 3 axes"):
        embeddings.places((2, 2, 2), 4)


def test_it_starts_at_zero_and_its_kernels_like_the_authors(monkeypatch):
    network = dit.DiT(width=64, depth=1, heads=2)
    x = inputs(4, 4)
    params = jax.jit(network.init)(KEY, x, T)["params"]
    block = params["block_0"]
    silent = (block["modulation"], params["last"]["modulation"], params["last"]["linear"])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(silent))
    assert np.abs(block["attn"]["q"]["kernel"]).max() == pytest.approx(
        np.sqrt(6 / (64 + 3 * 64)), rel=0.01
    )
    for kernel, rows in ((block["attn"]["out"]["kernel"], 64), (block["ff"]["in"]["kernel"], 256)):
        assert np.abs(kernel).max() == pytest.approx(np.sqrt(6 / (64 + rows)), rel=0.01)
    patches = params["patches"]["kernel"]
    assert np.abs(patches).max() == pytest.approx(np.sqrt(6 / (12 + 64)), rel=0.02)
    assert np.std(params["time"]["out"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    h = inputs(4, 4, channels=64)
    emb = jnp.ones((2, 64))
    same = modulated.Block(heads=2).apply({"params": block}, h, emb)
    np.testing.assert_array_equal(same, h)


def test_every_condition_changes_only_its_own_sample():
    network, x = dit.DiT(**SMALL, patch=2), inputs(4, 4)
    cond = Cond(vector=jnp.ones((2, 8)), spatial=jnp.ones((2, 4, 4, 1)))
    variables = drawn(network, x, T, cond)
    apply = jax.jit(lambda x, t, cond: network.apply(variables, x, t, cond))
    y = apply(x, T, cond)
    assert np.isfinite(y).all()
    changed = [
        (x, T.at[1].set(0.1), cond),
        (x.at[1, 0, 0].set(2.0), T, cond),
        (x, T, cond.replace(vector=cond.vector.at[1].set(2.0))),
        (x, T, cond.replace(spatial=cond.spatial.at[1].set(2.0))),
    ]
    for given in changed:
        out = apply(*given)
        np.testing.assert_allclose(out[0], y[0], atol=1e-5)
        assert np.abs(out[1] - y[1]).max() > 1e-3
    # Attention goes everywhere, and positions are told apart.
    far = apply(*changed[1])
    assert np.abs(far[1, 2:, 2:] - y[1, 2:, 2:]).max() > 1e-4
    flat = apply(jnp.ones_like(x), T, cond)
    assert np.abs(flat[:, :2, :2] - flat[:, 2:, 2:]).max() > 1e-3


def test_remat_keeps_the_gradient_and_bf16_the_parameters():
    x = inputs(4)
    variables = drawn(dit.DiT(**SMALL), x, T)

    def gradient(variables, remat):
        network = dit.DiT(**SMALL, remat=remat)
        return jax.grad(lambda v: jnp.mean(jnp.square(network.apply(v, x, T))))(variables)

    def marks(remat):
        return remats(lambda v: gradient(v, remat), variables)

    assert (marks(False), marks(True)) == (0, 2)
    plain, remat = (jax.jit(gradient, static_argnums=1)(variables, r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, remat)

    half = dit.DiT(**SMALL, dtype=jnp.bfloat16)
    shapes = jax.eval_shape(half.init, KEY, x, T)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    near = jax.jit(half.apply)(variables, x, T)
    assert near.dtype == jnp.float32
    np.testing.assert_allclose(near, dit.DiT(**SMALL).apply(variables, x, T), atol=0.1)


def test_attention_is_seen_and_changed_from_outside():
    network, x = dit.DiT(**SMALL, patch=2), inputs(4, 6)
    variables = drawn(network, x, T)

    def apply(x, t, cond):
        return network.apply(variables, x, t, cond)

    out, maps = taps.with_maps(apply, of_tokens=False, blocks=("block_1",))(x, T, Cond())
    assert {k: v.shape for k, v in maps.items()} == {"block_1/attn": (2, 2, 2, 3, 6)}
    np.testing.assert_allclose(maps["block_1/attn"].sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(out, apply(x, T, Cond()), rtol=1e-5, atol=1e-6)
    perturbed = taps.with_identity(apply, ("block_0",))(x, T, Cond())
    assert np.abs(perturbed - out).max() > 1e-3
    with pytest.raises(
        ValueError, match=r"no self-attention lies in the block 'mid'.*block_0/attn"
    ):
        taps.with_identity(apply, ("mid",))(x, T, Cond())
    taps.check_blocks(variables["params"], ("block_0", "block_."))
    with pytest.raises(
        ValueError, match=r"'mid' of this network, which has \['block_0/attn', 'blo"
    ):
        taps.check_blocks(variables["params"], ("mid",))
    with pytest.raises(ValueError, match="no cross-attention, which reads tokens"):
        taps.with_maps(apply, of_tokens=True)(x, T, Cond())


@pytest.mark.parametrize(
    ("space", "cond", "message"),
    [
        ((4, 5), Cond(), r"the patch of this DiT, 2, does not divide the spatial shape \(4, 5\)"),
        ((4, 4), Cond(tokens=jnp.ones((2, 3, 4))), "has tokens and a DiT has no cross-attention"),
        ((4, 4), Cond(vector=jnp.ones((2, 3))), "its own width 8 .* has width 3; set .*width=8"),
        ((4, 4), Cond(spatial=jnp.ones((2, 4, 2, 1))), r"\(2, 4, 2, 1\) and x has \(2, 4, 4, 3\)"),
        ((4, 4), Cond(controls=(1,)), "of a ControlNet, which are for U-Nets"),
    ],
)
def test_inputs_that_do_not_fit_are_named(space, cond, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(dit.DiT(**SMALL).init, KEY, inputs(*space), T, cond)


def test_bad_settings_are_named_at_construction():
    with pytest.raises(ValueError, match="3 heads do not divide 8 channels"):
        dit.DiT(**SMALL | dict(heads=3))
