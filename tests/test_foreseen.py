"""What is foreseen of memory before a program is compiled, and the search that compiles what is near."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from ldm_jax.foresee import memory, search
from ldm_jax.training import sharding

WIDE = 256
KIB = 2**10


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def temporary(f, *more, rows=16, shares=None):
    """KiB beside the inputs: of a batch [rows WIDE] and `more`."""
    one = sharding.make_mesh(devices=jax.devices()[:1])
    of = memory.trace(lambda n: (f, [shape(n, WIDE), *more]), one, (8, 16))
    return memory.temporary(of, rows, shares or {}) / KIB


ROW = WIDE * 4 / KIB  # of a batch
WEIGHT = shape(WIDE, WIDE)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((8, 128), 1), ((3, 3, 192, 192), 256 / 192), ((512, 512, 3), 1), ((4, 640), 2), ((7,), 1)],
)
def test_arrays_fill_tiles(sizes, expected):
    assert memory.in_tiles(sizes, 4) == round(4 * expected * jnp.prod(jnp.array(sizes)))


def test_what_is_fused_takes_nothing():
    assert temporary(lambda x: jnp.tanh(x) * 2 + x) == 0
    # Both results of a product are there at once; what is made of the first takes its place.
    assert temporary(lambda x, w: jnp.tanh(x @ w) @ w, WEIGHT) == 2 * 16 * ROW
    assert temporary(lambda x, w: jnp.tanh(x @ w) @ w, WEIGHT, rows=40) == 2 * 40 * ROW


def test_less_is_kept():
    def cast(x, w):
        y = (x @ w).astype(jnp.bfloat16)  # half, in place of the product
        return jnp.dot(y, w.astype(jnp.bfloat16)), jnp.dot(y, w.astype(jnp.bfloat16))

    assert temporary(cast, WEIGHT) == (0.5 + 0.5 + 0.5) * 16 * ROW


def deep(block):
    def loss(x, w):
        for _ in range(6):
            x = block(x, w)
        return x.sum()

    return jax.grad(loss, 1)


def test_what_is_computed_again_is_not_kept():
    def block(x, w):
        return jnp.tanh(jnp.tanh(jnp.tanh(x @ w) @ w) @ w)

    # Enough rows that weights count for little: three products a block, or what goes into it.
    plain = temporary(deep(block), WEIGHT, rows=4096)
    again = temporary(deep(jax.checkpoint(block)), WEIGHT, rows=4096)
    assert 18 * 4096 * ROW <= plain < 21 * 4096 * ROW
    assert 8 * 4096 * ROW <= again < 11 * 4096 * ROW


def test_a_loop_holds_what_its_body_does():
    def looped(x, w):
        return jax.lax.scan(lambda c, _: (jnp.tanh(c @ w) @ w, None), x, None, length=5)[0]

    assert temporary(looped, WEIGHT) == 3 * 16 * ROW  # the result, and two within


def test_what_lies_split_is_gathered_for_a_product():
    whole = WIDE * ROW
    halves = {(WIDE, WIDE): 0.25}
    assert temporary(lambda x, w: x @ w, WEIGHT, shares=halves) == 16 * ROW + 0.75 * whole
    # In the type in which it is multiplied.
    half = temporary(
        lambda x, w: jnp.dot(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)), WEIGHT, shares=halves
    )
    assert half == 8 * ROW + 0.75 * whole / 2


def test_shares_are_those_of_the_layouts():
    mesh = sharding.make_mesh(data=2, fsdp=4)

    def laid(*spec):
        at = NamedSharding(mesh, PartitionSpec(*spec))
        return jax.ShapeDtypeStruct((256, 8), jnp.float32, sharding=at)

    other = jax.ShapeDtypeStruct((64,), jnp.float32, sharding=sharding.replicated(mesh))
    assert memory.shares([laid(), laid("fsdp"), other]) == {(256, 8): 0.25}
    assert memory.of_inputs([laid("fsdp")]) == 64 * 8 * 4 * 128 / 64


def choice(name="one", fixed=100.0, each=10.0, seconds=1.0):
    return search.Choice(name, lambda n: fixed, lambda n: each * n, lambda n: seconds * n)


@pytest.mark.parametrize("actual", [0.6, 0.97, 1.0, 1.04, 1.7, 30.0])
def test_the_most_that_fits_is_settled_in_a_few_compiles(actual):
    foreseen, asked = choice(), []

    def needs(n):
        asked.append(n)
        needed = 100 + 10 * actual * n
        return needed <= 400.0, needed

    expected = int(30 / actual)
    assert search.settled(foreseen, 400.0, needs) == expected
    assert len(asked) <= 3
    assert len(set(asked)) == len(asked)


def test_nothing_fits():
    assert choice().most(105.0) == 0
    assert search.settled(choice(), 105.0, lambda n: (False, 110.0)) == 0
    assert search.settled(choice(), 400.0, lambda n: (False, 500.0)) == 0
    assert search.ranked([choice(fixed=500.0)], 400.0) == []


def test_choices_are_ranked_by_rows_a_second_and_then_by_rows():
    slow = choice("slow", each=1.0, seconds=1.3)
    fast, larger, same = choice("fast"), choice("larger", each=5.0), choice("same", each=5.0)
    ranked = search.ranked([slow, fast, larger, same], 400.0)
    assert [(of.name, rows) for of, rows in ranked] == [
        ("larger", 60),
        ("same", 60),
        ("fast", 30),
        ("slow", 300),
    ]
