"""Stochastic solvers and grids against diffusers' schedulers: the same x_T, the same noises, an analytic network.

diffusers' network is asked through each scheduler's own interface. Errors are relative to the size of what it returns.
"""

import sys
import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import grids, paths, process, samplers, solvers, targets
from ldm_jax.types import Cond

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

SD = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
TABLE, FLOW = paths.ddpm("scaled_linear"), paths.rectified_flow()
SHAPE = (2, 6)
STEPS = (5, 10, 20, 50)


def network(xp, x, t):
    return xp.sin(1.3 * x + 0.01 * t) + 0.3 * x


def given(steps, draws=1, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(SHAPE).astype(np.float32)
    return x, rng.standard_normal((steps, draws, *SHAPE)).astype(np.float32)


def ours(path, target, solver, points, x, z):
    def asked(x, t, cond):
        return network(jnp, x, t[:, None])

    @jax.jit
    def run(points, x, z):
        denoise = process.make_denoiser(asked, path, target)
        return samplers.sample(denoise, solver, points, x, z, Cond())[0]

    return np.asarray(run(points, jnp.asarray(x), jnp.asarray(z)))


def theirs(scheduler, x, z, monkeypatch, ask=None, **kwargs):
    """Their loop; the noises of a step are drawn from `z` in turn."""
    drawn = iter(torch.from_numpy(z.reshape(-1, *SHAPE)))
    module = sys.modules[type(scheduler).__module__]
    monkeypatch.setattr(module, "randn_tensor", lambda *a, **k: next(drawn), raising=False)
    x = torch.from_numpy(x) * float(scheduler.init_noise_sigma)
    for t in scheduler.timesteps:
        scaled = x if ask else scheduler.scale_model_input(x, t)
        out = ask(scheduler, x, t) if ask else network(torch, scaled, t.float())
        x = scheduler.step(out, t, x, return_dict=False, **kwargs)[0]
    return x.numpy()


def close(ours, theirs, bound=1e-4):
    error = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    print(f"{error:.1e}")
    assert error < bound


def made(name, steps, **config):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scheduler = getattr(diffusers, name)(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def on_their_entries(scheduler, to_zero=True):
    times = np.asarray(scheduler.timesteps, float)
    entries = times if to_zero else np.append(times, 0)
    return grids.grid(TABLE, len(times), "list", to_zero, entries=tuple(entries))


ENTRIES = dict(timestep_spacing="trailing")
# LCM has a grid of its own; DDPM noises its last estimate unless it is asked at the table's first entry.
SPACINGS = {"LCMScheduler": {}, "DDPMScheduler": dict(timestep_spacing="linspace")}
# Ours, theirs, what both are given. Theirs are on VP tables; those in sigma scale x by sqrt(1 + sigma^2) = 1 / alpha.
CASES = {
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", solvers.euler_ancestral(), {}, {}),
    "euler_churn": (
        "EulerDiscreteScheduler",
        "late",
        {},
        dict(s_churn=2.0, s_tmin=0.3, s_tmax=9.0, s_noise=1.01),
    ),
    "ddpm small": ("DDPMScheduler", solvers.ddpm(), dict(clip_sample=False), {}),
    "ddpm large": (
        "DDPMScheduler",
        solvers.ddpm("large"),
        dict(clip_sample=False, variance_type="fixed_large"),
        {},
    ),
    "ddim": ("DDIMScheduler", solvers.ddim(0.7), dict(clip_sample=False), dict(eta=0.7)),
    "2m_sde": (
        "DPMSolverMultistepScheduler",
        solvers.dpmpp_2m_sde(),
        dict(algorithm_type="sde-dpmsolver++"),
        {},
    ),
    "2m_sde heun": (
        "DPMSolverMultistepScheduler",
        solvers.dpmpp_2m_sde(kind="heun"),
        dict(algorithm_type="sde-dpmsolver++", solver_type="heun"),
        {},
    ),
    "3m_sde": (
        "DPMSolverMultistepScheduler",
        solvers.dpmpp_3m_sde(form="diffusers"),
        dict(
            algorithm_type="sde-dpmsolver++",
            solver_order=3,
            solver_type="heun",
            lower_order_final=False,
        ),
        {},
    ),
    "lcm": ("LCMScheduler", solvers.lcm(), {}, {}),
}


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("case", CASES)
def test_stochastic_solvers_on_a_table(case, steps, monkeypatch):
    name, solver, config, kwargs = CASES[case]
    scheduler = made(name, steps, **SD, **config, **SPACINGS.get(name, ENTRIES))
    if solver == "late":
        gamma = kwargs["s_churn"] / steps
        at = {k: v for k, v in kwargs.items() if k != "s_churn"}
        solver = solvers.euler_churn(TABLE, churn=gamma, late=True, **at)
    x, z = given(steps)
    used = z
    if case == "euler_churn":  # they draw where they churn only
        sigma = scheduler.sigmas[:-1].numpy()
        used = z[(sigma >= kwargs["s_tmin"]) & (sigma <= kwargs["s_tmax"])]
    want = theirs(scheduler, x, used, monkeypatch, **kwargs)
    points = on_their_entries(scheduler)
    start = (
        x * (float(scheduler.init_noise_sigma) * float(points.alpha[0])) if _in_sigma(name) else x
    )
    close(ours(TABLE, targets.eps(), solver, points, start, z[:, 0]), want)


def _in_sigma(name):
    return name.startswith(("Euler", "KDPM2", "DPMSolverSDE"))


@pytest.mark.parametrize("steps", STEPS)
def test_dpm2_ancestral(steps, monkeypatch):
    scheduler = made("KDPM2AncestralDiscreteScheduler", steps, **SD, **ENTRIES)
    x, z = given(steps)
    want = theirs(scheduler, x, z, monkeypatch)
    points = grids.grid(TABLE, steps, "trailing")
    start = x * (float(scheduler.init_noise_sigma) * float(points.alpha[0]))
    close(ours(TABLE, targets.eps(), solvers.dpm2_ancestral(TABLE), points, start, z[:, 0]), want)


@pytest.mark.parametrize("steps", STEPS)
def test_dpmpp_sde(steps, monkeypatch):
    """Its Brownian motion is ours, in sigma: torchsde, which it would draw it with, is not needed."""
    fake = types.ModuleType("torchsde")
    monkeypatch.setitem(sys.modules, "torchsde", fake)
    monkeypatch.delitem(sys.modules, "diffusers.schedulers.scheduling_dpmsolver_sde", raising=False)
    from diffusers.schedulers.scheduling_dpmsolver_sde import DPMSolverSDEScheduler

    scheduler = DPMSolverSDEScheduler(**SD, **ENTRIES)
    scheduler.set_timesteps(steps)
    x, z = given(steps, 2)
    calls = []

    def brownian(sigma, to):
        i, half = divmod(len(calls), 2)
        calls.append((float(sigma), float(to)))
        if not half:
            return torch.from_numpy(z[i, 0])
        (start, middle), end = calls[-2], float(to)
        share = (start - middle) / (start - end)
        return torch.from_numpy(share**0.5 * z[i, 0] + (1 - share) ** 0.5 * z[i, 1])

    scheduler.noise_sampler = brownian
    want = theirs(scheduler, x, z, monkeypatch)
    points = grids.grid(TABLE, steps, "trailing")
    start = x * (float(scheduler.init_noise_sigma) * float(points.alpha[0]))
    close(ours(TABLE, targets.eps(), solvers.dpmpp_sde(TABLE), points, start, z), want)


ORDERS = [(n, *orders) for n in STEPS for orders in ((2, 2), (3, 3))] + [(10, 1, 2), (10, 2, 1)]


@pytest.mark.parametrize(("steps", "predictor", "corrector"), ORDERS)
def test_sa_solver(steps, predictor, corrector, monkeypatch):
    scheduler = made(
        "SASolverScheduler",
        steps,
        predictor_order=predictor,
        corrector_order=corrector,
        lower_order_final=False,
        **SD,
    )
    x, z = given(steps)
    want = theirs(scheduler, x, z, monkeypatch)
    points = on_their_entries(scheduler, to_zero=False)
    solver = solvers.sa_solver(
        predictor, corrector, 1.0, begin=800.5 / 999, end=199.5 / 999, simple=True
    )
    close(ours(TABLE, targets.eps(), solver, points, x, z[:, 0]), want)


@pytest.mark.parametrize(("steps", "gamma"), [(n, 0.3) for n in STEPS] + [(5, 0.0), (5, 1.0)])
def test_tcd(steps, gamma, monkeypatch):
    scheduler = made("TCDScheduler", steps, **SD)
    x, z = given(steps)
    want = theirs(scheduler, x, z, monkeypatch, eta=gamma)
    points = grids.grid(TABLE, steps, "lcm", to_zero=False)
    np.testing.assert_array_equal(np.round(points.t[:-1] * 999), scheduler.timesteps.numpy())
    z[-1] = 0  # they end without noise
    close(ours(TABLE, targets.eps(), solvers.tcd(TABLE, gamma), points, x, z[:, 0]), want)


@pytest.mark.parametrize("case", ["euler_ancestral", "2m_sde", "ddpm small"])
def test_a_network_that_predicts_v(case, monkeypatch):
    name, solver, config, _ = CASES[case]
    scheduler = made(
        name, 10, prediction_type="v_prediction", **SD, **config, **SPACINGS.get(name, ENTRIES)
    )
    x, z = given(10)
    want = theirs(scheduler, x, z, monkeypatch)
    points = on_their_entries(scheduler)
    scale = float(scheduler.init_noise_sigma) * float(points.alpha[0]) if _in_sigma(name) else 1.0
    close(ours(TABLE, targets.v(), solver, points, x * scale, z[:, 0]), want)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("spacing", ["karras", "exponential", "beta", None])
def test_flows(steps, spacing, monkeypatch):
    """Their consistency sampling on a flow, with shift 3 and their grids of sigma, of which shift sets the least."""
    config = {f"use_{spacing}_sigmas": True} if spacing else {}
    scheduler = made(
        "FlowMatchEulerDiscreteScheduler", steps, shift=3.0, stochastic_sampling=True, **config
    )
    scheduler.init_noise_sigma = 1.0
    x, z = given(steps)
    want = theirs(scheduler, x, z, monkeypatch, ask=lambda s, x, t: network(torch, x, t))
    least = float(scheduler.sigma_min)
    if spacing:
        points = grids.grid(FLOW, steps, spacing, of="sigma", sigma_min=float(scheduler.sigmas[-2]))
    else:  # the shift is taken twice of the last level
        points = grids.grid(FLOW, steps, t_min=least, shift=3.0)
    np.testing.assert_allclose(points.sigma, scheduler.sigmas, atol=2e-6)
    solver = solvers.lcm(clock=1e6)  # without the boundary condition, which they leave out
    close(ours(FLOW, targets.flow(), solver, points, x, z[:, 0]), want)


def test_ancestral_on_a_flow(monkeypatch):
    scheduler = diffusers.LTXEulerAncestralRFScheduler()
    points = grids.grid(FLOW, 10, shift=2.0)
    scheduler.set_timesteps(sigmas=[float(s) for s in points.sigma])
    scheduler.init_noise_sigma = 1.0
    x, z = given(10)
    want = theirs(scheduler, x, z, monkeypatch, ask=lambda s, x, t: network(torch, x, t))
    got = ours(FLOW, targets.flow(), solvers.euler_ancestral(by="flow"), points, x, z[:, 0])
    close(got, want)


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_edm(name, steps, monkeypatch):
    """Euler's method without churn, where theirs asks the network at another level than it noises to."""
    sde = name != "EDMEulerScheduler"
    scheduler = made(name, steps, **dict(algorithm_type="sde-dpmsolver++") if sde else {})
    path = paths.edm()
    points = grids.grid(path, steps, "karras")
    np.testing.assert_allclose(points.sigma, scheduler.sigmas, rtol=2e-4)
    x, z = given(steps)
    want = theirs(scheduler, x, z, monkeypatch)
    start = x * float(scheduler.init_noise_sigma)
    solver = solvers.dpmpp_2m_sde() if sde else solvers.euler_churn(path, churn=0.0)
    close(ours(path, targets.edm(0.5), solver, points, start, z[:, 0]), want)
