"""An index of pictures by what a network makes of them, for retrieval-augmented models.

    python -m ldm_jax.neighbours --images data/pictures --clip clip-vit-large-patch14 --out data/neighbours.npz --k 20
    python -m ldm_jax.neighbours --dataset shapes/simple --data_dir runs/demo/data --split train --also validation \
        --features shapes:runs/demo/features.safetensors --out runs/demo/neighbours.npz --k 4

Every picture is embedded once, and its k nearest others are looked for among all, exactly: n^2 products of length d.
Those of the splits in --also are looked up among those of --split, and are nobody's neighbours.
configs/retrieval_768.py and configs/demo_retrieval.py read such an index.
"""

import sys
from typing import Any

from absl import flags

from ldm_jax import cli

FLAGS = flags.FlagValues()
IMAGES = flags.DEFINE_string("images", None, "the folder of pictures", flag_values=FLAGS)
DATASET = flags.DEFINE_string(
    "dataset", None, "or a prepared data set, such as shapes/simple ...", flag_values=FLAGS
)
DATA_DIR = flags.DEFINE_string("data_dir", None, "... in this folder", flag_values=FLAGS)
SPLIT = flags.DEFINE_string("split", "train", "of the data set: the database", flag_values=FLAGS)
ALSO = flags.DEFINE_list("also", [], "splits whose pictures are looked up in it", flag_values=FLAGS)
CLIP = flags.DEFINE_string("clip", None, "the folder of a CLIP model", flag_values=FLAGS)
FEATURES = flags.DEFINE_string(
    "features", None, "in place of CLIP: 'shapes:FILE'", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "the index, a .npz file", flag_values=FLAGS)
K = flags.DEFINE_integer("k", 20, "neighbours of each picture", lower_bound=1, flag_values=FLAGS)
SIZE = flags.DEFINE_integer(
    "size",
    None,
    "cut pictures to squares of this side first; None: that of the network",
    lower_bound=1,
    flag_values=FLAGS,
)


def pictures_of(size: int | None) -> tuple[Any, list[str], int]:
    """The pictures, their names, and how many of them are the database.

    Raises:
      FileNotFoundError, ValueError: no such folder or data set, or flags that contradict each other.
    """
    from ldm_jax.data import tfds_source
    from ldm_jax.quality import pictures

    if (IMAGES.value is None) == (DATASET.value is None):
        raise ValueError("give either --images, a folder, or --dataset and --data_dir")
    if IMAGES.value is not None:
        if ALSO.value:
            raise ValueError("--also names splits of --dataset; a folder has none, leave it out")
        of = pictures.of_folder(IMAGES.value, size, convention="none")
        return of, list(of.names), of.count
    cli.required(DATA_DIR)
    given = DATASET.value, DATA_DIR.value
    whole = tfds_source.tfds(*given, "+".join([SPLIT.value, *ALSO.value]))
    known = len(tfds_source.tfds(*given, SPLIT.value))
    names = list(tfds_source.names(whole))
    if len({*names}) < len(names):
        raise ValueError(f"--split={SPLIT.value} and --also={','.join(ALSO.value)} overlap")
    return pictures.of_source(whole.only(("image",)), whole.name, size), names, known


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        cli.required(OUT)
        from ldm_jax.data import neighbours
        from ldm_jax.quality import embedding

        by = embedding.named(CLIP.value, FEATURES.value)
        of, names, known = pictures_of(SIZE.value or by.size)
        if known <= K.value:
            raise ValueError(
                f"{IMAGES.value or DATASET.value} has {known} pictures, and {K.value} neighbours of each were asked "
                f"for; give --k from 1 to {known - 1}"
            )
        neighbours.write(OUT.value, names, by.embed(of), K.value, known, by.network)
    print(OUT.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
