"""The solvers: one step from a noise level p to a cleaner one q. `TABLE` has them by name.

A solver is a function of its options that returns a `samplers.Solver`. It knows neither network nor target; those that
ask the network between the levels of the grid take the path as well, which says what time such a level has.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from ldm_jax.diffusion.process import Path
from ldm_jax.diffusion.samplers import Solver
from ldm_jax.diffusion.solvers.adams import deis, ipndm, lms, plms, pndm
from ldm_jax.diffusion.solvers.ancestral import (
    dpm2_ancestral,
    dpmpp_2s_ancestral,
    dpmpp_sde,
    euler_ancestral,
)
from ldm_jax.diffusion.solvers.basic import ddim, ddpm, euler, heun
from ldm_jax.diffusion.solvers.churn import euler_churn, heun_churn, restart
from ldm_jax.diffusion.solvers.distilled import lcm, tcd
from ldm_jax.diffusion.solvers.dpm import (
    dpm2,
    dpm_solver,
    dpm_solver_singlestep,
    dpmpp_2m,
    dpmpp_3m,
)
from ldm_jax.diffusion.solvers.sa import sa_solver
from ldm_jax.diffusion.solvers.sde_multistep import dpmpp_2m_sde, dpmpp_3m_sde
from ldm_jax.diffusion.solvers.unipc import unipc


class About(NamedTuple):
    """What is promised of a solver."""

    make: Callable[..., Solver]  # options, and the path where it needs one -> Solver
    # Of the error of a sample, or of what is sampled where it is stochastic, with its default options and, for a
    # multistep solver, once its memory is full; 0: none but with a distilled network.
    order: int
    calls: str  # of the network
    source: str
    stochastic: bool = False  # with its default options


TWO = "2 a step, 1 from pure noise and to clean data"
TABLE = {
    "ddpm": About(ddpm, 1, "1 a step", "Ho et al. 2020, Algorithm 2", True),
    "ddim": About(ddim, 1, "1 a step", "Song et al. 2021 (DDIM), eq. 12, 16"),
    "euler": About(euler, 1, "1 a step", "Karras et al. 2022, Algorithm 1 without line 6"),
    "heun": About(heun, 2, "2 a step, 1 in the last", "Karras et al. 2022, Algorithm 1"),
    "dpm2": About(dpm2, 2, "2 a step, 1 in the last", "Lu et al. 2022, Algorithm 1; k-diffusion"),
    "dpm_solver": About(
        dpm_solver, 2, "1 a step", "Lu et al. 2022, 2022b (DPM-Solver, DPM-Solver++)"
    ),
    "dpm_solver_singlestep": About(
        dpm_solver_singlestep, 2, "1 a step", "Lu et al. 2022, 2022b; diffusers"
    ),
    "dpmpp_2m": About(dpmpp_2m, 2, "1 a step", "Lu et al. 2022b (DPM-Solver++), Algorithm 2"),
    "dpmpp_3m": About(dpmpp_3m, 3, "1 a step", "Lu et al. 2022b (DPM-Solver++)"),
    "unipc": About(unipc, 3, "1 a step", "Zhao et al. 2023 (UniPC)"),
    "lms": About(lms, 4, "1 a step", "Karras et al. 2022; k-diffusion"),
    "deis": About(deis, 3, "1 a step", "Zhang & Chen 2023 (DEIS)"),
    "ipndm": About(ipndm, 2, "1 a step", "Zhang & Chen 2023 (DEIS), Appendix H.2"),
    "plms": About(plms, 2, "1 a step, 2 in the first", "Liu et al. 2022 (PNDM)"),
    "pndm": About(
        pndm, 2, "1 a step, 4 in each of the first 3", "Liu et al. 2022 (PNDM), Algorithm 2"
    ),
    "euler_ancestral": About(euler_ancestral, 1, "1 a step", "Crowson 2022", True),
    "euler_churn": About(euler_churn, 1, "1 a step", "Karras et al. 2022, Algorithm 2", True),
    "heun_churn": About(
        heun_churn, 2, "2 a step, 1 in the last", "Karras et al. 2022, Algorithm 2", True
    ),
    "dpm2_ancestral": About(dpm2_ancestral, 2, TWO, "Crowson 2022", True),
    "dpmpp_2s_ancestral": About(
        dpmpp_2s_ancestral, 2, TWO, "Lu et al. 2022 (DPM-Solver++), Crowson 2022", True
    ),
    "dpmpp_sde": About(dpmpp_sde, 2, TWO, "Crowson 2022", True),
    "dpmpp_2m_sde": About(dpmpp_2m_sde, 2, "1 a step", "Lu et al. 2022 (DPM-Solver++)", True),
    "dpmpp_3m_sde": About(dpmpp_3m_sde, 2, "1 a step", "Crowson 2022", True),
    "sa_solver": About(sa_solver, 2, "1 a step", "Xue et al. 2023, Algorithm 1", True),
    "restart": About(
        restart,
        2,
        "2 a step down, 1 in the last, 0 a step up",
        "Xu et al. 2023 (Restart), Algorithm 2",
        True,
    ),
    "lcm": About(lcm, 0, "1 a step", "Song et al. 2023, Algorithm 1; Luo et al. 2023", True),
    "tcd": About(tcd, 0, "1 a step", "Zheng et al. 2024, Algorithm 4", True),
}


def make(name: str, path: Path, **options: Any) -> Solver:
    """The solver of that name; its options are in the docstring of its function.

    Raises:
      ValueError: no such solver, or an option that it does not have.
    """
    if name not in TABLE:
        raise ValueError(f"there is no solver {name!r}; the choices are {sorted(TABLE)}")
    of = TABLE[name].make
    takes = inspect.signature(of).parameters
    if wrong := sorted(set(options) - set(takes)):
        known = sorted(set(takes) - {"path"})
        raise ValueError(f"the solver {name!r} has no option {wrong[0]!r}; its options are {known}")
    return of(**options, **({"path": path} if "path" in takes else {}))
