"""Code of docs/guide.md that no command runs, on a tiny model."""

import re

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
    code = block("guide.md", "Towards(").replace("runs/demo/model", str(tiny.shared_model("text")))
    led, plain = ({}, {})
    exec(code, led)
    exec(code.replace("pull=1.0", "pull=0.0"), plain)
    x, y = (scope["drawn"].x for scope in (led, plain))
    assert x.shape == y.shape == (1, 16, 16, 3)

    def red(x):
        return float(np.mean(x[..., 0] - x[..., 1:].mean(-1)))

    assert red(x) > red(y) + 1e-3
