"""The U-Net: sizes of the published models, any number of axes, conditions, options, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.models import unet
from ldm_jax.nn import once
from ldm_jax.types import Cond
from tests.drawn import count, drawn
from tests.jaxprs import remats

# The models of CompVis/latent-diffusion and Stability: name, network, tokens' width (0: none),
# channels of x, channels of the spatial condition, and the exact number of parameters.
PLAIN = dict(transformer=False)
CELEBA = dict(width=224, mults=(1, 2, 3, 4), attention=(0, 1, 1, 1), head_dim=32, **PLAIN)
CHURCHES = dict(
    width=192,
    mults=(1, 2, 2, 4, 4),
    attention=(1, 1, 1, 1, 0),
    heads=8,
    scale_shift=True,
    resample_blocks=True,
    **PLAIN,
)
INPAINTING = dict(
    width=256, mults=(1, 2, 3, 4), attention=(0, 1, 1, 1), heads=8, resample_blocks=True, **PLAIN
)
BSR_SR = dict(width=160, mults=(1, 2, 2, 4), attention=(0, 0, 0, 1), head_dim=32, **PLAIN)
SEMANTIC = dict(width=128, mults=(1, 4, 8), heads=8, **PLAIN)
SD2 = dict(width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), head_dim=64, projection="linear")
SDXL = dict(
    width=320,
    mults=(1, 2, 4),
    attention=(0, 2, 10),
    middle=10,
    head_dim=64,
    projection="linear",
    vector=2816,
)
MODELS = [
    ("celeba256, ffhq256, lsun_beds256", CELEBA, 0, 3, 0, 274_056_163),
    ("lsun_churches256", CHURCHES, 0, 4, 0, 294_966_916),
    (
        "cin256",
        dict(width=256, mults=(1, 2, 4), attention=(1, 1, 1), head_dim=32),
        512,
        4,
        0,
        394_984_196,
    ),
    (
        "cin256-v2",
        dict(width=192, mults=(1, 2, 3, 5), attention=(0, 1, 1, 1), heads=1),
        512,
        3,
        0,
        400_920_579,
    ),
    (
        "txt2img-1p4B",
        dict(width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), heads=8),
        1280,
        4,
        0,
        872_300_484,
    ),
    (
        "text2img256",
        dict(width=192, mults=(1, 2, 3, 5), attention=(0, 1, 1, 1), head_dim=32),
        640,
        3,
        0,
        403_623_939,
    ),
    (
        "RDM 768",
        dict(width=448, mults=(1, 2, 3, 4), attention=(1, 1, 1, 0), head_dim=32),
        768,
        16,
        0,
        1_335_480_400,
    ),
    ("inpainting_big", INPAINTING, 0, 3, 4, 387_245_827),
    ("bsr_sr", BSR_SR, 0, 3, 3, 113_622_563),
    (
        "layout2img",
        dict(width=128, mults=(1, 2, 3, 4), attention=(0, 3, 3, 3), middle=3, head_dim=32),
        512,
        3,
        0,
        246_277_379,
    ),
    ("semantic_synthesis", SEMANTIC, 0, 3, 3, 215_229_315),
    (
        "SD 1",
        dict(width=320, mults=(1, 2, 4, 4), attention=(1, 1, 1, 0), heads=8),
        768,
        4,
        0,
        859_520_964,
    ),
    ("SD 2", SD2, 1024, 4, 0, 865_910_724),
    ("SDXL", SDXL, 2048, 4, 0, 2_567_463_684),
]


@pytest.mark.parametrize(
    ("kwargs", "tokens", "channels", "spatial", "expected"),
    [m[1:] for m in MODELS],
    ids=[m[0] for m in MODELS],
)
def test_published_models_have_their_exact_number_of_parameters(
    kwargs, tokens, channels, spatial, expected
):
    network = unet.UNet(**kwargs)
    cond = Cond(
        vector=jnp.zeros((1, network.vector)) if network.vector else None,
        tokens=jnp.zeros((1, 2, tokens)) if tokens else None,
        spatial=jnp.zeros((1, 16, 16, spatial)) if spatial else None,
    )
    x = jnp.zeros((1, 16, 16, channels))
    y, variables = jax.eval_shape(
        network.init_with_output, jax.random.key(0), x, jnp.zeros(1), cond
    )
    assert count(variables["params"]) == expected
    assert y.shape == x.shape


SMALL = dict(width=8, mults=(1, 2), blocks=1, attention=(0, 1), heads=2, groups=4)
KEY = jax.random.key(0)
T = jnp.array([0.3, 0.9])


def inputs(*space, channels=3):
    return jax.random.normal(KEY, (2, *space, channels))


@pytest.mark.parametrize("space", [(12,), (4, 6), (2, 4, 6)])
@pytest.mark.parametrize("kind", ["transformer", "plain"])
def test_any_number_of_axes_and_every_condition(space, kind):
    network = unet.UNet(**SMALL, transformer=kind == "transformer", vector=5, out_channels=4)
    cond = Cond(vector=jnp.ones((2, 5)), spatial=jnp.ones((2, *space, 2)))
    if kind == "transformer":
        cond = cond.replace(tokens=jnp.ones((2, 7, 6)), mask=jnp.ones((2, 7), bool))
    y, variables = jax.eval_shape(network.init_with_output, KEY, inputs(*space), T, cond)
    assert y.shape == (2, *space, 4)
    assert variables["params"]["conv_in"]["kernel"].shape == (3,) * len(space) + (5, 8)


def test_stride_per_axis_keeps_the_frames_of_a_video():
    network = unet.UNet(**SMALL, stride=(1, 2, 2))
    x = inputs(3, 4, 4)
    assert jax.eval_shape(network.init_with_output, KEY, x, T)[0].shape == x.shape


def test_branches_start_at_zero(monkeypatch):
    """The initialisers as strings in place of arrays: which leaves are drawn, which are constant."""
    started = {}
    param = unet.nn.Module.param

    def record(self, name, init, *args, **kwargs):
        started["/".join((*self.path, name))] = init
        return param(self, name, init, *args, **kwargs)

    monkeypatch.setattr(unet.nn.Module, "param", record)
    monkeypatch.setattr(once, "once", lambda block, *_: block)  # every block, not one of a kind
    jax.eval_shape(unet.UNet(**SMALL).init, KEY, inputs(4, 4), T)
    zeros = {
        name
        for name, init in started.items()
        if name.endswith("kernel") and init is unet.nn.initializers.zeros
    }
    assert zeros == {
        name
        for name in started
        if name.endswith(("conv2/kernel", "proj_out/kernel", "conv_out/kernel"))
    }
    assert len(zeros) == 8 + 4 + 1


def test_every_condition_changes_only_its_own_sample():
    network, x = unet.UNet(**SMALL, vector=5), inputs(4)
    tokens, mask = jax.random.normal(KEY, (2, 3, 6)), jnp.array([[True, True, False]] * 2)
    cond = Cond(jnp.ones((2, 5)), tokens, mask, jnp.ones((2, 4, 1)))
    variables = drawn(network, x, T, cond)
    apply = jax.jit(lambda t, cond: network.apply(variables, x, t, cond))
    y = apply(T, cond)
    assert np.isfinite(y).all()
    changed = [
        (T.at[1].set(0.1), cond),
        (T, cond.replace(vector=cond.vector.at[1].set(2.0))),
        (T, cond.replace(tokens=tokens.at[1, 0].set(2.0))),
        (T, cond.replace(mask=mask.at[1, 2].set(True))),
        (T, cond.replace(spatial=cond.spatial.at[1].set(2.0))),
    ]
    for t, other in changed:
        out = apply(t, other)
        np.testing.assert_allclose(out[0], y[0], atol=1e-5)
        assert np.abs(out[1] - y[1]).max() > 1e-3
    hidden = apply(T, cond.replace(tokens=tokens.at[:, 2].set(9.0)))
    np.testing.assert_allclose(hidden, y, atol=1e-6)


def test_remat_keeps_the_gradient():
    x, cond = inputs(4), Cond(tokens=jax.random.normal(KEY, (2, 3, 6)))
    kwargs = SMALL | dict(mults=(1,), attention=(1,), middle=0)
    variables = drawn(unet.UNet(**kwargs), x, T, cond)

    def gradient(variables, remat):
        network = unet.UNet(**kwargs, remat=remat)
        return jax.grad(lambda v: jnp.mean(jnp.square(network.apply(v, x, T, cond))))(variables)

    # The blocks are marked for recomputation: 3 of a level down and up, 2 in the middle; 3 transformers.
    def marks(remat):
        return remats(lambda v: gradient(v, remat), variables)

    assert (marks(False), marks(True)) == (0, 3 + 2 + 3)
    plain, remat = (jax.jit(gradient, static_argnums=1)(variables, r) for r in (False, True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), plain, remat)


def test_bf16_has_float32_parameters_and_output():
    x, cond = inputs(4), Cond(tokens=jax.random.normal(KEY, (2, 3, 6)))
    exact, half = (unet.UNet(**SMALL, dtype=dtype) for dtype in (jnp.float32, jnp.bfloat16))
    variables = drawn(half, x, T, cond)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    y, low = (jax.jit(network.apply)(variables, x, T, cond) for network in (exact, half))
    assert low.dtype == jnp.float32
    assert 0 < jnp.linalg.norm(low - y) < 0.05 * jnp.linalg.norm(y)


def test_dropout_needs_train():
    x, network = inputs(4), unet.UNet(**SMALL, dropout=0.5, remat=True)
    variables = drawn(network, x, T)
    jax.eval_shape(lambda: network.apply(variables, x, T))  # wants no rng
    apply = jax.jit(lambda key: network.apply(variables, x, T, Cond(), True, rngs={"dropout": key}))
    first, second, again = (apply(jax.random.key(i)) for i in (1, 2, 1))
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(first, again)


def test_parameter_names():
    shapes = jax.eval_shape(
        unet.UNet(**SMALL, vector=5).init, KEY, inputs(4, 4), T, Cond(vector=jnp.ones((2, 5)))
    )
    names = {
        "/".join(k.key for k in path)
        for path, _ in jax.tree_util.tree_leaves_with_path(shapes["params"])
    }
    assert {
        "time/in/kernel",
        "vector/out/bias",
        "conv_in/kernel",
        "down_0/downsample/conv/kernel",
        "down_1/attn_0/block_0/cross_attn/k/kernel",
        "mid/attn/proj_in/kernel",
        "up_0/res_1/skip/kernel",
        "up_0/upsample/conv/bias",
        "norm_out/scale",
        "conv_out/kernel",
    } <= names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(attention=(1,)), r"attention=\(1,\) has 1 values for 2 levels"),
        (dict(heads=(1, 2, 4)), r"heads=\(1, 2, 4\) has 3 values for 2 levels"),
        (dict(heads=3), "3 heads do not divide 16 channels"),
        (dict(heads=None), "either heads or head_dim"),
        (dict(head_dim=4), "either heads or head_dim"),
        (dict(heads=None, head_dim=5), "head_dim=5 does not divide 16 channels at level 1"),
        (dict(groups=3), "groups=3 does not divide 8 channels"),
        (dict(transformer=False, middle=2), "plain attention has a depth of 0 or 1"),
    ],
)
def test_bad_settings_are_named_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        unet.UNet(**SMALL | change)


@pytest.mark.parametrize(
    ("change", "cond", "message"),
    [
        (dict(transformer=False), Cond(tokens=jnp.ones((2, 3, 4))), "no cross-attention"),
        (dict(attention=(), middle=0), Cond(tokens=jnp.ones((2, 3, 4))), "no cross-attention"),
        (dict(), Cond(mask=jnp.ones((2, 3), bool)), "a mask and no tokens"),
        (
            dict(),
            Cond(vector=jnp.ones((2, 3))),
            r"a vector of width 0 .* has width 3; set vector=3",
        ),
        (dict(vector=4), Cond(), "a vector of width 4 .* has width 0"),
        (dict(), Cond(spatial=jnp.ones((2, 4, 2, 1))), r"\(2, 4, 2, 1\) and x has \(2, 4, 4, 3\)"),
    ],
)
def test_conditions_that_do_not_fit_are_named(change, cond, message):
    network = unet.UNet(**SMALL | change)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(network.init, KEY, inputs(4, 4), T, cond)


def test_a_spatial_shape_that_the_levels_do_not_divide():
    with pytest.raises(
        ValueError, match=r"the stride of 2 levels, 2, does not divide the spatial shape \(4, 5\)"
    ):
        jax.eval_shape(unet.UNet(**SMALL).init, KEY, inputs(4, 5), T)


def test_heads_per_level_and_no_attention_at_all():
    network = unet.UNet(**SMALL | dict(attention=(1, 1), heads=(1, 4)))
    shapes = jax.eval_shape(network.init, KEY, inputs(4, 4), T)["params"]
    assert "attn_0" in shapes["down_0"]
    bare = jax.eval_shape(
        unet.UNet(**SMALL | dict(attention=(), middle=0, heads=None)).init, KEY, inputs(4, 4), T
    )
    assert not any("attn" in str(path) for path, _ in jax.tree_util.tree_leaves_with_path(bare))


def test_coordinates_tell_where_an_element_lies():
    found = unet.positions(jnp.zeros((2, 3, 5, 4)))
    assert found.shape == (2, 3, 5, 2)
    np.testing.assert_allclose(found[1, :, 0, 0], [-1, 0, 1])
    np.testing.assert_allclose(found[0, 2, :, 1], [-1, -0.5, 0, 0.5, 1])


def test_coordinates_are_more_channels_of_the_input():
    network = unet.UNet(width=8, mults=(1,), blocks=1, groups=4, middle=0, coordinates=True)
    x = jnp.zeros((1, 4, 4, 3))
    shapes = jax.eval_shape(network.init, jax.random.key(0), x, jnp.zeros(1))["params"]
    assert shapes["conv_in"]["kernel"].shape == (3, 3, 5, 8)
    assert shapes["conv_out"]["kernel"].shape == (3, 3, 8, 3)
