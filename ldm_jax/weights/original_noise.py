"""The second table of noise of original files: of the x4 upscaler's small images, or of Stable unCLIP's embeddings.

Their code keeps it as buffers beside the weights ("low_scale_model.betas"). A table that one of diffusers' schedules
makes is told by its betas; files without buffers have the published one.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

LOW_RES, EMBEDDINGS = "low_scale_model.", "noise_augmentor."
# diffusers' name of the scheduler -> whose buffers it is, and the published one.
PUBLISHED = {
    "low_res_scheduler": (
        LOW_RES,
        dict(beta_schedule="scaled_linear", beta_start=1e-4, beta_end=0.02),
    ),
    "image_noising_scheduler": (EMBEDDINGS, dict(beta_schedule="squaredcos_cap_v2")),
}


def scheduler(name: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the scheduler of this name; of the tensors, at most the betas are read.

    Raises:
      ValueError: betas that no schedule of diffusers has.
    """
    prefix, published = PUBLISHED[name]
    key = f"{prefix}betas"
    found = of_betas(key, np.asarray(tensors[key], np.float64)) if key in tensors else published
    usual = dict(_class_name="DDPMScheduler", num_train_timesteps=1000, prediction_type="epsilon")
    return usual | found


def of_betas(name: str, betas: np.ndarray) -> dict[str, Any]:
    """The schedule that makes these betas, to float32's precision; `name` is for the error."""
    n, (start, end) = len(betas), (float(f"{betas[i]:.6g}") for i in (0, -1))
    levels = np.cos((np.arange(n + 1) / n + 0.008) / 1.008 * np.pi / 2) ** 2
    choices = {
        "scaled_linear": np.linspace(start**0.5, end**0.5, n) ** 2,
        "linear": np.linspace(start, end, n),
        "squaredcos_cap_v2": np.minimum(1 - levels[1:] / levels[:-1], 0.999),
    }
    for schedule, values in choices.items():
        if np.allclose(betas, values, rtol=1e-4, atol=1e-8):
            found = dict(beta_schedule=schedule, num_train_timesteps=n)
            ends = {} if schedule.startswith("squared") else dict(beta_start=start, beta_end=end)
            return found | ends
    raise ValueError(
        f"{name} from {start:g} to {end:g} is of none of the schedules {sorted(choices)}; load the folder of diffusers"
    )
