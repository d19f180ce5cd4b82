"""Code of docs/guide.md that no command runs, on a tiny model."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)


def block(file, having):
    """The one block of Python in a document that has these words."""
    text = (tiny.ROOT / "docs" / file).read_text()
    (found,) = [
        code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if having in code
    ]
    return found


@pytest.mark.slow
def test_guidance_by_a_function_of_the_picture_makes_it_likelier():
    code = block("guide.md", "gradients.by_estimate").replace(
        "runs/demo/model", str(tiny.shared_model("text"))
    )
    scope = {}
    exec(code, scope)
    batch, key = scope["pipe"].prompts(["a square"]), jax.random.key(0)
    plain = scope["draw"](scope["params"], batch, key, jnp.float32(0))
    assert scope["images"].shape == plain.shape == (1, 16, 16, 3)

    def red(x):
        return float(np.mean(x[..., 0] - x[..., 1:].mean(-1)))

    assert red(scope["images"]) > red(plain) + 1e-3
