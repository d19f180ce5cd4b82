"""How many floating-point operations a function takes, from what it says and not from how a device does it.

Matrix products and convolutions count, a multiplication and an addition as two; all else is left out. The function is
traced without a device in mind, so that kernels which save or repeat work change nothing: two implementations of one
network have one count, and a rate by it may be compared between devices. XLA's `cost_analysis` counts what was
compiled, adds elementwise work, and takes the body of a loop once.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractDevice, AbstractMesh

NOWHERE = AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("none", 1, "none"))


def flops(f: Callable[..., Any], *args: Any) -> int:
    """Operations of `f(*args)`; the arguments may be shapes.

    Raises:
      ValueError: a loop whose turns are not known before it runs, or a kernel that says nothing of what it does.
    """
    with jax.sharding.use_abstract_mesh(NOWHERE):
        # A function of its own, since jit remembers how it traced another.
        return _of_jaxpr(jax.make_jaxpr(lambda *args: f(*args))(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    kind, params = equation.primitive.name, equation.params
    if kind == "dot_general":
        (summed, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in summed)
    if kind == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        out = params["dimension_numbers"].rhs_spec[0]  # the axis of the kernel's output channels
        each = math.prod(kernel) // kernel[out]
        return 2 * math.prod(equation.outvars[0].aval.shape) * each
    if kind == "scan":
        return params["length"] * _of_jaxpr(params["jaxpr"].jaxpr)
    if kind == "cond":
        return max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
    held = jax.tree.leaves(list(params.values()), is_leaf=lambda value: hasattr(value, "eqns"))
    jaxprs = (getattr(value, "jaxpr", value) for value in held)  # of closed ones
    inner = sum(_of_jaxpr(jaxpr) for jaxpr in jaxprs if hasattr(jaxpr, "eqns"))
    if kind == "pallas_call" or (kind == "while" and inner):
        raise ValueError(f"the operations of a {kind!r} cannot be counted before it runs")
    return inner
