"""Scheduler configs: the published ones, what is the table's and what is not, errors."""

import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import process
from ldm_jax.weights import scheduler
from ldm_jax.weights.scheduler import Noise

SD1 = dict(
    _class_name="PNDMScheduler",
    _diffusers_version="0.6.0",
    beta_end=0.012,
    beta_schedule="scaled_linear",
    beta_start=0.00085,
    num_train_timesteps=1000,
    set_alpha_to_one=False,
    skip_prk_steps=True,
    steps_offset=1,
    trained_betas=None,
    clip_sample=False,
)
SD21 = SD1 | dict(_class_name="DDIMScheduler", prediction_type="v_prediction")
SDXL = SD1 | dict(
    _class_name="EulerDiscreteScheduler",
    interpolation_type="linear",
    prediction_type="epsilon",
    sample_max_value=1.0,
    timestep_spacing="leading",
    use_karras_sigmas=False,
)
CASES = {
    "Stable Diffusion 1": (SD1, Noise()),
    "Stable Diffusion 2.1": (SD21, Noise(target="v")),
    "SDXL": (SDXL, Noise()),
    "Euler's spacing": (
        {k: v for k, v in SDXL.items() if k != "timestep_spacing"},
        Noise(spacing="linspace"),
    ),
    "defaults": (
        dict(_class_name="DDPMScheduler"),
        Noise("linear", 0.0001, 0.02),
    ),
    "defaults of Heun": (
        dict(_class_name="HeunDiscreteScheduler"),
        Noise("linear", 0.00085, 0.012, spacing="linspace"),
    ),
    "cosine, zero SNR": (
        dict(
            _class_name="DDIMScheduler",
            beta_schedule="squaredcos_cap_v2",
            prediction_type="sample",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
            num_train_timesteps=500,
        ),
        Noise("squared_cosine", 0.0001, 0.02, 500, True, "x0", "trailing"),
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_published_configs_and_back(name):
    config, noise = CASES[name]
    assert scheduler.read(config) == noise
    back = scheduler.to_config(noise)
    assert back["_class_name"] == "DDIMScheduler"
    assert (back["set_alpha_to_one"], back["steps_offset"], back["clip_sample"]) == (
        False,
        1,
        False,
    )
    assert scheduler.read(back) == noise
    kept = scheduler.to_config(noise, config)
    assert kept.items() >= config.items()
    assert scheduler.read(kept) == noise


def test_another_noise_within_a_given_config():
    changed = scheduler.to_config(Noise(target="v", zero_terminal_snr=True), SD1)
    assert changed["_class_name"] == "PNDMScheduler"
    assert changed["skip_prk_steps"] is True
    assert scheduler.read(changed) == Noise(target="v", zero_terminal_snr=True)


def test_path_and_target_are_those_of_the_betas():
    path, target = scheduler.path_and_target(SD21)
    abar = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    t = jnp.array([0, 400, 999]) / 999
    np.testing.assert_allclose(path.alpha(t), np.sqrt(abar[[0, 400, 999]]), rtol=1e-5)
    assert path.steps == 1000
    a, b = target.row(path, t)
    np.testing.assert_array_equal(a, -path.sigma(t))
    np.testing.assert_array_equal(b, path.alpha(t))
    zero, _ = scheduler.path_and_target(SD21 | dict(rescale_betas_zero_snr=True))
    assert float(zero.alpha(jnp.ones(()))) == 0
    with pytest.raises(ValueError, match="divides by alpha"):
        process.check(zero, scheduler.path_and_target(SD1)[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(_class_name="FlowMatchEulerDiscreteScheduler"), "'FlowMatchEuler.* is unknown"),
        (dict(_class_name=None), "None is unknown"),
        (dict(trained_betas=[0.1, 0.2]), r"trained_betas = \(0.1, 0.2\)"),
        (dict(beta_schedule="laplace"), "beta_schedule = 'laplace'"),
        (dict(prediction_type="flow_prediction"), "prediction_type = 'flow_prediction'"),
        (dict(use_flow_sigmas=True), "use_flow_sigmas = True"),
        (dict(shift_terminal=0.1), r"shift_terminal = 0.1 \(unknown\)"),
    ],
)
def test_what_we_lack_is_told(change, message):
    with pytest.raises(ValueError, match=message):
        scheduler.read(SD1 | change)


def test_a_noise_that_diffusers_lacks():
    with pytest.raises(ValueError, match="target='flow'"):
        scheduler.to_config(Noise(target="flow"))
