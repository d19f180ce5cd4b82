import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.training import optimizer, step


def quadratic(params, frozen, batch, rng, at):
    """Mean of |w·x - y|²; a batch with NaN makes a loss that is NaN."""
    error = batch["x"] @ params["net"]["w"] - frozen
    return jnp.mean(error**2), {"error": jnp.mean(error)}


def setup(tx, **kwargs):
    params = {"net": {"w": jnp.array([1.0, -2.0, 0.5])}}
    batch = {"x": jax.random.normal(jax.random.key(0), (8, 3))}
    train_step = jax.jit(step.make_train_step(quadratic, tx, **kwargs))
    return step.init_state(params, tx), batch, train_step


def test_one_step_is_sgd_and_the_average_is_warmed_up():
    state, batch, train_step = setup(optax.sgd(0.1), ema=0.9)
    gradient = 2 * batch["x"].T @ (batch["x"] @ state.params["net"]["w"] - 3.0) / 8
    new, metrics = train_step(state, 3.0, batch, jax.random.key(1))
    expected = state.params["net"]["w"] - 0.1 * gradient
    np.testing.assert_allclose(new.params["net"]["w"], expected, rtol=1e-5)
    # The decay after 0 updates is min(0.9, 1 / 10).
    np.testing.assert_allclose(
        new.ema["net"]["w"], 0.1 * state.params["net"]["w"] + 0.9 * expected, rtol=1e-5
    )
    np.testing.assert_allclose(metrics["grad_norm"], jnp.linalg.norm(gradient), rtol=1e-5)
    assert int(new.step) == 1


def test_accumulation_gives_the_gradient_of_the_whole_batch():
    tx = optax.sgd(0.1)
    state, batch, whole = setup(tx)
    _, _, parts = setup(tx, accumulate=4)
    a, _ = whole(state, 3.0, batch, jax.random.key(1))
    b, metrics = parts(state, 3.0, batch, jax.random.key(1))
    np.testing.assert_allclose(a.params["net"]["w"], b.params["net"]["w"], rtol=1e-5)
    assert metrics["error"].shape == ()


def test_a_step_that_is_not_finite_changes_nothing_but_the_counters():
    tx = optimizer.adamw(steps=10, lr=0.1)
    state, batch, train_step = setup(tx)
    state, _ = train_step(state, 3.0, batch, jax.random.key(1))
    bad = {"x": batch["x"].at[2, 1].set(jnp.nan)}
    after, metrics = train_step(state, 3.0, bad, jax.random.key(1))
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(state, part), getattr(after, part))
    assert (int(after.step), int(after.skipped), float(metrics["skipped"])) == (2, 1, 1.0)
    good, _ = train_step(after, 3.0, batch, jax.random.key(1))
    assert int(good.skipped) == 0
    assert not np.array_equal(good.params["net"]["w"], after.params["net"]["w"])


def test_schedules_warm_up_and_decay():
    cosine = optimizer.schedule(1.0, steps=110, warmup=10, decay="cosine")
    np.testing.assert_allclose(
        [cosine(0), cosine(5), cosine(10), cosine(60), cosine(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6
    )
    linear = optimizer.schedule(1.0, steps=100, decay="linear")
    np.testing.assert_allclose([linear(0), linear(50), linear(100)], [1, 0.5, 0], atol=1e-6)
    with pytest.raises(ValueError, match="cosine"):
        optimizer.schedule(1.0, steps=10, decay="cosin")


def test_every_group_is_clipped_by_its_own_norm():
    tx = optimizer.adamw(steps=10, lr=1.0, b1=0.0, b2=0.0, eps=1.0, weight_decay=0.0, clip=1.0)
    params = {"gen": jnp.zeros(1), "disc": jnp.zeros(1)}
    updates, _ = tx.update(
        {"gen": jnp.array([100.0]), "disc": jnp.array([0.5])}, tx.init(params), params
    )
    # Adam with b1 = b2 = 0 and eps = 1 gives g / (|g| + 1): 1/2 for the clipped group, 1/3 for the other.
    np.testing.assert_allclose([updates["gen"][0], updates["disc"][0]], [-1 / 2, -1 / 3], rtol=1e-5)


def test_an_infinite_learning_rate_is_skipped_too():
    state, batch, train_step = setup(optax.sgd(lambda count: jnp.inf))
    after, metrics = train_step(state, 3.0, batch, jax.random.key(1))
    np.testing.assert_array_equal(after.params["net"]["w"], state.params["net"]["w"])
    assert float(metrics["skipped"]) == 1.0


def test_muon_takes_orthogonal_steps_with_kernels_and_adams_with_the_rest():
    tx = optimizer.muon(steps=10, lr=0.5, adam_lr=0.25, ns_steps=8, weight_decay=0.0)
    shapes = {"conv": (3, 3, 4, 8), "attn": (8, 6), "conv_out": (6, 5)}
    params = {name: {"kernel": jnp.zeros(shape)} for name, shape in shapes.items()}
    params = {
        "net": params | {"norm": {"scale": jnp.ones(8)}, "token": {"embedding": jnp.ones((7, 8))}}
    }
    keys = iter(jax.random.split(jax.random.key(0), 5))
    gradient = jax.tree.map(lambda p: jax.random.normal(next(keys), p.shape), params)
    updates, _ = jax.jit(tx.update)(gradient, tx.init(params), params)
    net = updates["net"]
    for name in ("conv", "attn"):
        matrix = np.asarray(net[name]["kernel"]).reshape(-1, shapes[name][-1])
        scale = 0.5 * max(
            1, np.sqrt(matrix.shape[1] / matrix.shape[0])
        )  # sqrt(outputs / inputs), at least 1
        singular = np.linalg.svd(matrix, compute_uv=False) / scale
        # These iterations bring singular values near one, not to it (Jordan et al. 2024).
        assert singular.min() > 0.6
        assert singular.max() < 1.25
        assert (
            np.sum(matrix * np.asarray(gradient["net"][name]["kernel"]).reshape(matrix.shape)) < 0
        )
    # Adam's first step is the sign of the gradient times the learning rate, here with Nesterov's look ahead.
    ahead = 1 + 0.9 * 0.1 / (1 - 0.9**2)
    for part in (("conv_out", "kernel"), ("norm", "scale"), ("token", "embedding")):
        got, g = net[part[0]][part[1]], gradient["net"][part[0]][part[1]]
        np.testing.assert_allclose(got, -0.25 * ahead * np.sign(g), rtol=1e-4)


def kernels():
    params = {"net": {"kernel": jnp.full((6, 4), 0.5), "bias": jnp.array([0.1, -0.2, 0.3, 2.0])}}
    a, b = jnp.array([1.0, -2.0, 0.5, 3.0, 1.5, -1.0]), jnp.array([0.2, -1.0, 2.0, 0.7])
    return params, {"net": {"kernel": a[:, None] * b, "bias": b}}


def test_lions_first_step_is_the_sign_and_the_decay():
    params, gradient = kernels()
    tx = optimizer.lion(steps=10, lr=0.1, weight_decay=0.5)
    updates, state = tx.update(gradient, tx.init(params), params)
    for name, p in params["net"].items():
        expected = -0.1 * (jnp.sign(gradient["net"][name]) + 0.5 * p)
        np.testing.assert_allclose(updates["net"][name], expected, rtol=1e-5)
    floats = [a for a in jax.tree.leaves(state) if a.dtype == jnp.float32]
    assert sum(a.size for a in floats) == 6 * 4 + 4  # one array a parameter


@pytest.mark.parametrize("relative", [True, False])
def test_adafactor_keeps_rows_and_columns_and_is_exact_for_gradients_of_rank_one(relative):
    params, gradient = kernels()
    tx = optimizer.adafactor(steps=10, lr=0.1, min_size=4, relative=relative)
    start = tx.init(params)
    updates, _ = tx.update(gradient, start, params)
    for name, p in params["net"].items():
        # The decay after one step is 0, so the second moment is the gradient's own square.
        scale = jnp.sqrt(jnp.mean(p**2)) if relative else 1.0
        expected = -0.1 * scale * jnp.sign(gradient["net"][name])
        np.testing.assert_allclose(updates["net"][name], expected, rtol=1e-4)
    sizes = [a.size for a in jax.tree.leaves(start) if a.dtype == jnp.float32]
    assert sum(sizes) < 6 * 4  # 6 + 4 for the matrix, 4 for the vector, and placeholders


def layers(params, frozen, batch, rng, at):
    x = batch["x"] @ params["net"]["first"]["w"] + params["net"]["first"]["b"]
    return jnp.mean((x @ params["net"]["last"]["w"] - params["shift"]) ** 2), {}


LAYERS = {
    "net": {
        "first": {"w": jnp.eye(3), "b": jnp.array([0.5, -1.0, 2.0])},
        "last": {"w": jnp.array([1.0, 2.0, -1.0])},
    },
    "shift": jnp.float32(3.0),
}


def told(groups):
    batch, tx = {"x": jax.random.normal(jax.random.key(0), (8, 3))}, optax.sgd(0.1)
    train_step = step.make_train_step(layers, tx, groups=groups)
    inputs = (step.init_state(LAYERS, tx), 0.0, batch, jax.random.key(1))
    gradient = jax.grad(lambda p: layers(p, 0.0, batch, None, 0)[0])(LAYERS)
    return train_step(*inputs)[1], gradient, jax.make_jaxpr(train_step)(*inputs)


def norm(*leaves):
    return np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves))


def test_norms_of_the_gradient_by_module():
    metrics, gradient, _ = told(True)
    first, last = gradient["net"]["first"], gradient["net"]["last"]["w"]
    expected = {"net/first": norm(*first.values()), "net/last": norm(last)}
    expected["shift"] = norm(gradient["shift"])
    found = {k.removeprefix("grad_norm/"): v for k, v in metrics.items() if "grad_norm/" in k}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
    np.testing.assert_allclose(norm(*found.values()), metrics["grad_norm"], rtol=1e-6)


def test_norms_of_the_gradient_by_rules():
    metrics, gradient, _ = told(((".*/w", "matrices"), (".*", "rest")))
    matrices = [gradient["net"][name]["w"] for name in ("first", "last")]
    np.testing.assert_allclose(metrics["grad_norm/matrices"], norm(*matrices), rtol=1e-6)
    rest = norm(gradient["net"]["first"]["b"], gradient["shift"])
    np.testing.assert_allclose(metrics["grad_norm/rest"], rest, rtol=1e-6)
    with pytest.raises(ValueError, match="'kernel'"):
        told((("kernel", "matrices"), (".*", "rest")))


def test_norms_that_are_not_asked_for_are_not_computed():
    metrics, _, program = told(False)
    assert metrics.keys() == {"loss", "grad_norm", "skipped"}
    # One norm of the gradient and one of the update, and with groups three more, of four leaves together.
    roots = [
        sum(eqn.primitive.name == "sqrt" for eqn in made.eqns) for made in (program, told(True)[2])
    ]
    assert roots == [2, 5]
