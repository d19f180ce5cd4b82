"""An index of a folder's pictures by their CLIP embeddings, for retrieval-augmented models.

    python -m ldm_jax.neighbours --images data/pictures --clip clip-vit-large-patch14 --out data/neighbours.npz --k 20

Every picture is embedded once, and its k nearest others are looked for among all, exactly: n^2 products of length d.
configs/retrieval_768.py reads the index.
"""

import sys

from absl import flags

from ldm_jax import cli

FLAGS = flags.FlagValues()
IMAGES = flags.DEFINE_string("images", None, "the folder of pictures", flag_values=FLAGS)
CLIP = flags.DEFINE_string("clip", None, "the folder of a CLIP model", flag_values=FLAGS)
OUT = flags.DEFINE_string("out", None, "the index, a .npz file", flag_values=FLAGS)
K = flags.DEFINE_integer("k", 20, "neighbours of each picture", lower_bound=1, flag_values=FLAGS)
SIZE = flags.DEFINE_integer(
    "size", 224, "cut pictures to squares of this side first", lower_bound=1, flag_values=FLAGS
)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        cli.required(IMAGES, OUT)
        from ldm_jax.data import neighbours
        from ldm_jax.quality import clip_score, pictures

        of = pictures.of_folder(IMAGES.value, SIZE.value, convention="none")
        if of.count <= K.value:
            raise ValueError(
                f"{IMAGES.value} has {of.count} pictures, and {K.value} neighbours of each were asked for; give --k "
                f"from 1 to {of.count - 1}"
            )
        embed = clip_score.embedder(CLIP.value)
        neighbours.write(OUT.value, of.names, embed(of), K.value)
    print(OUT.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
