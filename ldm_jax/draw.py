"""Draw with a pretrained model, by any of its verbs (docs/pretrained.md has them).

    python -m ldm_jax.draw --model path/to/stable-diffusion-v1-5 --prompt "a cat" --n 4 --set steps=30 --out cats
    python -m ldm_jax.draw --model ... --verb image_to_image --image a.png --prompt "a dog" --set strength=0.6
    python -m ldm_jax.draw --model path/to/instruct-pix2pix --verb instruct --image a.png --prompt "make it snow"
    python -m ldm_jax.draw --model ... --control path/to/canny --hint edges.png --prompt "a bird"
    python -m ldm_jax.draw --model ... --verb explain --prompt "a red cat" --guide name=pag --grid spacing=karras

--set gives the verb's own arguments, --guide those of `guiding`, --grid those of `on_grid`; values are written as in
Python. Writes one PNG a picture (with its prompt, seed and settings in the text chunks) and `grid.png`; `explain` and
`prompt_to_prompt` also write what else they return.
"""

import ast
import inspect
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from ldm_jax import cli, heap, media
from ldm_jax.build import pictures
from ldm_jax.pretrained import Pretrained, from_pretrained
from ldm_jax.pretrained.inputs import Hint

FLAGS = flags.FlagValues()
VERBS = (
    *("text_to_image", "explain", "unconditional", "variations", "image_to_image"),
    *("depth_to_image", "inpaint", "outpaint", "edit", "diffedit", "prompt_to_prompt"),
    *("interpolate", "panorama", "high_resolution", "instruct", "upscale", "super_resolution"),
)


def _several(name: str, help: str) -> flags.FlagHolder:
    return flags.DEFINE_multi_string(name, [], f"{help}; may be repeated", flag_values=FLAGS)


MODEL = flags.DEFINE_string("model", None, "a folder or a file of weights", flag_values=FLAGS)
TOKENIZER = _several("tokenizer", "of a single file: the folder of its tokenizer")
DTYPE = flags.DEFINE_string("dtype", "float32", "of parameters and computation", flag_values=FLAGS)
CONTROL = _several("control", "a ControlNet: a folder or a file")
VERB = flags.DEFINE_string("verb", VERBS[0], "what to do", flag_values=FLAGS)
PROMPT = _several("prompt", "a prompt, or a file with one a line")
NEGATIVE = flags.DEFINE_string("negative", None, "guidance leads away from it", flag_values=FLAGS)
SOURCE = _several("source", "what an image shows, or the prompt that is edited")
IMAGE, MASK = _several("image", "a picture"), _several("mask", "white where something new is made")
DEPTH = _several("depth", "a grey picture, lighter where it is nearer")
HINT = _several("hint", "a picture for a ControlNet, one for each")
SIZE = flags.DEFINE_list("size", None, "cut and resize pictures: height,width", flag_values=FLAGS)
N = flags.DEFINE_integer("n", 1, "pictures a prompt", lower_bound=1, flag_values=FLAGS)
SEED = flags.DEFINE_integer("seed", 0, "the first; the others count on", 0, flag_values=FLAGS)
SET = _several("set", "NAME=VALUE: an argument of the verb")
GUIDE = _several("guide", "NAME=VALUE: an argument of `guiding`, such as name=pag")
GRID = _several("grid", "NAME=VALUE: an argument of `on_grid`, such as spacing=karras")
OUT = flags.DEFINE_string("out", "drawn", "a folder for the pictures", flag_values=FLAGS)


def main(argv: list[str]) -> None:
    heap.keep()
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "a prompt is given by --prompt TEXT")
        cli.required(MODEL)
        if VERB.value not in VERBS:
            raise ValueError(f"there is no verb {VERB.value!r}; the choices are {list(VERBS)}")
        verb, given = getattr(Pretrained, VERB.value), arguments()
        takes = dict(list(inspect.signature(verb).parameters.items())[1:])
        free = any(p.kind is p.VAR_KEYWORD for p in takes.values())
        needed = [
            k for k, p in takes.items() if p.default is p.empty and p.kind is not p.VAR_KEYWORD
        ]
        for name in given:
            if name not in takes and not free:
                raise ValueError(f"{VERB.value} takes no {name!r}; it takes {sorted(takes)}")
        if missing := [name for name in needed if name not in given]:
            raise ValueError(f"{VERB.value} needs {missing}; see --help for how they are given")
        pipe = from_pretrained(
            MODEL.value,
            dtype=DTYPE.value,
            tokenizers=TOKENIZER.value,
            controlnets=CONTROL.value,
        )
        if GUIDE.value:
            pipe = pipe.guiding(**named(GUIDE))
        if GRID.value:
            pipe = pipe.on_grid(**named(GRID))
        drawn = verb(pipe, **given)
    print(write(drawn, given.get("prompt", [])))


def arguments() -> dict[str, Any]:
    """What the flags say, by the names of the verbs' arguments.

    Raises:
      ValueError, FileNotFoundError: pictures that cannot be read or differ in size, or values that are none.
    """
    size = cli.whole_numbers(SIZE)
    if size is not None and len(size) != 2:
        raise ValueError(f"--size={size} must be two numbers: height,width")
    given = named(SET) | ({} if NEGATIVE.value is None else {"negative_prompt": NEGATIVE.value})
    prompts = cli.texts(PROMPT.value)
    many = max(len(prompts), len(IMAGE.value), 1)
    if VERB.value == "interpolate":
        return given | {"prompts": prompts, "seeds": (SEED.value, SEED.value + 1)}
    if SEED.value or "seed" in inspect.signature(getattr(Pretrained, VERB.value)).parameters:
        given["seed"] = SEED.value

    def spread(values: Sequence[Any], what: str) -> list[Any]:
        if len(values) not in (1, many):
            raise ValueError(f"{len(values)} {what} do not fit {many} pictures; give one for each")
        values = list(values) * (many if len(values) == 1 else 1)
        return [value for value in values for _ in range(N.value)]

    def read(holder: flags.FlagHolder) -> np.ndarray:
        found = [pictures.read_picture(path, size and tuple(size)) for path in holder.value]
        if len({x.shape for x in found}) > 1:
            raise ValueError(f"--{holder.name}: pictures differ in size; give --size height,width")
        return np.stack(spread(found, f"--{holder.name}"))

    if prompts:
        given["prompt"] = spread(prompts, "prompts")
    if SOURCE.value:
        given["source"] = spread(SOURCE.value, "source prompts")
    if IMAGE.value:
        given["images"] = read(IMAGE)
    if MASK.value:
        given["masks"] = (read(MASK).mean(-1) + 1) / 2
    if DEPTH.value:
        given["depth"] = read(DEPTH).mean(-1)
    if HINT.value:
        scale = given.pop("scale", 1.0)
        hints = [(pictures.read_picture(path, size and tuple(size)) + 1) / 2 for path in HINT.value]
        given["hints"] = [Hint(np.stack([h] * many * N.value), scale) for h in hints]
    if VERB.value == "unconditional":
        given["n"] = N.value
    return given


def named(holder: flags.FlagHolder) -> dict[str, Any]:
    """NAME=VALUE, where a value is a number, a tuple ... of Python, or else a text.

    Raises:
      ValueError: a name without a value.
    """
    found = {}
    for text in holder.value:
        name, equals, value = text.partition("=")
        if not (name.isidentifier() and equals):
            raise ValueError(f"--{holder.name} {text!r} is not of the form NAME=VALUE")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def write(drawn: Any, texts: Sequence[str]) -> Path:
    """Writes what a verb returned, with its prompts where there is one a picture; the path of the sheet."""
    out = Path(OUT.value)
    out.mkdir(parents=True, exist_ok=True)
    about = {"software": "ldm_jax", "model": MODEL.value, "verb": VERB.value}
    about |= {holder.name: " ".join(holder.value) for holder in (SET, GUIDE, GRID) if holder.value}
    about |= {} if NEGATIVE.value is None else {"negative": NEGATIVE.value}
    for name, images in parts(drawn).items():
        for i, image in enumerate(images):
            chunks = about | {"seed": str(SEED.value + i)}
            chunks |= {"prompt": texts[i]} if len(texts) == len(images) else {}
            media.save_png(out / f"{i:05d}{name}.png", image, chunks)
        if not name:
            captions = texts if len(texts) == len(images) else None
            columns = int(np.ceil(np.sqrt(len(images))))
            sheet = media.grid(images, columns=columns, captions=captions)
            media.save_png(out / "grid.png", sheet, about)
    return out / "grid.png"


def parts(drawn: Any) -> dict[str, Any]:
    """The pictures in bytes, and what else a verb returned, by what is behind the number in the files' names."""
    if isinstance(drawn, np.ndarray):
        return {"": media.to_uint8(drawn)}
    if hasattr(drawn, "sheets"):
        return {"": media.to_uint8(drawn.images), "_words": drawn.sheets()}
    source, edited = drawn
    return {"": media.to_uint8(edited), "_source": media.to_uint8(source)}


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
