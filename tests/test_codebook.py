"""How a codebook learns: both rules by hand, over micro-batches, over eight devices, and resumed to the bit."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ldm_jax.models import discriminator, vq
from ldm_jax.training import (
    autoencoder_loss,
    bottleneck,
    checkpoints,
    codebook,
    optimizer,
    sharding,
    step,
)
from tests.drawn import like
from tests.tiny import assert_equal, quick_compiles  # noqa: F401 (a fixture of this module)

K, D = 4, 2
ENTRIES = np.array([[0.0, 0], [1, 0], [0, 1], [5, 5]])


def chosen(z, indices, drawn=None):
    """One micro-batch, by numpy."""
    n = len(indices)
    shares = np.bincount(indices, minlength=K) / n
    sums = np.stack([z[indices == k].sum(0) for k in range(K)]) / n
    drawn = np.zeros((K, D)) if drawn is None else drawn
    return codebook.Chosen(*(jnp.asarray(a, jnp.float32)[None] for a in (shares, sums, drawn)))


def test_statistics_of_a_batch_in_any_number_of_dimensions():
    rng = np.random.default_rng(0)
    z, indices = rng.normal(size=(2, 3, 4, D)), rng.integers(0, K, (2, 3, 4))
    given = (jnp.asarray(z, jnp.float32), jnp.asarray(indices, jnp.int32))
    found = codebook.chosen(*given, K, jax.random.key(0))
    expected = chosen(z.reshape(-1, D), indices.ravel())
    np.testing.assert_allclose(found.shares, expected.shares[0], rtol=1e-6)
    np.testing.assert_allclose(found.sums, expected.sums[0], rtol=1e-5, atol=1e-7)
    rows = z.reshape(-1, D)
    assert all(np.abs(rows - row).sum(1).min() < 1e-6 for row in np.asarray(found.latents))


def test_usage_and_perplexity_in_closed_form():
    shares = jnp.array([0.5, 0.25, 0.25, 0.0])
    np.testing.assert_allclose(codebook.usage(shares), 0.75)
    np.testing.assert_allclose(codebook.perplexity(shares), 2**1.5, rtol=1e-6)
    np.testing.assert_allclose(codebook.perplexity(jnp.full(8, 1 / 8)), 8, rtol=1e-6)
    assert float(codebook.perplexity(jnp.array([1.0, 0, 0]))) == 1


def moved(rule, *batches, codes=ENTRIES):
    """The codebook after these batches, and the rule's state."""
    entries = jnp.asarray(codes, jnp.float32)
    state = rule.init(entries)
    for found in batches:
        update, state = rule.step(jnp.full_like(entries, 0.125), state, entries, found)
        entries = entries + update
    return np.asarray(entries), state


def test_the_average_is_that_of_the_latents_that_chose_each_entry():
    rng = np.random.default_rng(1)
    batches = [(rng.normal(size=(30, D)), rng.integers(0, 3, 30)) for _ in range(3)]
    found, _ = moved(codebook.average(0.9, revive=0.0), *(chosen(*b) for b in batches))
    shares, sums = np.full(K, 1 / K), ENTRIES / K
    for z, indices in batches:
        shares = 0.9 * shares + 0.1 * np.bincount(indices, minlength=K) / 30
        sums = 0.9 * sums + 0.1 * np.stack([z[indices == k].sum(0) for k in range(K)]) / 30
    np.testing.assert_allclose(found, sums / shares[:, None], rtol=1e-5)
    np.testing.assert_allclose(found[3], [5, 5], rtol=1e-6)  # nobody chose it: it stays


def test_an_entry_that_is_never_chosen_stays_when_its_share_underflows():
    z, indices = np.ones((8, D)), np.zeros(8, int)
    found, state = moved(codebook.average(0.1, revive=0.0), *[chosen(z, indices)] * 60)
    assert float(state["shares"][3]) < 1e-30
    np.testing.assert_allclose(found[3], [5, 5], rtol=1e-5)
    np.testing.assert_allclose(found[0], [1, 1], rtol=1e-5)


@pytest.mark.parametrize("name", ["average", "gradient"])
def test_a_dead_entry_is_put_onto_a_latent_and_has_a_fair_share_again(name):
    rule = getattr(codebook, name)(0.5, revive=0.2)
    z, indices = np.ones((8, D)), np.array([0, 0, 0, 1, 1, 1, 2, 2])
    drawn = np.arange(K * D).reshape(K, D) + 10.0
    # Of the shares 1/4 that it starts with, entry 3 has 1/32 after three steps: less than a fifth of a fair share.
    before, _ = moved(rule, *[chosen(z, indices, drawn)] * 2)
    after, state = moved(rule, *[chosen(z, indices, drawn)] * 3)
    assert np.abs(before[3] - 5).max() < 0.5
    np.testing.assert_allclose(after[3], drawn[3])
    assert np.abs(after[:3]).max() < 2
    np.testing.assert_allclose(state["shares"][3], 1 / K)
    # None is ever dead without `revive`.
    never, _ = moved(getattr(codebook, name)(0.5, revive=0.0), *[chosen(z, indices, drawn)] * 9)
    assert np.abs(never[3] - 5).max() < 2


def test_by_the_gradient_it_moves_by_the_optimizers_update():
    found, _ = moved(codebook.gradient(), chosen(np.ones((8, D)), np.zeros(8, int)))
    np.testing.assert_allclose(found, ENTRIES + 0.125)


def test_micro_batches_count_together_and_each_gives_some_of_the_latents():
    rng = np.random.default_rng(2)
    z, indices = rng.normal(size=(24, D)), rng.integers(0, 3, 24)
    rule = codebook.average(0.5, revive=0.6)
    whole = chosen(z, indices, np.full((K, D), 7.0))
    parts = [chosen(z[i::2], indices[i::2], np.full((K, D), 7.0 + i)) for i in (0, 1)]
    both = jax.tree.map(lambda *a: jnp.concatenate(a), *parts)
    one, two = moved(rule, whole)[0], moved(rule, both)[0]
    np.testing.assert_allclose(two[:3], one[:3], rtol=1e-5)
    np.testing.assert_allclose((one[3], two[3]), [[7, 7], [8, 8]])


def test_what_cannot_be_is_refused():
    for kwargs, told in (
        (dict(decay=1.0), r"codebook.decay = 1.0 is no decay"),
        (dict(revive=1.5), r"codebook.revive = 1.5 is the share"),
    ):
        with pytest.raises(ValueError, match=told):
            codebook.average(**kwargs)


# ---- in a train step -----------------------------------------------------------------------------

MODEL = vq.VQAutoencoder(
    width=4,
    mults=(1,),
    blocks=1,
    z_channels=2,
    embed=2,
    codes=12,
    groups=2,
    middle_attention=False,
)
CRITIC = discriminator.PatchGAN(width=4, layers=1)
RULE = codebook.average(0.5, revive=0.5)  # some entries die in every step


def batch():
    rng = np.random.default_rng(0)
    return {"x": rng.uniform(-1, 1, (16, 6, 6, 3)).astype(np.float32)}


def fresh():
    """The discriminator begins with the first step. Adam's eps is large, so that rounding does not decide."""
    params = {
        "gen": MODEL.init(jax.random.key(0), jnp.zeros((1, 6, 6, 3)))["params"],
        "disc": CRITIC.init(jax.random.key(1), jnp.zeros((1, 6, 6, 3)))["params"],
    }
    return like(jax.eval_shape(lambda: params))


def taken(accumulate=1):
    between = bottleneck.quantized(MODEL, rule=RULE)
    loss = autoencoder_loss.autoencoder_loss(
        between, CRITIC, normalization="mean", disc_start=0, disc_weight=0.5
    )
    tx = codebook.learnt(optimizer.adamw(steps=9, lr=1e-3, eps=1e-2, weight_decay=0.01), RULE)
    return tx, step.make_train_step(loss, tx, accumulate=accumulate)


@functools.cache
def learnt(devices, accumulate=1):
    """Metrics and the state after each of three steps."""
    mesh = sharding.make_mesh(data=devices, devices=jax.devices()[:devices])
    tx, train_step = taken(accumulate)
    everywhere = sharding.replicated(mesh)
    state = jax.device_put(step.init_state(fresh(), tx), everywhere)
    train_step = jax.jit(train_step, out_shardings=everywhere)
    placed, key = sharding.place(mesh, batch()), jax.device_put(jax.random.key(1), everywhere)
    found = []
    for _ in range(3):
        state, metrics = train_step(state, {}, placed, key)
        found.append(jax.device_get((metrics, state)))
    return found, train_step, mesh


@pytest.mark.slow
def test_eight_devices_learn_what_one_does():
    """Statistics of the codebook, its revival and the discriminator's batch norms are those of the whole batch."""
    one, eight = learnt(1)[0], learnt(8)[0]
    for (metrics, state), (metrics8, state8) in zip(one, eight, strict=True):
        assert metrics.keys() == metrics8.keys()
        assert not any(name.startswith("_") for name in metrics)
        for name in metrics:
            np.testing.assert_allclose(metrics8[name], metrics[name], rtol=2e-4, err_msg=name)
        own, own8 = (s.opt_state["codebook"] for s in (state, state8))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, rtol=2e-4, atol=1e-5), own, own8)
        entries, entries8 = (s.params["gen"]["codebook"] for s in (state, state8))
        np.testing.assert_allclose(entries8, entries, rtol=2e-4, atol=1e-5)
    # Each of eight devices has two rows: were the statistics theirs alone, the scores would be others.
    assert one[0][0]["discriminator"] > 0
    shares = [state.opt_state["codebook"]["shares"] for _, state in one]
    revived = [np.isclose(share, 1 / 12).sum() for share in shares]
    assert 0 < max(revived) < 12, shares


def test_the_optimizer_decays_no_codebook_that_is_an_average():
    """Its entries are the sums over the shares, whatever weight decay and Adam would have."""
    state = learnt(1)[0][-1][1]
    own = state.opt_state["codebook"]
    expected = own["sums"] / own["shares"][:, None]
    np.testing.assert_allclose(state.params["gen"]["codebook"], expected, rtol=1e-4, atol=1e-6)


def test_a_step_that_is_not_finite_leaves_the_statistics_alone():
    found, train_step, mesh = learnt(1)
    state = found[-1][1]
    bad = batch()
    bad["x"][3, 2] = np.nan
    after, metrics = train_step(state, {}, sharding.place(mesh, bad), jax.random.key(1))
    assert float(metrics["skipped"]) == 1
    assert_equal(after.opt_state, state.opt_state)
    assert_equal(after.params, state.params)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    found, train_step, mesh = learnt(1)
    layouts = jax.tree.map(lambda _: sharding.replicated(mesh), found[0][1])
    with contextlib.closing(checkpoints.Checkpoints(tmp_path)) as saved:
        saved.save(jax.device_put(found[0][1], layouts))
        saved.wait()
        state = saved.restore(jax.eval_shape(lambda: found[0][1]), layouts)
    for _ in range(2):
        key = jax.device_put(jax.random.key(1), sharding.replicated(mesh))
        state, _ = train_step(state, {}, sharding.place(mesh, batch()), key)
    assert_equal(state, found[-1][1])


@pytest.mark.slow
def test_accumulated_micro_batches_count_as_one_batch():
    """The discriminator's batch norms see a micro-batch; the choices of the first step do not depend on them."""
    whole, parts = (learnt(1, accumulate)[0][0][1] for accumulate in (1, 2))
    own, other = (s.opt_state["codebook"]["shares"] for s in (whole, parts))
    np.testing.assert_allclose(own, other, rtol=1e-5)


def test_other_transformations_pass_what_was_chosen_on():
    """`learnt` takes it for itself; an optimizer of optax alone is not asked for it."""
    tx = codebook.learnt(optax.sgd(1.0), codebook.gradient())
    params = {"gen": {"codebook": jnp.asarray(ENTRIES, jnp.float32), "w": jnp.ones(3)}}
    found = chosen(np.ones((8, D)), np.zeros(8, int))
    updates, _ = tx.update(
        jax.tree.map(jnp.ones_like, params), tx.init(params), params, chosen=found
    )
    np.testing.assert_array_equal(updates["gen"]["w"], -np.ones(3))
    np.testing.assert_array_equal(updates["gen"]["codebook"], -np.ones((K, D)))
