"""The tensors of one module in a file of LoRAs, put together: LoRA, DoRA, LoCon with a `mid`, LoHa, LoKr (LyCORIS).

All are chains  up [out, p] · mid [p, q, *space] · down [q, in, *space]  in the axes of torch, where `mid` may be absent
and either of the last two has the space.
"""

from collections.abc import Mapping

import numpy as np

from ldm_jax.weights import table
from ldm_jax.weights.lora import Delta


class Unfit(ValueError):
    """The tensors do not make a change of this kernel; `trouble` is what several modules may have in common."""

    def __init__(self, trouble: str, message: str):
        super().__init__(message)
        self.trouble = trouble


Parts = Mapping[str, np.ndarray]
PEFT = "lora_magnitude_vector"
MAGNITUDES = (PEFT, "dora_scale")  # of DoRA


def assemble(parts: Parts, whole: tuple[int, ...]) -> Delta:
    """The change of a kernel of shape `whole`, [out, in, *space], still in the axes of torch.

    `alpha` is None where the file does not give it.

    Raises:
      Unfit: a part without the others, ranks that differ, or a change of another shape.
    """
    parts = dict(parts)
    lengths = {name: parts.pop(name) for name in MAGNITUDES if name in parts}
    alpha = parts.get("alpha", np.ones(()))
    flat = [name for name, x in parts.items() if name != "alpha" and (x.ndim < 2 or not x.size)]
    if flat or alpha.size != 1:
        shapes = {name: parts[name].shape for name in flat or ("alpha",)}
        raise Unfit("modules have parts that are no matrices or numbers", f"{shapes}")
    parts = {name: x.reshape(()) if name == "alpha" else x for name, x in parts.items()}
    kinds = {name.split("_")[0] for name in parts} - {"alpha"}
    if lengths and kinds & {"hada", "lokr"}:
        raise Unfit("modules are LoHa or LoKr with magnitudes, which we lack", "")
    if kinds == {"hada"}:
        return _loha(parts, whole)
    if kinds == {"lokr"}:
        return _lokr(parts, whole)
    if not kinds <= {"down", "up", "mid"} or len(lengths) > 1:
        raise Unfit("modules are of two kinds at once", f"({', '.join(sorted(parts))})")
    _need(parts, "down", "up")
    down, mid, up = _chain(parts["up"], parts.get("mid"), parts["down"], whole)
    magnitude = next((_lengths(*named, whole[0]) for named in lengths.items()), None)
    return Delta(down, up, parts.get("alpha"), mid, magnitude=magnitude)


def _lengths(name: str, x: np.ndarray, out: int) -> np.ndarray:
    """A magnitude of DoRA for each output; PEFT's of convolutions are [1, out, 1, 1], kohya's [out, 1 ...].

    LyCORIS also has magnitudes for each input, [1, in ...]: another formula.
    """
    axis = 1 if name == PEFT and x.ndim > 2 else 0
    if x.ndim == 0 or x.size != out or x.shape[axis] != out:
        raise Unfit("modules have magnitudes that are not one an output", f"{x.shape} for {out}")
    return x.reshape(out)


def _loha(parts: Parts, whole: tuple[int, ...]) -> Delta:
    _need(parts, *(f"hada_{w}" for w in ("w1_a", "w1_b", "w2_a", "w2_b")))
    if ("hada_t1" in parts) != ("hada_t2" in parts):
        _need(parts, "hada_t1", "hada_t2")
    (down, mid, up), times = (
        _decomposed(parts[f"hada_w{i}_a"], parts[f"hada_w{i}_b"], parts.get(f"hada_t{i}"), whole)
        for i in (1, 2)
    )
    return Delta(down, up, parts.get("alpha"), mid, times)


def _lokr(parts: Parts, whole: tuple[int, ...]) -> Delta:
    for w in ("lokr_w1", "lokr_w2"):
        if w not in parts:
            _need(parts, f"{w}_a", f"{w}_b")
    outer = parts["lokr_w1"] if "lokr_w1" in parts else _dot(parts["lokr_w1_a"], parts["lokr_w1_b"])
    if whole[0] % outer.shape[0] or whole[1] % outer.shape[1]:
        raise Unfit(
            "modules have another shape", f"whose factor {outer.shape} does not divide {whole}"
        )
    inner = (whole[0] // outer.shape[0], whole[1] // outer.shape[1], *whole[2:])
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"]
        down, mid, up = _chain(np.eye(w2.shape[0], dtype=w2.dtype), None, w2, inner)
    else:
        down, mid, up = _decomposed(
            parts["lokr_w2_a"], parts["lokr_w2_b"], parts.get("lokr_t2"), inner
        )
    # Alpha counts only where a factor has a rank, and is then divided by this rank.
    ranks = [parts[w].shape[0] for w in ("lokr_w2_b", "lokr_w1_b") if w in parts]
    scale = float(parts["alpha"]) / ranks[0] if ranks and "alpha" in parts else 1.0
    return Delta(down, up, np.float32(scale * down.shape[0]), mid, None, outer)


def _need(parts: Parts, *names: str) -> None:
    if absent := [name for name in names if name not in parts]:
        raise Unfit("modules lack a part", f"has {sorted(parts)} and no {' and no '.join(absent)}")


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a.astype(np.float32) @ b.astype(np.float32)


def _decomposed(a: np.ndarray, b: np.ndarray, t: np.ndarray | None, whole: tuple[int, ...]):
    """LyCORIS' a [out, r] and b [r, in · space], or with a tensor t in the middle a [r, out] and b [r, in]."""
    if t is not None:
        return _chain(a.T, t, b, whole)
    if b[0].size == np.prod(whole[1:]):
        b = b.reshape(b.shape[0], *whole[1:])
    return _chain(a, None, b, whole)


def _chain(up: np.ndarray, mid: np.ndarray | None, down: np.ndarray, whole: tuple[int, ...]):
    """(down, mid, up) with the axes of the chain, where their product is a change of the kernel."""
    ranks = (up.shape[1], *(() if mid is None else mid.shape[:2]), down.shape[0])
    if ranks[0] != ranks[1] or ranks[-2] != ranks[-1]:
        raise Unfit("modules have halves of different ranks", f"{ranks}")
    wide = down if mid is None else mid
    has = (up.shape[0], down.shape[1], *wide.shape[2:])
    thin = [up, *([] if mid is None else [down])]
    if any(x[0, 0].size != 1 for x in thin) or _unpadded(has) != _unpadded(whole):
        raise Unfit("modules have another shape", f"{has} instead of {whole}")
    wide = wide.reshape(*wide.shape[:2], *whole[2:])
    up = up.reshape(up.shape[:2])
    return (wide, None, up) if mid is None else (down.reshape(down.shape[:2]), wide, up)


def _unpadded(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A 1x1 convolution is a matrix."""
    return shape[:2] if all(n == 1 for n in shape[2:]) else shape


def in_our_axes(delta: Delta, layout: table.Layout) -> Delta:
    """The change of our leaf, which may be a part of their tensor.

    Raises:
      Unfit: a Kronecker product for a tensor that holds several leaves.
    """
    if delta.outer is not None and layout.of > 1:
        raise Unfit("modules hold several of our kernels and are LoKr", "")

    def turned(down, mid, up):
        down, mid = (None if x is None else table.to_ours("/kernel", x) for x in (down, mid))
        return down, mid, table.to_ours("", up, layout).T  # no kernel's name: takes the part

    down, mid, up = turned(delta.down, delta.mid, delta.up)
    times = None if delta.times is None else turned(*delta.times)
    outer = None if delta.outer is None else delta.outer.T
    magnitude = None if delta.magnitude is None else table.to_ours("", delta.magnitude, layout)
    return Delta(down, up, delta.alpha, mid, times, outer, magnitude)
