"""Convolutions by their device: what a CPU does is what XLA's own convolution gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from ldm_jax.flops import NOWHERE, _of_jaxpr
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


WIDE = convolve.CHANNELS
# space, kernel, padding; an axis whose results are even in number and whose kernel is of three is among them
PAIRED = [
    ((98,), (3,), ((0, 0),)),
    ((9, 8), (3, 3), ((1, 1), (1, 1))),
    ((8, 7), (3, 3), ((2, 1), (0, 1))),
    ((3, 6, 4), (1, 3, 3), ((0, 0), (1, 1), (1, 1))),
]


def products(f, *given):
    """Multiplications and additions of `f` as this machine does it."""
    return _of_jaxpr(jax.make_jaxpr(f)(*given).jaxpr)


@pytest.mark.parametrize(("space", "size", "padding"), PAIRED)
def test_pairs_of_results_take_two_thirds_of_the_products(space, size, padding):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, *space, WIDE)).astype(np.float32)
    kernel = rng.standard_normal((*size, WIDE, WIDE)).astype(np.float32)

    def output(x, kernel):
        return convolve.convolve(x, kernel, (1,) * len(space), padding)

    exact = without_kernels(lambda given: output(*given), (x, kernel))
    got = jax.jit(output)(x, kernel)
    np.testing.assert_allclose(got, exact, atol=2e-6 * float(jnp.abs(exact).max()))
    whole = 2 * exact.size * WIDE * np.prod(size)
    assert products(output, x, kernel) == whole * 2 / 3
    # Fewer channels, and numbers whose sums would be rounded, are left to XLA.
    assert products(output, x[..., 1:], kernel[..., 1:, :]) == whole * (WIDE - 1) / WIDE
    assert products(output, x.astype(jnp.bfloat16), kernel.astype(jnp.bfloat16)) == whole


@pytest.mark.parametrize("small", [True, False])
def test_differences_of_a_doubled_array_take_three_products_of_four(small, monkeypatch):
    monkeypatch.setattr(convolve, "SMALL", 2**20 if small else 0)
    for doubled in ((True,), (True, True), (False, True)):
        x = jax.random.normal(KEY, (1, *(11, 7)[: len(doubled)], WIDE))
        kernel = jax.random.normal(KEY, (*(3,) * len(doubled), WIDE, WIDE))

        def output(x, kernel, doubled=doubled):
            return convolve.convolve_doubled(x, kernel, doubled)

        wide = conv.nearest(x, [1 + twice for twice in doubled])
        exact = convolve._plain(wide, kernel, (1,) * len(doubled), ((1, 1),) * len(doubled))
        got = jax.jit(output)(x, kernel)
        np.testing.assert_allclose(got, exact, atol=2e-6 * float(jnp.abs(exact).max()))
        by_axis = {(True,): [1 / 2], (True, True): [1 / 2, 1 / 2 if small else 2 / 3]}
        share = np.prod(by_axis.get(doubled, [1 / 2]))
        whole = 2 * exact.size * WIDE * 3 ** len(doubled)
        assert products(output, x, kernel) == pytest.approx(whole * share)


def test_a_derivative_is_that_of_the_whole_convolution():
    x = jax.random.normal(KEY, (1, 9, 8, WIDE))
    kernel = jax.random.normal(KEY, (3, 3, WIDE, WIDE))

    def outputs(given):
        same = ((1, 1), (1, 1))
        return convolve.convolve(*given, (1, 1), same), convolve.convolve_doubled(
            *given, (True, True)
        )

    def loss(given):
        return sum((y**2).mean() for y in outputs(given))

    got, expected = (
        jax.jit(jax.grad(loss))((x, kernel)),
        without_kernels(jax.grad(loss), (x, kernel)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)
    jaxpr = jax.make_jaxpr(jax.grad(loss))((x, kernel)).jaxpr
    # Outputs, and two gradients each, of one convolution and of the four parities of the other.
    assert occurrences(jaxpr, ("conv_general_dilated", "dot_general")) == 3 * (1 + 4)


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
