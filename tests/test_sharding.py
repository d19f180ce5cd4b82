import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from ldm_jax.training import optimizer, sharding, step

PARAMS = {"net": {"dense": {"kernel": jnp.ones((256, 128)), "bias": jnp.ones((128,))}}}


def test_an_axis_of_minus_one_takes_the_rest():
    mesh = sharding.make_mesh(data=-1, tensor=2)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 1, "space": 1, "tensor": 2}


@pytest.mark.parametrize("axes", [dict(data=3), dict(data=-1, fsdp=3), dict(data=-1, fsdp=-1)])
def test_a_mesh_that_does_not_fit_raises(axes):
    with pytest.raises(ValueError, match="mesh"):
        sharding.make_mesh(**axes)


def test_a_batch_that_does_not_divide_raises_and_names_a_multiple():
    mesh = sharding.make_mesh(data=4, fsdp=2)
    sharding.check_batch(16, mesh, accumulate=2)
    with pytest.raises(ValueError, match="multiple of 16"):
        sharding.check_batch(24, mesh, accumulate=2)


def test_fsdp_takes_the_largest_axis_of_large_arrays_only():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    layout = sharding.layouts(mesh, ((".*", "fsdp"),), PARAMS)["net"]["dense"]
    assert layout["kernel"].spec == PartitionSpec("fsdp")
    assert layout["bias"].spec == PartitionSpec()


def test_explicit_layouts_are_checked():
    mesh = sharding.make_mesh(data=2, tensor=4)
    rules = ((".*kernel", (None, "tensor")), (".*", "replicate"))
    layout = sharding.layouts(mesh, rules, PARAMS)["net"]["dense"]
    assert layout["kernel"].spec == PartitionSpec(None, "tensor")
    for wrong in ((None, "tensr"), ("tensor",), "fdsp"):
        with pytest.raises(ValueError, match="layout"):
            sharding.layouts(mesh, ((".*kernel", wrong), (".*", "replicate")), PARAMS)


def test_optimizer_and_average_lie_as_their_parameters():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    tx = optimizer.adamw(steps=10, lr=1e-3)
    shapes = jax.eval_shape(lambda: step.init_state(PARAMS, tx))
    layouts = sharding.state_layouts(mesh, ((".*", "fsdp"),), shapes)
    sharded = [s for s in jax.tree.leaves(layouts) if s.spec == PartitionSpec("fsdp")]
    assert len(sharded) == 4  # the kernel, its average, and Adam's two moments
