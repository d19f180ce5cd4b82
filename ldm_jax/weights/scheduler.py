"""`scheduler_config.json` of diffusers: of a scheduler it is the table of noise that belongs to a model.

The rest, which solver to use and how, is a choice when sampling: a scheduler of any class names the same table.
"""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

from ldm_jax.diffusion import paths, targets
from ldm_jax.diffusion.process import Path, Target
from ldm_jax.weights import configs

SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "squared_cosine",
}
TARGETS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


class Noise(NamedTuple):
    """What a model was trained on; the first five are the arguments of `paths.ddpm`."""

    schedule: str = "scaled_linear"
    beta_start: float = 0.00085
    beta_end: float = 0.012
    steps: int = 1000
    zero_terminal_snr: bool = False
    target: str = "eps"  # a function of `targets`
    spacing: str = "leading"  # of `samplers.grid`, where the user wants no other


# Defaults differ by class: of the table, and of the spacing of the grid.
USUAL = dict(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
NARROW = dict(beta_schedule="linear", beta_start=0.00085, beta_end=0.012)
LEADING, LINSPACE = dict(timestep_spacing="leading"), dict(timestep_spacing="linspace")
CLASSES = {
    "PNDMScheduler": USUAL | LEADING,
    "DDIMScheduler": USUAL | LEADING,
    "DDIMInverseScheduler": USUAL | LEADING,
    "DDIMParallelScheduler": USUAL | LEADING,
    "DDPMScheduler": USUAL | LEADING,
    "DDPMParallelScheduler": USUAL | LEADING,
    "EulerDiscreteScheduler": USUAL | LINSPACE,
    "EulerAncestralDiscreteScheduler": USUAL | LINSPACE,
    "LMSDiscreteScheduler": USUAL | LINSPACE,
    "DPMSolverMultistepScheduler": USUAL | LINSPACE,
    "DPMSolverMultistepInverseScheduler": USUAL | LINSPACE,
    "DPMSolverSinglestepScheduler": USUAL | LINSPACE,
    "DEISMultistepScheduler": USUAL | LINSPACE,
    "UniPCMultistepScheduler": USUAL | LINSPACE,
    "HeunDiscreteScheduler": NARROW | LINSPACE,
    "KDPM2DiscreteScheduler": NARROW | LINSPACE,
    "KDPM2AncestralDiscreteScheduler": NARROW | LINSPACE,
    "LCMScheduler": NARROW | LEADING | dict(beta_schedule="scaled_linear"),
    "TCDScheduler": NARROW | LEADING | dict(beta_schedule="scaled_linear"),
}
ONLY = dict(
    prediction_type=tuple(TARGETS),
    beta_schedule=tuple(SCHEDULES),
    timestep_spacing=("leading", "trailing", "linspace"),
    trained_betas=(None,),  # a table of its own
    use_flow_sigmas=(False,),  # another path
)
# How to sample, which does not change the table.
IDLE = (
    "algorithm_type",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "final_sigmas_type",
    "flow_shift",
    "interpolation_type",
    "lambda_min_clipped",
    "lower_order_final",
    "original_inference_steps",
    "predict_x0",
    "sample_max_value",
    "set_alpha_to_one",
    "sigma_max",
    "sigma_min",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "steps_offset",
    "thresholding",
    "time_shift_type",
    "timestep_scaling",
    "timestep_type",
    "use_beta_sigmas",
    "use_exponential_sigmas",
    "use_karras_sigmas",
    "use_lu_lambdas",
    "variance_type",
)


def read(config: Mapping[str, Any]) -> Noise:
    """The noise that a `scheduler_config.json` describes.

    Raises:
      ValueError: a class that we do not know, betas of its own, or a prediction or a schedule that we have not.
    """
    name = config.get("_class_name")
    if name not in CLASSES:
        raise ValueError(
            f"the scheduler's class {name!r} is unknown; the table of noise is known for {sorted(CLASSES)}"
        )
    takes = CLASSES[name] | dict(
        num_train_timesteps=1000, prediction_type="epsilon", rescale_betas_zero_snr=False
    )
    c = configs.read(config, f"scheduler ({name})", takes, ONLY, IDLE)
    return Noise(
        schedule=SCHEDULES[c["beta_schedule"]],
        beta_start=c["beta_start"],
        beta_end=c["beta_end"],
        steps=c["num_train_timesteps"],
        zero_terminal_snr=c["rescale_betas_zero_snr"],
        target=TARGETS[c["prediction_type"]],
        spacing=c["timestep_spacing"],
    )


def path_and_target(config: Mapping[str, Any]) -> tuple[Path, Target]:
    """How data became noise in training, and what the network predicts.

    Raises:
      ValueError: see `read`.
    """
    return _made(read(config))


# The same for the same noise, so that models of one structure share their compiled programs.
@functools.lru_cache(maxsize=8)
def _made(noise: Noise) -> tuple[Path, Target]:
    target = {"eps": targets.eps, "v": targets.v, "x0": targets.x0}[noise.target]
    return paths.ddpm(*noise[:5]), target()


def to_config(noise: Noise, original: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The inverse of `read`: `original` with this noise, or a DDIMScheduler as it is published for Stable Diffusion.

    Raises:
      ValueError: a schedule or a target that diffusers has not.
    """
    schedules = {ours: theirs for theirs, ours in SCHEDULES.items()}
    predictions = {ours: theirs for theirs, ours in TARGETS.items()}
    if noise.schedule not in schedules or noise.target not in predictions:
        raise ValueError(
            f"diffusers has no table with schedule={noise.schedule!r} and target={noise.target!r}; "
            f"it has {sorted(schedules)} and {sorted(predictions)}"
        )
    base = original or dict(
        _class_name="DDIMScheduler", set_alpha_to_one=False, steps_offset=1, clip_sample=False
    )
    return dict(base) | dict(
        beta_schedule=schedules[noise.schedule],
        beta_start=noise.beta_start,
        beta_end=noise.beta_end,
        num_train_timesteps=noise.steps,
        prediction_type=predictions[noise.target],
        rescale_betas_zero_snr=noise.zero_terminal_snr,
        timestep_spacing=noise.spacing,
    )
