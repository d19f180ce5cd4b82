"""The structure of Inception-v3; that its numbers are right is shown in tests/parity/test_metrics.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax.metrics import resizing
from ldm_jax.models import inception
from ldm_jax.models.lpips import LPIPS
from ldm_jax.weights import features, table


@pytest.fixture(scope="module")
def shapes():
    example = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    return jax.eval_shape(inception.InceptionV3().init, jax.random.key(0), example)


def test_it_has_the_published_number_of_parameters(shapes):
    """torchvision's 27,161,264 less 3,326,696 of its second head, and 8 classes of 2,049 numbers more."""
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert count == 27_161_264 - 3_326_696 + 8 * 2_049


def test_activations_are_those_of_the_metrics(shapes):
    example = jax.ShapeDtypeStruct((2, 299, 299, 3), jnp.float32)
    found = jax.eval_shape(inception.InceptionV3().apply, shapes, example)
    assert [of.shape for of in found] == [(2, 2048), (2, 17 * 17 * 7), (2, 1008)]


def test_the_table_has_a_row_for_every_tensor(shapes):
    tensors = {
        place.name: jax.ShapeDtypeStruct(
            table.their_shape(name, leaf.shape, place.layout), leaf.dtype
        )
        for name, leaf, place in (
            (name, leaf, table.find(features.INCEPTION, name))
            for name, leaf in zip(table.tree.names(shapes), jax.tree.leaves(shapes), strict=True)
        )
    }
    assert len(tensors) == 94 * 5 + 2  # convolutions with norms, and the last layer
    assert tensors["Mixed_6d.branch7x7dbl_2.conv.weight"].shape == (160, 160, 7, 1)
    assert tensors["Conv2d_1a_3x3.bn.running_var"].shape == (32,)
    tensors["fc.num_batches_tracked"] = jax.ShapeDtypeStruct((), jnp.float32)
    table.check(features.INCEPTION, shapes, tensors, features.INCEPTION_IGNORED)
    del tensors["fc.bias"]
    with pytest.raises(table.Mismatch, match=r"missing: 'fc\.bias'"):
        table.check(features.INCEPTION, shapes, tensors, features.INCEPTION_IGNORED)


def test_pools_leave_the_padding_out():
    x = jnp.full((1, 4, 5, 1), -3.0)
    np.testing.assert_allclose(inception.mean_pool(x), x)
    np.testing.assert_allclose(inception.max_pool(x), x)


def test_the_table_of_lpips_reads_either_set_of_names():
    example = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(LPIPS().init, jax.random.key(0), example, example)
    names = zip(table.tree.names(shapes), jax.tree.leaves(shapes), strict=True)
    for given, last in ((["net.slice1.0.weight"], "net.slice5.28"), ([], "features.28")):
        rows = features.lpips_table(given)
        assert table.their_name(rows, "params/trunk/conv5_3/kernel") == f"{last}.weight"
        assert table.their_name(rows, "params/weight_4") == "lin4.model.1.weight"
        assert all(table.find(rows, name) for name, _ in names)


def test_weights_in_two_files_must_not_overlap(tmp_path):
    for name in "ab":
        features.files.write(tmp_path / f"{name}.safetensors", {"w": np.ones(2, np.float32)})
    with pytest.raises(ValueError, match="'w', which another of the files has"):
        features.read([tmp_path / "a.safetensors", tmp_path / "b.safetensors"])


def test_tensorflow_resizing_in_closed_form():
    """Pixel i of n lies at i * size / n, and what lies beyond the last pixel repeats it."""
    row = np.array([0, 100, 40, 20], np.float32).reshape(1, 1, 4, 1).repeat(3, axis=1)
    found = np.asarray(resizing.tensorflow(jnp.asarray(row), 8))
    np.testing.assert_allclose(found[0, 0, :, 0], [0, 50, 100, 70, 40, 30, 20, 20])
    assert found.shape == (1, 8, 8, 1)
    half = np.asarray(resizing.tensorflow(jnp.asarray(row), 2))
    np.testing.assert_allclose(half[0, 0, :, 0], [0, 40])  # nothing is averaged


def test_tensorflow_resizing_follows_a_ramp():
    ramp = np.arange(75, dtype=np.uint8).reshape(1, 1, 75, 1).repeat(75, axis=1)
    found = np.asarray(resizing.tensorflow(jnp.asarray(ramp), 299))[0, 0, :, 0]
    np.testing.assert_allclose(found, np.minimum(np.arange(299) * 75 / 299, 74), atol=1e-5)


def test_clean_resizing_is_pillows_before_rounding():
    pixels = np.random.default_rng(0).integers(0, 256, (50, 61, 3), dtype=np.uint8)
    found = resizing.clean(pixels, 20)
    rounded = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BICUBIC))
    assert np.abs(found - rounded).max() <= 1.01  # two roundings, one an axis
    assert (found != np.rint(found)).mean() > 0.9
    with pytest.raises(ValueError, match="no way 'bicubic'"):
        resizing.steps("bicubic", 299)


@pytest.mark.parametrize("way", resizing.WAYS)
def test_either_way_ends_in_the_same_size(way):
    """Whether the host does it or the device; a constant stays what it is."""
    on_host, on_device = resizing.steps(way, 20)
    batch = np.stack([on_host(np.full((9, 31, 3), 77, np.uint8))])
    found = np.asarray(on_device(jnp.asarray(batch)))
    np.testing.assert_allclose(found, np.full((1, 20, 20, 3), 77), rtol=1e-6)
