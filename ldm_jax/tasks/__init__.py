"""What a trained model draws, one compiled program a task: from a text alone, from pictures, between two prompts.

A task changes where the walk from noise begins, what of given data stays, and which conditions are asked for
(`diffusion.editing` and its neighbours); the denoiser, its guidance and the one scan are the same in all of them.
Seeds, prompts, pictures, masks, strengths, guidance and the grid's values are traced; the task, the solver, the number
of steps and the shapes compile anew. Every sample has its own seed and does not depend on what is drawn beside it.

`asked` has what a user asks for, `begin` where each task begins, `programs` what is compiled.
"""

from ldm_jax.tasks.asked import NAMES, TEXT, Drawn, Sampling, Task
from ldm_jax.tasks.programs import FILM, Stepwise, make_sampler, make_stepwise, walked

__all__ = [
    "FILM",
    "NAMES",
    "TEXT",
    "Drawn",
    "Sampling",
    "Stepwise",
    "Task",
    "make_sampler",
    "make_stepwise",
    "walked",
]
