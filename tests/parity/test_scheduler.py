"""Noise tables and DDIM against diffusers' schedulers."""

import inspect
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process, samplers, solvers
from ldm_jax.types import Cond
from ldm_jax.weights import scheduler as their

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SD = their.to_config(their.Noise())


@pytest.mark.parametrize("name", their.CLASSES)
def test_defaults_of_every_class_and_keys_that_do_not_matter(name, tmp_path):
    cls = getattr(diffusers, name)
    defaults = {k: p.default for k, p in inspect.signature(cls.__init__).parameters.items()}
    for key, value in their.CLASSES[name].items():
        if key in defaults:  # the single-step solver has no spacing
            assert defaults[key] == value, key
    cls(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).save_config(tmp_path)
    noise = their.read(json.loads((tmp_path / "scheduler_config.json").read_text()))
    assert noise == their.Noise(spacing=their.CLASSES[name]["timestep_spacing"])


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("schedule", their.SCHEDULES)
def test_tables_are_theirs(schedule, rescaled):
    config = SD | dict(beta_schedule=schedule, rescale_betas_zero_snr=rescaled)
    theirs = diffusers.DDIMScheduler.from_config(config).alphas_cumprod.numpy()
    path, _ = their.path_and_target(config)
    t = jnp.arange(1000) / 999
    ours = np.square(np.asarray(path.alpha(t), np.float64))
    # Theirs is a product of up to 1000 numbers in float32.
    np.testing.assert_allclose(ours[:-1], theirs[:-1], rtol=1e-4 if not rescaled else 2e-3)
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    if rescaled:
        assert ours[-1] == theirs[-1] == 0


def ddim(config, steps, x, network, to_zero):
    """Ours: the table and the target of the config, on the grid that it names."""
    path, target = their.path_and_target(config)
    points = samplers.grid(path, steps, their.read(config).spacing, to_zero=to_zero)

    def asked(x, t, cond):
        return network(jnp, x, t.reshape(-1, 1, 1, 1))

    @jax.jit
    def run(x):
        denoise = process.make_denoiser(asked, path, target)
        return samplers.sample(denoise, solvers.ddim(), points, x, jax.random.key(0), Cond())[0]

    return np.asarray(run(x)), np.asarray(points.t * (path.steps - 1))


CASES = {
    "Stable Diffusion 1": dict(),
    "Stable Diffusion 2.1": dict(prediction_type="v_prediction"),
    "x0": dict(prediction_type="sample"),
    "zero terminal SNR": dict(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing"
    ),
    "trailing to clean data": dict(timestep_spacing="trailing", set_alpha_to_one=True),
}


# With "trailing", diffusers goes to the next of its own times only where the steps divide the table.
RUNS = [(case, steps) for case in CASES for steps in (20, 50)] + [("Stable Diffusion 1", 30)]


@pytest.mark.parametrize(("case", "steps"), RUNS)
def test_ddim_is_theirs(case, steps):
    config = SD | CASES[case]

    def network(xp, x, t):
        return xp.sin(1.3 * x + 0.01 * t) + 0.3 * x

    x = np.random.default_rng(0).standard_normal((2, 4, 4, 3)).astype(np.float32)
    ours, times = ddim(config, steps, jnp.asarray(x), network, config["set_alpha_to_one"])
    scheduler = diffusers.DDIMScheduler.from_config(config)
    scheduler.set_timesteps(steps)
    theirs = torch.from_numpy(x)
    for t in scheduler.timesteps:
        theirs = scheduler.step(network(torch, theirs, t), t, theirs).prev_sample
    np.testing.assert_array_equal(np.round(times[:steps]), scheduler.timesteps.numpy())
    error = np.linalg.norm(ours - theirs.numpy()) / np.linalg.norm(theirs.numpy())
    print(f"{case}, {steps} steps: {error:.1e}")
    assert error < 1e-5
