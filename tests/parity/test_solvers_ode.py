"""The deterministic solvers against diffusers' schedulers, with a network that is a formula.

Same x_T, and the levels are the scheduler's own. Compared are all estimates of x0 on the way, and the end.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ldm_jax.diffusion import paths, process, samplers, solvers, targets
from ldm_jax.diffusion.process import Point
from ldm_jax.types import Cond

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.parity

TABLE = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
PATHS = {"table": paths.ddpm(), "flow": paths.rectified_flow(), "cosine": paths.cosine()}
TARGETS = {"epsilon": targets.eps(), "v_prediction": targets.v(), "flow_prediction": targets.flow()}
V = dict(prediction_type="v_prediction")


def network(xp, x, t):
    """Smooth and nonlinear, in x and in a time of 0 ... 1000."""
    return xp.sin(1.3 * x + 0.01 * t) + 0.3 * x


def few(steps):
    """diffusers lowers the order at the end of fewer than 15 steps."""
    return jnp.where(steps < 15, steps, 1000)


def multi(name, cls, ours, **options):
    """A case for each prediction and algorithm of the exponential integrators."""
    return {
        f"{name}, eps": (cls, options, ours),
        f"{name}, v": (cls, options | V, ours),
        f"{name}, flow": (cls, options | FLOW, ours),
    }


# name: (class, its options, steps -> our solver)
CASES = {
    "DDIM": ("DDIM", dict(clip_sample=False, set_alpha_to_one=False), lambda n: solvers.ddim()),
    "DDIM, v, to clean data": ("DDIM", V | dict(clip_sample=False), lambda n: solvers.euler()),
    "PNDM": ("PNDM", dict(skip_prk_steps=True), lambda n: solvers.plms()),
    "PNDM, Runge-Kutta": ("PNDM", {}, lambda n: solvers.pndm(PATHS["table"])),
    "iPNDM": ("IPNDM", {}, lambda n: solvers.ipndm()),
    "LMS": ("LMSDiscrete", {}, lambda n: solvers.lms()),
    "LMS, v, trailing": (
        "LMSDiscrete",
        V | dict(timestep_spacing="trailing"),
        lambda n: solvers.lms(),
    ),
    "Euler": ("EulerDiscrete", {}, lambda n: solvers.euler()),
    "Euler, v": ("EulerDiscrete", V, lambda n: solvers.euler()),
    "Heun": ("HeunDiscrete", {}, lambda n: solvers.heun(ratio=True)),
    "Heun, v": ("HeunDiscrete", V, lambda n: solvers.heun(ratio=True)),
    "KDPM2": ("KDPM2Discrete", {}, lambda n: solvers.dpm2(PATHS["table"])),
    "KDPM2, v": ("KDPM2Discrete", V, lambda n: solvers.dpm2(PATHS["table"])),
    "FlowMatchEuler": ("FlowMatchEulerDiscrete", {}, lambda n: solvers.euler()),
    "FlowMatchEuler, shift 3": (
        "FlowMatchEulerDiscrete",
        dict(shift=3.0),
        lambda n: solvers.euler(),
    ),
    "FlowMatchHeun": ("FlowMatchHeunDiscrete", {}, lambda n: solvers.heun()),
    **multi("DPM++ 2M", "DPMSolverMultistep", lambda n: solvers.dpmpp_2m()),
    **multi("UniPC", "UniPCMultistep", lambda n: solvers.unipc(steps=n)),
    **multi("DPM++ 2S", "DPMSolverSinglestep", lambda n: solvers.dpm_solver_singlestep()),
    **multi("DEIS", "DEISMultistep", lambda n: solvers.deis(2, steps=few(n))),
    # Its flow repeats the last level, so that it ends in noise, and the step before is not its last.
    "DEIS, flow": ("DEISMultistep", FLOW, lambda n: solvers.deis(2)),
}


def options():
    """More options, for 12 and 24 steps, which groups of 2 and 3 divide."""
    for algorithm in ("dpmsolver++", "dpmsolver"):
        # diffusers has no step of plain DPM-Solver to clean data.
        end = {} if algorithm == "dpmsolver++" else dict(final_sigmas_type="sigma_min")
        groups = end and dict(lower_order_final=False)
        for kind in ("midpoint", "heun"):
            for order in (1, 2, 3) if kind == "heun" else (2, 3):  # two names of the same order 1
                a = (order, algorithm, kind)
                given = dict(algorithm_type=algorithm, solver_type=kind, solver_order=order) | end
                yield (
                    f"multistep {a}",
                    "DPMSolverMultistep",
                    given,
                    lambda n, a=a: solvers.dpm_solver(*a, halved=True, steps=few(n)),
                )
                yield (
                    f"singlestep {a}",
                    "DPMSolverSinglestep",
                    given | groups,
                    lambda n, a=a: solvers.dpm_solver_singlestep(*a),
                )
    for of in ("x0", "eps"):
        for variant in ("bh1", "bh2"):
            for order in (1, 2, 3):
                a = (order, of, variant)
                given = dict(predict_x0=of == "x0", solver_type=variant, solver_order=order)
                # To clean data diffusers makes a nan of the others.
                given |= {} if a[1:] == ("x0", "bh2") else dict(final_sigmas_type="sigma_min")
                yield (
                    f"UniPC {a}",
                    "UniPCMultistep",
                    given,
                    lambda n, a=a: solvers.unipc(*a, steps=n),
                )
    yield (
        "UniPC, order kept",
        "UniPCMultistep",
        dict(lower_order_final=False, final_sigmas_type="sigma_min"),
        lambda n: solvers.unipc(),
    )
    for order in (1, 3):
        yield (
            f"DEIS {order}",
            "DEISMultistep",
            dict(solver_order=order),
            lambda n, order=order: solvers.deis(order, steps=few(n)),
        )


OPTIONS = {name: case for name, *case in options()}


def make(cls, steps, given):
    """Their scheduler, the path and the levels of its steps."""
    if cls == "IPNDM":  # its own first level is pure noise, where it takes x0 for 0
        sigmas = np.sin(np.linspace(0.98, 0, steps + 1) * np.pi / 2)
        scheduler = diffusers.IPNDMScheduler(trained_betas=sigmas.tolist())
        scheduler.set_timesteps(steps)
        return scheduler, "cosine", np.sqrt(1 - sigmas**2), sigmas
    kwargs = {} if cls.startswith("FlowMatch") else TABLE | given
    if cls in ("PNDM", "DDIM"):
        kwargs |= dict(steps_offset=1)
    scheduler = getattr(diffusers, cls + "Scheduler")(**(kwargs or given))
    scheduler.set_timesteps(steps)
    if cls in ("PNDM", "DDIM"):
        times = list(dict.fromkeys(scheduler.timesteps.tolist()))
        times = [t for t in times if t % (1000 // steps) == 1]  # without those halfway
        abar = scheduler.alphas_cumprod.numpy()[times]
        abar = np.append(abar, scheduler.final_alpha_cumprod).astype(float)
        return scheduler, "table", np.sqrt(abar), np.sqrt(1 - abar)
    ratio = np.array(list(dict.fromkeys(scheduler.sigmas.tolist())))  # twice where asked twice
    if cls.startswith("FlowMatch") or "use_flow_sigmas" in given:
        return scheduler, "flow", 1 - ratio, ratio
    return scheduler, "table", 1 / np.sqrt(1 + ratio**2), ratio / np.sqrt(1 + ratio**2)


ABAR = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


def times(name, alpha, sigma):
    if name == "table":
        ratio = np.log(np.maximum(sigma, 1e-9) / alpha)
        return np.interp(ratio, np.log(1 / ABAR - 1) / 2, np.arange(1000) / 999)
    return sigma if name == "flow" else np.arctan2(sigma, alpha) * 2 / np.pi


def reading(prediction, x, out, alpha, sigma):
    """x0"""
    if prediction == "epsilon":
        return (x - sigma * out) / alpha
    return (alpha if prediction == "v_prediction" else 1) * x - sigma * out


def theirs(scheduler, name, x, alpha, sigma, prediction):
    """The end, and x0 at each call of the network."""
    told, scaled = [], getattr(scheduler, "init_noise_sigma", 1.0) != 1.0
    if hasattr(scheduler, "sigmas"):  # LMS and the noise forms lose digits in float32
        scheduler.sigmas = scheduler.sigmas.double()
    x = torch.from_numpy(x).double()
    x = x / float(alpha[0]) if scaled else x
    for i, t in enumerate(scheduler.timesteps):
        inp = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        clock = {"table": t, "cosine": 1000 * t}.get(name)
        if name == "flow":
            clock = 1000 * scheduler.sigmas[i]  # theirs is cut to an integer
        out = network(torch, inp, clock)
        told.append((inp.numpy(), out.numpy()))
        x = scheduler.step(out, t, x).prev_sample
    return x.numpy() * (alpha[-1] if scaled else 1), told


def compare(case, counts):
    """{steps: the largest relative error on the way}; one program for all numbers of steps.

    Shorter grids stay at their last level until the longest one is done, which changes nothing.
    """
    cls, given, ours = case
    programs, found = {}, {}
    x_T = np.random.default_rng(0).standard_normal((2, 4, 3)).astype(np.float32)
    for n in counts:
        scheduler, name, alpha, sigma = make(cls, n, given)
        prediction = {"flow": "flow_prediction", "cosine": "v_prediction"}.get(
            name, given.get("prediction_type", "epsilon")
        )

        def walk(points, x, n, name=name, prediction=prediction):
            def asked(x, t, cond):
                return network(jnp, x, t[:, None, None])

            denoise = process.make_denoiser(asked, PATHS[name], TARGETS[prediction])
            return samplers.sample(denoise, ours(n), points, x, jax.random.key(0), Cond(), "x0")

        run = programs.setdefault(name, jax.jit(walk))
        levels = (times(name, alpha, sigma), alpha, sigma)
        rest = max(counts) + 1 - len(alpha)
        points = Point(*(np.pad(a, (0, rest), "edge").astype(np.float32) for a in levels))
        got, kept = (np.asarray(a) for a in run(points, x_T, n))
        want, told = theirs(scheduler, name, x_T, alpha, sigma, prediction)
        assert np.isfinite(want).all()
        found[n] = relative(got[None], want[None])
        if len(told) == n:  # one call a step
            pairs = zip(told, alpha[:-1], sigma[:-1], strict=False)
            x0 = np.stack([reading(prediction, *both, a, s) for both, a, s in pairs])
            found[n] = max(found[n], relative(kept[: len(x0)], x0))
    print(", ".join(f"{n} steps: {error:.1e}" for n, error in found.items()))
    return found


def relative(a, b):
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    return (np.linalg.norm(a - b, axis=1) / np.linalg.norm(b, axis=1)).max()


@pytest.mark.parametrize("name", CASES)
def test_trajectories_are_theirs(name):
    assert max(compare(CASES[name], (5, 10, 20, 50)).values()) < 1e-4


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_theirs(name):
    # To a noisy end UniPC would correct its last step when the level is repeated.
    counts = (12,) if name.startswith("UniPC") else (12, 24)
    assert max(compare(OPTIONS[name], counts).values()) < 1e-4
