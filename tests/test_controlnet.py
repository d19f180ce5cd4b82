"""ControlNet, and networks steered by several: what is added, when, under guidance; configs, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax import tree
from ldm_jax.diffusion import conditions, controls, guidance, process, targets
from ldm_jax.models import controlnet, unet
from ldm_jax.types import Cond, Control, Residuals
from ldm_jax.weights import controlnet as their
from ldm_jax.weights import table
from ldm_jax.weights import unet as their_unet
from tests.drawn import count, drawn, like
from tests.exact import PATHS
from tests.published_unets import CONTROLNET, CONTROLNETS

KEY = jax.random.key(0)
UNET = unet.UNet(width=8, mults=(1, 2), blocks=1, heads=2, groups=4)
NET = controlnet.ControlNet(UNET, hint=(4, 6))
X, T = jax.random.normal(KEY, (2, 4, 6, 3)), jnp.array([100.0, 700.0])
TOKENS = jax.random.normal(KEY, (2, 3, 5))
HINT = jax.random.uniform(KEY, (2, 8, 12, 1))
COND = Cond(tokens=TOKENS)


def shapes_of(net=NET, x=X, cond=COND, hint=HINT):
    return jax.eval_shape(net.init, KEY, x, jnp.zeros(len(x)), cond, hint)["params"]


def test_residuals_have_the_shapes_of_what_they_are_added_to():
    skips = [(2, 4, 6, 8), (2, 4, 6, 8), (2, 2, 3, 8), (2, 2, 3, 16)]
    for pool in (False, True):
        net = NET.clone(pool=pool)
        found = jax.eval_shape(net.init_with_output, KEY, X, T, COND, HINT)[0]
        expected = [(2, 1, 1, s[-1]) if pool else s for s in skips]
        assert [s.shape for s in found.skips] == expected
        assert found.mid.shape == expected[-1]
        jax.eval_shape(UNET.init, KEY, X, T, COND.replace(residuals=found))


@pytest.mark.parametrize("space", [(8,), (2, 4, 4)])
def test_any_number_of_axes(space):
    net = NET.clone(unet=UNET.clone(stride=2 if len(space) == 1 else (1, 2, 2)))
    data = tuple(n * s for n, s in zip(space, (1, 2, 2) if space[1:] else (2,), strict=True))
    x, hint = jnp.zeros((2, *space, 3)), jnp.zeros((2, *data, 1))
    found = jax.eval_shape(net.init_with_output, KEY, x, T, COND, hint)[0]
    assert found.skips[0].shape == (2, *space, 8)


def test_a_copy_of_a_unet_starts_by_changing_nothing(monkeypatch):
    """The last layers start at zero: the initialisers themselves, in place of arrays."""
    started = {}
    param = controlnet.nn.Module.param

    def record(self, name, init, *args, **kwargs):
        started["/".join((*self.path, name))] = init
        return param(self, name, init, *args, **kwargs)

    monkeypatch.setattr(controlnet.nn.Module, "param", record)
    shapes_of()
    last = [name for name in started if name.startswith(("zero_", "hint/conv_out"))]
    assert len(last) == 2 * (4 + 1 + 1)
    assert {started[name] for name in last} == {controlnet.nn.initializers.zeros}


def test_parameters_of_the_unet_in_a_controlnet():
    mine = like(shapes_of())
    # A U-Net for inpainting: its conv_in also reads a mask.
    cond = COND.replace(spatial=jnp.zeros((2, 4, 6, 2)))
    theirs = like(jax.eval_shape(UNET.init, KEY, X, T, cond)["params"], seed=1)
    got = controlnet.copied(mine, theirs)
    assert jax.tree.map(jnp.shape, got) == jax.tree.map(jnp.shape, mine)
    for part in ("time", "down_0", "down_1", "mid"):
        assert got[part] is theirs[part]
    for part in ("hint", "zero_0", "zero_mid"):
        assert got[part] is mine[part]
    np.testing.assert_array_equal(got["conv_in"]["kernel"], theirs["conv_in"]["kernel"][:, :, :3])
    assert "up_0" not in got


def fake(i):
    """A ControlNet that adds what it is shown and told."""

    def net(x, t, cond, hint):
        assert cond.controls == ()
        mark = (hint * cond.vector + i * t[:, None])[:, :, None]
        return Residuals((mark,), mark + x[:, :1])

    return net


def network(x, t, cond):
    (skip,), mid = cond.residuals.skips, cond.residuals.mid
    return x * cond.vector[:, None] + skip + 2 * mid


x1, t1 = jax.random.normal(KEY, (2, 3, 1)), jnp.array([100.0, 700.0])
hints = jnp.array([[1.0], [2.0]]), jnp.array([[-3.0], [0.5]])
vector = jnp.array([[2.0], [3.0]])
steered = jax.jit(controls.with_controls(network, fake(1), fake(2)))


def expected(scales, vector=vector):
    marks = [(h * vector + i * t1[:, None])[:, :, None] for i, h in enumerate(hints, 1)]
    total = sum(
        jnp.asarray(s).reshape(-1, 1, 1) * (m + 2 * (m + x1[:, :1]))
        for s, m in zip(scales, marks, strict=True)
    )
    return x1 * vector[:, None] + total


@pytest.mark.parametrize("scales", [(1.0, 1.0), (0.5, 0.0), (jnp.array([0.5, 2.0]), 1.5)])
def test_controls_are_scaled_and_summed(scales):
    cond = Cond(vector=vector, controls=tuple(map(Control, hints, scales)))
    np.testing.assert_allclose(steered(x1, t1, cond), expected(scales), rtol=1e-5)


def test_controls_outside_of_their_interval_are_silent():
    first = Control(hints[0], 1.0, lo=200.0, hi=700.0)
    second = Control(hints[1], 1.0, lo=jnp.array([0.0, 0.0]), hi=jnp.array([100.0, 699.0]))
    y = steered(x1, t1, Cond(vector=vector, controls=(first, second)))
    want = expected((jnp.array([0.0, 1.0]), jnp.array([1.0, 0.0])))
    np.testing.assert_allclose(y, want, rtol=1e-5)


def test_a_silent_net_is_not_run():
    """What it would add is not finite; 0 times that would not be either."""

    def broken(x, t, cond, hint):
        return Residuals((x / 0,), x / 0)

    run = jax.jit(controls.with_controls(network, broken))
    for scale, finite in ((0.0, True), (1.0, False)):
        y = run(x1, t1, Cond(vector=vector, controls=(Control(hints[0], scale),)))
        assert bool(jnp.isfinite(y).all()) == finite


def test_residuals_that_are_given_are_added_too():
    own = Residuals((jnp.ones((2, 3, 1)),), jnp.full((2, 3, 1), 0.25))
    cond = Cond(vector=vector, residuals=own, controls=tuple(map(Control, hints)))
    np.testing.assert_allclose(steered(x1, t1, cond), expected((1.0, 1.0)) + 1.5, rtol=1e-5)


@pytest.mark.parametrize("silent_null", [False, True])
def test_guidance_around_a_steered_network(silent_null):
    path = PATHS["cosine"]
    denoise = process.make_denoiser(steered, path, targets.v())
    t = jnp.array([0.3, 0.6])
    cond = Cond(vector=vector, controls=tuple(map(Control, hints, (0.5, jnp.array([1.0, 2.0])))))
    null = Cond(vector=jnp.zeros((1, 1)))
    steers = cond.controls
    if silent_null:
        steers = tuple(Control(h, 0.0) for h in hints)
        null = null.replace(controls=steers)
    got = guidance.cfg(denoise, null, 3.0)(x1, t, cond)
    positive = denoise(x1, t, cond)
    negative = denoise(x1, t, Cond(vector=jnp.zeros((2, 1)), controls=steers))
    for g, p, n in zip(got, positive, negative, strict=True):
        np.testing.assert_allclose(g, 3 * p - 2 * n, rtol=1e-4, atol=1e-3)


def test_residuals_are_doubled_by_guidance():
    own = Residuals((jnp.ones((2, 3, 1)),), jnp.arange(2.0).reshape(2, 1, 1))
    cond, null = Cond(residuals=own), Cond()
    both = conditions.join((cond, null), 2).residuals
    assert both.skips[0].shape == (4, 3, 1)
    np.testing.assert_array_equal(both.mid.ravel(), [0, 1, 0, 1])
    other = jax.tree.map(lambda a: 5 + a[:1], own)
    both = conditions.join((cond, null.replace(residuals=other)), 2).residuals
    np.testing.assert_array_equal(both.mid.ravel(), [0, 1, 5, 5])
    with pytest.raises(ValueError, match=r"the residuals of the condition .* are not as many"):
        conditions.join((null, cond), 2)
    with pytest.raises(ValueError, match=r"the controls of the condition .* are not as many"):
        conditions.join(
            (Cond(controls=(Control(hints[0]),)), Cond(controls=tuple(map(Control, hints)))), 2
        )


def test_a_unet_adds_residuals_to_its_skips_and_its_middle():
    """Zeros change nothing, and each of them moves its own sample."""
    variables = drawn(UNET, X, T, COND)
    shapes = jax.eval_shape(NET.init_with_output, KEY, X, T, COND, HINT)[0]
    apply = jax.jit(lambda r: UNET.apply(variables, X, T, COND.replace(residuals=r)))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape), shapes)
    plain = jax.jit(lambda: UNET.apply(variables, X, T, COND))()
    np.testing.assert_allclose(apply(zeros), plain, atol=1e-5)
    leaves, kind = jax.tree.flatten(zeros)
    for i, leaf in enumerate(leaves):
        moved = kind.unflatten([*leaves[:i], leaf.at[1].add(1.0), *leaves[i + 1 :]])
        y = apply(moved)
        np.testing.assert_allclose(y[0], plain[0], atol=1e-5)
        assert np.abs(y[1] - plain[1]).max() > 1e-3


def test_guess_mode_grows_tenfold_from_the_finest_skip_to_the_middle():
    one = jnp.ones((1, 2, 1))
    found = jax.jit(controls.guess)(Residuals((one, one), one))
    got = [float(r[0, 0, 0]) for r in (*found.skips, found.mid)]
    np.testing.assert_allclose(got, [0.1, 0.1**0.5, 1.0], rtol=1e-6)


@pytest.mark.parametrize("name", CONTROLNETS)
def test_published_configs_and_back(name):
    config, number = CONTROLNETS[name]
    net = their.from_config(config)
    shapes = jax.eval_shape(net.init, KEY, *their.example(config))["params"]
    assert count(shapes) == number
    names = [table.their_name(their.table_of(config), at) for at in tree.names(shapes)]
    assert None not in names
    assert len(set(names)) == len(names)
    back = their.to_config(net, shapes, their_unet.embedding_of(config))
    assert their.from_config(back) == net
    assert net.pool == (name == "shuffle")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(_class_name="ControlNetXSAdapter"), "that of a ControlNetXSAdapter"),
        (dict(controlnet_conditioning_channel_order="bgr"), "channel_order = 'bgr'"),
        (dict(mid_block_type="UNetMidBlock2D"), "mid_block_type"),
        (dict(act_fn="gelu"), "this ControlNet asks for what we lack: act_fn"),
    ],
)
def test_configs_that_ask_for_what_we_lack(change, message):
    with pytest.raises(ValueError, match=message):
        their.from_config(CONTROLNET | change)


def test_what_diffusers_lacks():
    net = NET.clone(unet=UNET.clone(dropout=0.1))
    with pytest.raises(ValueError, match="no dropout"):
        their.to_config(net, shapes_of(net))


def test_inputs_that_do_not_fit_are_told():
    with pytest.raises(ValueError, match=r"hint has shape \(2, 8, 8, 1\) .* hints \[2, 8, 12, ch"):
        shapes_of(hint=HINT[:, :, :8])
    with pytest.raises(ValueError, match="a vector of width 0"):
        shapes_of(cond=COND.replace(vector=jnp.ones((2, 3))))
    few = Residuals((jnp.ones((2, 1, 1, 8)),), jnp.ones((2, 2, 3, 16)))
    with pytest.raises(ValueError, match=r"the residuals have the shapes \[\(2, 1, 1, 8\)"):
        jax.eval_shape(UNET.init, KEY, X, T, COND.replace(residuals=few))
    with pytest.raises(ValueError, match="wrap the network with"):
        jax.eval_shape(UNET.init, KEY, X, T, COND.replace(controls=(Control(HINT),)))
    with pytest.raises(ValueError, match="1 controls for 2 ControlNets"):
        steered(x1, t1, Cond(vector=vector, controls=(Control(hints[0]),)))
    with pytest.raises(ValueError, match="0 residuals and 1 scales"):
        controls.combine([], [1.0])


def test_spatial_conditions_are_for_the_unet_unless_asked_for():
    cond = COND.replace(spatial=jnp.zeros((2, 4, 6, 2)))
    for spatial, channels in ((False, 3), (True, 5)):
        shapes = shapes_of(NET.clone(spatial=spatial), cond=cond)
        assert shapes["conv_in"]["kernel"].shape[-2] == channels
