"""Grids of noise levels against diffusers' schedulers."""

import warnings

import numpy as np
import pytest

from ldm_jax.diffusion import grids, paths, spacings

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TABLE, FLOW = paths.ddpm("scaled_linear"), paths.rectified_flow()
# Their class and config; our spacing and options. Theirs go down to the table's first entry before 0, as ours.
CASES = {
    "karras": ("EulerDiscreteScheduler", dict(use_karras_sigmas=True), "karras", {}),
    "exponential": ("EulerDiscreteScheduler", dict(use_exponential_sigmas=True), "exponential", {}),
    "beta": ("EulerDiscreteScheduler", dict(use_beta_sigmas=True), "beta", dict(of="ratio")),
    "DPM karras": ("DPMSolverMultistepScheduler", dict(use_karras_sigmas=True), "karras", {}),
    "DPM exponential": (
        "DPMSolverMultistepScheduler",
        dict(use_exponential_sigmas=True),
        "exponential",
        {},
    ),
    "DPM beta": (
        "DPMSolverMultistepScheduler",
        dict(use_beta_sigmas=True),
        "beta",
        dict(of="ratio"),
    ),
    "DPM lu": ("DPMSolverMultistepScheduler", dict(use_lu_lambdas=True), "log_snr", {}),
    "Euler linspace": ("EulerDiscreteScheduler", {}, "linspace", dict(rounded=False)),
    "Euler leading": (
        "EulerDiscreteScheduler",
        dict(timestep_spacing="leading", steps_offset=1),
        "leading",
        {},
    ),
    "Euler trailing": (
        "EulerDiscreteScheduler",
        dict(timestep_spacing="trailing"),
        "trailing",
        {},
    ),
    "DPM linspace": ("DPMSolverMultistepScheduler", {}, "linspace", dict(extra=True)),
    "DPM leading": (
        "DPMSolverMultistepScheduler",
        dict(timestep_spacing="leading", steps_offset=1),
        "leading",
        dict(extra=True),
    ),
}


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("case", CASES)
def test_levels_of_a_table(case, steps):
    """Where theirs lie between entries they interpolate sigma / alpha, and we its logarithm: up to 1e-4 apart."""
    name, config, spacing, options = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = getattr(diffusers, name)(**SD, **config)
        theirs.set_timesteps(steps)
    points = grids.grid(TABLE, steps, spacing, **options)
    np.testing.assert_allclose(points.sigma / points.alpha, theirs.sigmas.numpy(), rtol=2e-4)
    if not options.get("of") and "DPM" not in case:  # DPM's times are rounded
        np.testing.assert_allclose(points.t[:-1] * 999, theirs.timesteps.numpy(), atol=0.02)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
@pytest.mark.parametrize("form", ["exponential", "linear"])
def test_shift_by_resolution(form, steps):
    """As FLUX' pipeline calls it: uniform levels from 1 to 1 / steps, and mu by the number of tokens."""
    theirs = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=form, shift_terminal=0.1
    )
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    theirs.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu)
    shift = dict(tokens=1024, form=form)
    points = grids.grid(FLOW, steps, shift=shift, terminal=0.1)
    np.testing.assert_allclose(points.sigma, theirs.sigmas.numpy(), atol=2e-6)


@pytest.mark.parametrize("model", ["sd1", "sdxl", "svd"])
def test_align_your_steps(model):
    """Their lists, which end at 0."""
    from diffusers.schedulers import AysSchedules

    key = {"sd1": "StableDiffusion", "sdxl": "StableDiffusionXL", "svd": "StableDiffusionVideo"}
    assert list(spacings.AYS[model][:-1]) == AysSchedules[key[model] + "Sigmas"][:-1]


def test_edm_exponential():
    theirs = diffusers.EDMEulerScheduler(sigma_schedule="exponential")
    theirs.set_timesteps(12)
    points = grids.grid(paths.edm(), 12, "exponential")
    np.testing.assert_allclose(points.sigma, theirs.sigmas.numpy(), rtol=2e-4)
