"""Train the feature network of `shapes`, which measures pictures of that data set as Inception does photographs.

python -m ldm_jax.train_features --data_dir runs/demo/data --out runs/demo/features.safetensors
"""

import sys

from absl import flags

from ldm_jax import cli
from ldm_jax.data.shapes import vocabulary

FLAGS = flags.FlagValues()
DATA_DIR = flags.DEFINE_string("data_dir", None, "where `shapes` is prepared", flag_values=FLAGS)
CONFIG = flags.DEFINE_enum(
    "config", "simple", sorted(vocabulary.WORLDS), "which pictures", flag_values=FLAGS
)
OUT = flags.DEFINE_string("out", None, "the .safetensors file to write", flag_values=FLAGS)
STEPS = flags.DEFINE_integer("steps", 600, "of training", lower_bound=1, flag_values=FLAGS)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        cli.required(DATA_DIR, OUT)
        if not OUT.value.endswith(".safetensors"):
            raise ValueError(f"--out={OUT.value} must end in .safetensors")
        from ldm_jax.quality import shapes_features
        from ldm_jax.weights import shapes_classifier

        world = vocabulary.world(CONFIG.value)
        training = shapes_features.training(world, DATA_DIR.value)
        splits = {
            split: shapes_features.examples(world, DATA_DIR.value, split)
            for split in ("validation", "unseen[50%:]")
        }
    params = shapes_features.train(world, training, STEPS.value)
    for split, of in splits.items():
        told = shapes_features.accuracy(world, params, of)
        print(
            f"{split:12s} colours and shapes right {told['kinds']:.3f}, number {told['count']:.3f}, "
            f"places within {told['pixels']:.2f} pixels"
        )
    shapes_classifier.save(OUT.value, world, params)
    print(OUT.value)


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
