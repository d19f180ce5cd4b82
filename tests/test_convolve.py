"""Convolutions by their device: what a CPU does is what XLA's own convolution gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ldm_jax.flops import NOWHERE
from ldm_jax.nn import conv, convolve
from tests.drawn import drawn
from tests.jaxprs import occurrences

KEY = jax.random.key(0)
# space, kernel, stride, padding; 32 channels, so that 2 samples have fewer positions than channels
CASES = [
    ((4, 4), (3, 3), (1, 1), ((1, 1), (1, 1))),
    ((5, 6), (3, 3), (2, 2), ((0, 1), (1, 1))),
    ((8,), (2,), (1,), ((1, 0),)),
    ((2, 4, 4), (1, 3, 3), (1, 2, 2), ((0, 0), (1, 1), (0, 1))),
]


def without_kernels(f, given):
    """The same by XLA's own convolutions."""
    with pytest.MonkeyPatch.context() as patched:
        for module in (conv, convolve):
            patched.setattr(module, "platform", lambda: "none")
        return jax.jit(lambda given: f(given))(given)


def test_patches_are_the_convolution():
    rng = np.random.default_rng(0)
    given = []
    for space, size, _, _ in CASES:
        x = rng.standard_normal((2, *space, 32)).astype(np.float32)
        given.append((x, rng.standard_normal((*size, 32, 5)).astype(np.float32)))

    def outputs(given):
        pairs = zip(given, CASES, strict=True)
        return [convolve.convolve(*pair, *case[2:]) for pair, case in pairs]

    def everything(given):
        def loss(given):
            return sum((y**2).sum() for y in outputs(given))

        return outputs(given), jax.grad(loss)(given)

    assert occurrences(jax.make_jaxpr(outputs)(given).jaxpr, ("conv_general_dilated",)) == 0
    got = jax.jit(everything)(given)
    expected = without_kernels(everything, given)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, expected)


def test_many_positions_are_left_to_xla():
    for side, patches in ((4, True), (6, False)):  # 32 and 72 positions
        x, kernel = jnp.zeros((2, side, side, 32)), jnp.zeros((3, 3, 32, 8))
        same = ((1, 1), (1, 1))
        jaxpr = jax.make_jaxpr(lambda x, k: convolve.convolve(x, k, (1, 1), same))(x, kernel)
        found = occurrences(jaxpr.jaxpr, ("conv_general_dilated",))
        assert (found == 0) == patches


def test_a_doubled_array_is_convolved_as_if_it_were_written_out():
    strides = {1: [2], 2: [2, (1, 2)], 3: [(1, 2, 2), 2]}
    cases = [(rank, stride) for rank, several in strides.items() for stride in several]
    given = []
    for rank, stride in cases:
        x = jax.random.normal(KEY, (1, *(3, 4, 2)[:rank], 4))
        given.append((drawn(conv.Upsample(stride), x), x))

    def outputs(given):
        pairs = zip(given, cases, strict=True)
        return [conv.Upsample(stride).apply(*pair) for pair, (_, stride) in pairs]

    def everything(given):
        return outputs(given), jax.grad(lambda g: sum((y**2).sum() for y in outputs(g)))(given)

    got = jax.jit(everything)(given)
    expected = without_kernels(everything, given)
    with jax.sharding.use_abstract_mesh(NOWHERE):
        jaxpr = jax.make_jaxpr(lambda given: outputs(given))(given).jaxpr
    # One convolution each there; here one for each parity.
    assert occurrences(jaxpr, ("conv_general_dilated",)) == len(cases)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, expected)


def test_weights_of_a_doubled_array_are_summed_before_they_are_rounded():
    x = jax.random.normal(KEY, (1, 3, 3, 4)).astype(jnp.bfloat16)
    kernel = jax.random.normal(jax.random.key(1), (3, 3, 4, 4))
    got = convolve.convolve_doubled(x, kernel, (True, True))
    assert got.dtype == jnp.bfloat16
    exact = np.zeros((1, 6, 6, 4))
    wide = np.pad(np.asarray(conv.nearest(x, 2), np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    for i, j in itertools.product(range(3), repeat=2):
        exact += wide[:, i : i + 6, j : j + 6] @ np.asarray(kernel, np.float64)[i, j]
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=0.02 * np.abs(exact).max())


def test_other_convolutions_of_repeated_arrays_are_written_out():
    x = jax.random.normal(KEY, (1, 4, 4))
    for settings in (dict(kernel=1, repeat=2), dict(kernel=3, repeat=3)):
        module = conv.Conv(2, **settings)
        variables = drawn(module, x)
        plain = conv.Conv(2, settings["kernel"])
        expected = plain.apply(variables, conv.nearest(x, settings["repeat"]))
        np.testing.assert_allclose(module.apply(variables, x), expected, atol=1e-6)
    numbers = ("NWC", "WIO", "NWC")
    kernel = variables["params"]["kernel"]
    y = lax.conv_general_dilated(
        conv.nearest(x, 3), kernel, (1,), [(1, 1)], dimension_numbers=numbers
    )
    np.testing.assert_allclose(expected, y + variables["params"]["bias"], atol=1e-5)
