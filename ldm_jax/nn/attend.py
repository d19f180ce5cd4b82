"""Scaled dot-product attention, one function with a kernel for each kind of device.

    attend(q, k, v) = softmax(q kᵀ / √d) v

    CPU           long rows in blocks of queries, whose weights stay in the cache and are computed anew for the gradient
    NVIDIA GPU    cuDNN's fused kernel, where head size, type and lengths allow it
    TPU           the fused kernel "splash" of jax's Pallas, from 4096 positions on (shorter rows gain nothing by it);
                  each device of a mesh does its own samples, heads and queries, since XLA cannot split a kernel
    else          `plain`: two products per head, which is what the others are tested against

The softmax runs in float32 whatever the compute dtype. The kernel is chosen when a function is traced, for the devices
of the mesh in context (`jax.set_mesh`) where there is one, so that programs can be compiled ahead of time for devices
that are not at hand, else for jax's default backend.
"""

import functools
import math
import re

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AbstractMesh, PartitionSpec
from jaxtyping import Array, Bool, Float

LONG = 512  # positions from which the CPU works in blocks ...
BLOCK = 128  # ... of so many rows, all samples together ...
FEWEST = 64  # ... and no fewer of one sample
SPLASH_FROM = 4096  # maxdiffusion's flash_min_seq_length
LANES = 128  # of a TPU: lengths are padded to a multiple
SPLASH_BLOCKS = {2: 1024, 4: 512}  # by bytes of the dtype; maxdiffusion's, for heads of up to ...
SPLASH_HEAD = 256  # ... so many channels; the gradient of wider ones would not fit a chip's VMEM
# Axes of a mesh (`training.sharding`) over which samples, queries and heads may be split.
PARTS = (("data", "fsdp"), ("space",), ("tensor",))

Queries = Float[Array, "b n h d"]
Keys = Float[Array, "b m h d"]
Mask = Bool[Array, "b m"] | None


def attend(q: Queries, k: Keys, v: Keys, mask: Mask = None, causal: bool = False) -> Queries:
    """Scaled dot-product attention (Vaswani et al. 2017, eq. 1); only keys whose mask is True are attended to.

    With `causal`, the i-th query attends to the first i keys only. A sample whose mask is all False attends to every
    key alike.
    """
    kind = platform()
    if kind == "gpu" and cudnn_supports(q, k, mask):
        return _cudnn(q, k, v, mask, causal)
    if kind == "tpu" and splash_supports(q, k, mask, causal):
        return _splash(q, k, v, causal)
    if kind == "cpu" and min(q.shape[1], k.shape[1]) >= LONG:
        return blocked(q, k, v, mask, causal)
    return plain(q, k, v, mask, causal)


def platform() -> str:
    """ "cpu", "gpu" or "tpu": of the mesh in context, else of the default backend."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    kind = device.platform if device else jax.default_backend()
    return "gpu" if kind in ("cuda", "rocm") else kind


def probabilities(
    q: Queries, k: Keys, mask: Mask = None, causal: bool = False
) -> Float[Array, "b h n m"]:
    """What each query takes of each key, in float32; sums to one over the keys. See `attend`."""
    # Heads go before positions: the products are then plain batches of matrices, which is faster on the CPU.
    q, k = jnp.swapaxes(q, 1, 2), jnp.swapaxes(k, 1, 2)
    logits = _logits(q * q.shape[-1] ** -0.5, k)
    if mask is not None:
        logits = _masked(logits, mask[:, None, None, :])
    if causal:
        logits = jnp.where(jnp.tri(*logits.shape[-2:], dtype=bool), logits, -jnp.inf)
    return jax.nn.softmax(logits, axis=-1)


def plain(q: Queries, k: Keys, v: Keys, mask: Mask = None, causal: bool = False) -> Queries:
    """`attend` as it is written, on any device; the oracle of the others."""
    weights = probabilities(q, k, mask, causal).astype(v.dtype)
    return jnp.swapaxes(jnp.einsum("bhnm,bhmd->bhnd", weights, jnp.swapaxes(v, 1, 2)), 1, 2)


def _logits(q, k):
    return jnp.einsum("...nd,...md->...nm", q, k, preferred_element_type=jnp.float32)


def _masked(logits, keep):
    # Not -inf, and above what causality leaves out, so that a query without any key averages over those before it.
    return jnp.where(keep, logits, jnp.finfo(jnp.float32).min)


def blocked(q: Queries, k: Keys, v: Keys, mask: Mask = None, causal: bool = False) -> Queries:
    """`attend` head by head, in blocks of queries, for the CPU.

    The weights of a block fit in the cache, and no more than those of one are ever there: the gradient computes them
    anew. Samples stay together within a block, since a loop over an axis that is split over devices would gather it.
    """
    b, n, _, d = q.shape
    rows = max(BLOCK // b, FEWEST)
    starts = jnp.arange(0, n, rows)
    q = jnp.pad(q * d**-0.5, ((0, 0), (0, -n % rows), (0, 0), (0, 0)))
    q = q.reshape(b, len(starts), rows, -1, d).transpose(3, 1, 0, 2, 4)  # [h blocks b rows d]
    k, v = (jnp.moveaxis(y, 2, 0) for y in (k, v))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def block(q, start, k, v):
        logits = _logits(q, k)
        if mask is not None:
            logits = _masked(logits, mask[:, None, :])
        if causal:
            before = (start + jnp.arange(rows))[:, None] >= jnp.arange(k.shape[1])
            logits = jnp.where(before, logits, -jnp.inf)
        top = lax.stop_gradient(logits.max(-1, keepdims=True))
        weights = jnp.exp(logits - top)  # divided by their sum after the product, which is smaller
        out = _product(weights.astype(v.dtype), v) / weights.sum(-1, keepdims=True)
        return out.astype(v.dtype)

    def head(of):
        q, k, v = of
        return lax.map(lambda part: block(*part, k, v), (q, starts))

    out = lax.map(head, (q, k, v)).transpose(2, 1, 3, 0, 4)
    return out.reshape(b, len(starts) * rows, -1, d)[:, :n]


def _product(weights, v):
    return jnp.einsum("bnm,bmd->bnd", weights, v, preferred_element_type=jnp.float32)


def cudnn_supports(q: Array, k: Array, mask: Array | None) -> bool:
    """The conditions of `jax.nn.dot_product_attention(implementation="cudnn")`, forward and backward."""
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    # The backward pass with a mask takes even lengths only.
    lengths = mask is None or (q.shape[1] % 2 == 0 and k.shape[1] % 2 == 0)
    return half and q.shape[-1] % 8 == 0 and q.shape[-1] <= _widest_head() and lengths


def _widest_head() -> int:
    """0 where there is no cuDNN: AMD's compute capabilities are no numbers."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)", getattr(jax.devices()[0], "compute_capability", ""))
    if not numbers:
        return 0
    return 256 if int(numbers[1]) >= 9 else 128  # Hopper and later


def _cudnn(q, k, v, mask, causal):
    if mask is not None:
        mask = jnp.broadcast_to(mask[:, None, None, :], (q.shape[0], 1, q.shape[1], k.shape[1]))
    return jax.nn.dot_product_attention(
        q, k, v, mask=mask, is_causal=causal, implementation="cudnn"
    )


def splash_supports(q: Array, k: Array, mask: Array | None, causal: bool = False) -> bool:
    """Long rows without a mask, on one device, or on a mesh in context over which they divide."""
    if mask is not None or min(q.shape[1], k.shape[1]) < SPLASH_FROM:
        return False
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.abstract_device:
        return jax.device_count() == 1
    ways = [math.prod(mesh.shape[axis] for axis in axes) for axes in _parts(mesh)]
    divides = all(size % n == 0 for size, n in zip(q.shape[:3], ways, strict=True))
    return divides and not (causal and ways[1] > 1)  # which would not know how far its queries are


def _parts(mesh: AbstractMesh) -> list[tuple[str, ...]]:
    return [tuple(axis for axis in axes if mesh.shape.get(axis, 1) > 1) for axes in PARTS]


def _splash(q, k, v, causal):
    """`splash` by each device of the mesh in context, for its part of the samples, queries and heads."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.abstract_device or mesh.size == 1:
        return splash(q, k, v, causal)
    rows, queries, heads = _parts(mesh)
    own, whole = PartitionSpec(rows, queries, heads), PartitionSpec(rows, None, heads)
    # A kernel does not say along which axes its result varies, which `check_vma` would ask for.
    part = jax.shard_map(
        functools.partial(splash, causal=causal),
        in_specs=(own, whole, whole),
        out_specs=own,
        check_vma=False,
    )
    return part(q, k, v)


def splash(q: Queries, k: Keys, v: Keys, causal: bool = False, interpret: bool = False) -> Queries:
    """`attend` by jax's Pallas kernel for TPUs, without a mask; `interpret` runs it on any device, slowly."""
    # Here, since it takes a while and other devices have no use for it.
    from jax.experimental.pallas.ops.tpu import splash_attention as splash_kernel

    (n, h, d), m = q.shape[1:], k.shape[1]

    def prepared(y):
        return jnp.pad(jnp.swapaxes(y, 1, 2), ((0, 0), (0, 0), (0, -y.shape[1] % LANES), (0, 0)))

    q, k, v = prepared(q * d**-0.5), prepared(k), prepared(v)
    shape, most = (q.shape[2], k.shape[2]), SPLASH_BLOCKS[q.dtype.itemsize]
    if d > SPLASH_HEAD:
        most = max(most * SPLASH_HEAD // d, LANES)
    rows, columns = (
        next(s for s in (1024, 512, 256, 128) if length % s == 0 and s <= most) for length in shape
    )
    sizes = splash_kernel.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        block_q_dq=rows,
        block_kv_dq=columns,
    )
    kind = splash_kernel.CausalMask if causal else splash_kernel.FullMask
    kernel = splash_kernel.make_splash_mha_single_device(
        splash_kernel.MultiHeadMask([kind(shape)] * h), block_sizes=sizes, interpret=interpret
    )
    ids = None
    if m != shape[1]:  # what was added to the keys is of another segment, which no query reads
        ids = splash_kernel.SegmentIds(
            jnp.ones(shape[0], jnp.int32), (jnp.arange(shape[1]) < m).astype(jnp.int32)
        )
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, segment_ids=ids))(q, k, v)
    return jnp.swapaxes(out[:, :, :n], 1, 2)
