"""The kernels of attention against the plain one, and which of them a device gets."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from ldm_jax.nn import attend
from tests.jaxprs import occurrences

KEY = jax.random.key(0)


def drawn(b, n, m, h, d, dtype=jnp.float32):
    keys = jax.random.split(KEY, 3)
    lengths = (n, m, m)
    return [
        jax.random.normal(k, (b, s, h, d)).astype(dtype) for k, s in zip(keys, lengths, strict=True)
    ]


def both(kernel, oracle, arrays, **options):
    """Outputs and gradients of a kernel and of the plain one."""

    def of(f):
        def loss(*arrays):
            y = f(*arrays, **options).astype(jnp.float32)
            return jnp.sum(jnp.sin(3.0 * jnp.arange(y.size)).reshape(y.shape) * y), y

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)

    (_, y), grads = jax.jit(of(kernel))(*arrays)
    (_, y_), grads_ = jax.jit(of(oracle))(*arrays)
    return (y, *grads), (y_, *grads_)


MASK = jnp.arange(77)[None] < jnp.array([[77], [50], [0]])  # the last sample has no key at all


@pytest.mark.parametrize(
    ("mask", "causal", "dtype", "atol"),
    [
        (None, False, jnp.float32, 2e-5),
        (None, True, jnp.float32, 2e-5),
        (MASK, True, jnp.float32, 2e-5),
        (MASK, False, jnp.bfloat16, 0.03),
    ],
)
def test_blocks_are_the_whole(mask, causal, dtype, atol):
    # 100 rows in blocks of 64: the last one is filled up.
    arrays = drawn(3, 100, 77, 2, 8, dtype)
    got, expected = both(attend.blocked, attend.plain, arrays, mask=mask, causal=causal)
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(
            np.asarray(a, np.float32),
            np.asarray(b, np.float32),
            atol=atol * float(jnp.abs(b).max()),
        )


def test_blocks_keep_no_weights_for_the_gradient():
    q, k, v = (jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32) for _ in range(3))

    def peak(f):
        gradient = jax.grad(lambda *arrays: f(*arrays).sum(), (0, 1, 2))
        return jax.jit(gradient).lower(q, k, v).compile().memory_analysis().temp_size_in_bytes

    assert peak(attend.blocked) < 2048 * 2048 * 4 < peak(attend.plain)


def mesh(platform, devices=1):
    device = AbstractDevice(platform, 1, platform)
    # Auto, as those of `sharding.make_mesh` are; newer versions of jax make others Explicit.
    auto = (jax.sharding.AxisType.Auto,)
    return AbstractMesh((devices,), ("data",), axis_types=auto, abstract_device=device)


def loops_and_kernels(n, m, where=None, dtype=jnp.bfloat16, masked=False):
    q, k = (jax.ShapeDtypeStruct((2, s, 2, 64), dtype) for s in (n, m))
    mask = jnp.ones((2, m), bool) if masked else None

    def trace():
        return jax.make_jaxpr(lambda q, k, v: attend.attend(q, k, v, mask))(q, k, k).jaxpr

    if where is None:
        jaxpr = trace()
    else:
        with jax.sharding.use_abstract_mesh(where):
            jaxpr = trace()
    return occurrences(jaxpr, ("scan",)) > 0, occurrences(jaxpr, ("pallas_call",)) > 0


def test_a_cpu_works_in_blocks_where_rows_are_long():
    assert loops_and_kernels(512, 512) == (True, False)
    assert loops_and_kernels(511, 512) == (False, False)
    assert loops_and_kernels(4096, 77) == (False, False)


def test_a_tpu_uses_splash_from_4096_positions_on():
    tpu = mesh("tpu")
    assert loops_and_kernels(4096, 4096, tpu)[1]
    assert not loops_and_kernels(4095, 4096, tpu)[1]
    assert not loops_and_kernels(4096, 77, tpu)[1]
    assert not loops_and_kernels(4096, 4096, tpu, masked=True)[1]
    assert loops_and_kernels(4096, 4096, mesh("tpu", 2))[1]  # each device for one of two samples
    assert loops_and_kernels(4096, 4096, mesh("tpu", 4)) == (False, False)
    assert attend.platform() == "cpu"


@pytest.mark.parametrize(("n", "m", "causal"), [(200, 300, False), (130, 130, True)])
def test_splash_is_attention(n, m, causal):
    arrays = drawn(1, n, m, 1, 8)

    def splash(*arrays, causal):
        return attend.splash(*arrays, causal=causal, interpret=True)

    got, expected = both(splash, attend.plain, arrays, causal=causal)
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("axes", "part"),
    [(dict(data=2, fsdp=2, tensor=2), (1, 4096, 1)), (dict(space=4), (4, 1024, 2))],
)
def test_each_device_of_a_mesh_attends_for_its_part(axes, part, monkeypatch):
    given = []

    def kernel(q, k, v, causal):
        given.append((q.shape[:3], k.shape[:3]))
        return q + k.mean(1, keepdims=True) + v.sum(1, keepdims=True)

    monkeypatch.setattr(attend, "splash", kernel)
    q, k, v = drawn(4, 4096, 4096, 2, 8)
    names = ("data", "fsdp", "space", "tensor")
    sizes = [axes.get(name, 1) for name in names]
    where = jax.make_mesh(sizes, names, (jax.sharding.AxisType.Auto,) * 4)
    expected = kernel(q, k, v, False)
    everywhere = jax.sharding.NamedSharding(where, jax.sharding.PartitionSpec())
    q, k, v = jax.device_put((q, k, v), everywhere)
    with jax.sharding.use_abstract_mesh(where.abstract_mesh):
        assert attend.splash_supports(q, k, None)
        assert attend.splash_supports(q, k, None, causal=True) == ("space" not in axes)
        got = jax.jit(attend._splash, static_argnums=3)(q, k, v, False)
    assert given[1] == (part, (part[0], 4096, part[2]))
    np.testing.assert_allclose(got, expected, atol=1e-3)


AHEAD = """
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from ldm_jax.nn.attend import attend

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
mesh = jax.sharding.Mesh(np.array(devices[:1]), ("data",))
placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
for heads, size in ((8, 40), (1, 512)):  # the second: an autoencoder's, which wants smaller blocks
    q = jax.ShapeDtypeStruct((1, 4096, heads, size), jnp.bfloat16, sharding=placed)
    for f in (attend, jax.grad(lambda *a: attend(*a).astype(jnp.float32).sum(), (0, 1, 2))):
        with jax.set_mesh(mesh):
            lowered = jax.jit(f).lower(q, q, q)
        print("tpu_custom_call" in lowered.as_text())
        print(lowered.compile().memory_analysis().temp_size_in_bytes < heads * 4096 * 4096 * 2)
"""


@pytest.mark.slow
def test_splash_compiles_for_a_tpu():
    pytest.importorskip("libtpu", reason="compiling ahead for TPUs needs `pip install libtpu`")
    env = os.environ | dict(
        TPU_SKIP_MDS_QUERY="1", JAX_PLATFORMS="cpu", TPU_WORKER_HOSTNAMES="localhost"
    )
    done = subprocess.run([sys.executable, "-c", AHEAD], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["True"] * 8, done.stderr


@pytest.mark.parametrize(
    ("dtype", "dim", "lengths", "masked", "capability", "expected"),
    [
        (jnp.bfloat16, 64, (16, 77), False, "8.0", True),
        (jnp.bfloat16, 64, (16, 77), True, "8.0", False),
        (jnp.float16, 128, (16, 78), True, "8.0", True),
        (jnp.bfloat16, 160, (16, 16), False, "8.0", False),
        (jnp.bfloat16, 160, (16, 16), False, "9.0", True),
        (jnp.bfloat16, 256, (16, 16), False, "10.3", True),
        (jnp.bfloat16, 264, (16, 16), False, "9.0", False),
        (jnp.bfloat16, 36, (16, 16), False, "9.0", False),
        (jnp.float32, 64, (16, 16), False, "9.0", False),
        (jnp.bfloat16, 64, (16, 16), False, "gfx942", False),
    ],
)
def test_a_gpu_uses_the_cudnn_kernel_where_it_is_supported(
    monkeypatch, dtype, dim, lengths, masked, capability, expected
):
    calls = []

    def kernel(q, k, v, mask, is_causal, implementation):
        calls.append((None if mask is None else mask.shape, is_causal))
        assert implementation == "cudnn"
        return q

    class Device:
        compute_capability = capability

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [Device()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    n, m = lengths
    q, k = np.zeros((2, n, 2, dim), dtype), np.zeros((2, m, 2, dim), dtype)
    mask = np.ones((2, m), bool) if masked else None

    def both(q, k, mask):
        attend.attend(q, k, k, mask)
        return attend.attend(q, k, k, mask, causal=True)

    jax.eval_shape(both, q, k, mask)
    given = (2, 1, n, m) if masked else None
    assert calls == ([(given, False), (given, True)] if expected else [])
