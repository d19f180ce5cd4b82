"""Prepare the data set `shapes` and print where it lies.

python -m ldm_jax.data.shapes --data_dir DIR --config simple
"""

import argparse
import time

from ldm_jax.data import shapes
from ldm_jax.data.shapes import vocabulary


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m ldm_jax.data.shapes", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--data_dir", required=True, help="the folder of all TFDS data sets")
    parser.add_argument("--config", default="simple", choices=sorted(vocabulary.WORLDS))
    args = parser.parse_args()
    start = time.perf_counter()
    path = shapes.prepare(args.data_dir, args.config)
    print(f"shapes/{args.config}: {path} ({time.perf_counter() - start:.1f} s)")


if __name__ == "__main__":
    main()
