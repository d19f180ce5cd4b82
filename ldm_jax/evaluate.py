"""How good pictures are: those of a trained model, or those in a folder.

    python -m ldm_jax.evaluate --workdir runs/demo/model --n 256 --out runs/demo/evaluation.json
    python -m ldm_jax.evaluate --workdir runs/demo/model --metrics fid,prdc --features shapes:FEATURES.safetensors
    python -m ldm_jax.evaluate --images samples --reference photographs --metrics fid,kid --weights inception.pth

Without --metrics a run on `shapes` is judged by the rules of `quality/prompts.py`. docs/evaluation.md has all metrics.
"""

import json
import math
import sys
from pathlib import Path
from typing import Any

from absl import flags, logging

from ldm_jax import cli

FLAGS = flags.FlagValues()
WORKDIR = flags.DEFINE_string("workdir", None, "a run of train.py", flag_values=FLAGS)
IMAGES = flags.DEFINE_string("images", None, "a folder of pictures", flag_values=FLAGS)
REFERENCE = flags.DEFINE_string(
    "reference",
    None,
    "a folder of pictures, or a file of --save_stats; None: the run's validation data",
    flag_values=FLAGS,
)
METRICS = flags.DEFINE_list(
    "metrics",
    ["prompts"],
    "of prompts, labels, condition, fid, sfid, kid, is, prdc, swd, clip, psnr, ssim, lpips, rfid",
    flag_values=FLAGS,
)
FEATURES = flags.DEFINE_string(
    "features", "inception", "'inception' or 'shapes:FILE'", flag_values=FLAGS
)
WEIGHTS = flags.DEFINE_list("weights", [], "the file of the features' weights", flag_values=FLAGS)
LPIPS = flags.DEFINE_list("lpips", [], "the files of LPIPS: trunk and weights", flag_values=FLAGS)
CLIP = flags.DEFINE_string("clip", None, "the folder of a CLIP model", flag_values=FLAGS)
RESIZE = flags.DEFINE_enum(
    "resize", "tensorflow", ["tensorflow", "clean"], "to Inception's size", flag_values=FLAGS
)
SIZE = flags.DEFINE_integer(
    "size",
    None,
    "cut pictures of folders to squares of this side",
    lower_bound=1,
    flag_values=FLAGS,
)
SAVE_STATS = flags.DEFINE_string(
    "save_stats", None, "a .npz file for the features of the reference", flag_values=FLAGS
)
KID_SUBSET = flags.DEFINE_integer(
    "kid_subset", 1000, "pictures in a subset of KID", lower_bound=2, flag_values=FLAGS
)
BATCH = flags.DEFINE_integer("batch", 64, "pictures at a time", lower_bound=1, flag_values=FLAGS)
N = flags.DEFINE_integer(
    "n",
    None,
    "pictures; None: all of a folder, 256 a split for prompts, 1000 of a run otherwise",
    lower_bound=1,
    flag_values=FLAGS,
)
SEED = flags.DEFINE_integer("seed", 0, "the first sample's seed", lower_bound=0, flag_values=FLAGS)
OUT = flags.DEFINE_string(
    "out", None, "the JSON file for the figures; None: WORKDIR/evaluation.json", flag_values=FLAGS
)
GUIDANCE = flags.DEFINE_float(
    "guidance", None, "classifier-free guidance scale; None: the config's", flag_values=FLAGS
)
STEPS = flags.DEFINE_integer(
    "steps", None, "steps of the solver; None: the config's", lower_bound=1, flag_values=FLAGS
)
CHECKPOINT = flags.DEFINE_integer(
    "checkpoint", None, "the checkpoint's step; None: the latest", flag_values=FLAGS
)
EMA = flags.DEFINE_string(
    "ema", None, "which of a run's averages, by name; None: the first", flag_values=FLAGS
)
OF_PROMPTS, OF_RUN = 256, 1000  # pictures where --n is not given
OF_SHAPES = ("prompts", "labels", "condition")  # metrics by the rules of `shapes`


def check_flags() -> None:
    """Looks at the flags alone.

    Raises:
      ValueError: an unknown metric, flags that are missing, or that contradict each other.
    """
    from ldm_jax.build.sections import did_you_mean
    from ldm_jax.quality import scores

    known = (*OF_SHAPES, *scores.METRICS, *scores.PAIRS, scores.PATCHES, "clip", "rfid")
    for name in METRICS.value:
        if name not in known:
            raise ValueError(f"there is no metric {name!r}{did_you_mean(name, known)}")
    if not METRICS.value:
        raise ValueError(f"--metrics names none; choose of {', '.join(known)}")
    if (WORKDIR.value is None) == (IMAGES.value is None):
        raise ValueError("give either --workdir, a run of train.py, or --images, a folder")
    if IMAGES.value is None:
        return
    if of_run := sorted({*OF_SHAPES, "rfid"} & set(METRICS.value)):
        raise ValueError(
            f"the metrics {of_run} are of a trained model: give --workdir, or other --metrics"
        )
    if REFERENCE.value is None and set(METRICS.value) - {"is", "clip"}:
        raise ValueError(
            "--reference is missing: the folder or the .npz file that --images is compared with"
        )


def folders() -> Any:
    """The subject of --images and --reference."""
    from ldm_jax.quality import pictures, subjects

    images = pictures.of_folder(IMAGES.value, SIZE.value)
    return subjects.of_folders(images.first(N.value or images.count), reference_pictures())


def reference_pictures() -> Any:
    """The pictures of --reference; None where there are none."""
    from ldm_jax.quality import pictures

    if REFERENCE.value is None or REFERENCE.value.endswith(".npz"):
        return None
    return pictures.of_folder(REFERENCE.value, SIZE.value)


def model(pipeline: Any, sampling: Any) -> Any:
    """The subject of --workdir."""
    from ldm_jax import build, media
    from ldm_jax.quality import pictures, subjects

    count = N.value or OF_RUN
    of = build.validation(WORKDIR.value, pipeline, count)
    original = pictures.Pictures(of.name, count, lambda i: media.to_uint8(of.picture(i)))
    given = (reference_pictures(), original, of.conditions, of.captions)
    return subjects.of_model(pipeline, sampling, *given, SEED.value)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        check_flags()
        from ldm_jax import build
        from ldm_jax.quality import judging

        about: dict[str, Any] = {}
        ask = judging.Asked(
            tuple(name for name in METRICS.value if name not in OF_SHAPES),
            features=FEATURES.value,
            weights=tuple(WEIGHTS.value),
            lpips=tuple(LPIPS.value),
            clip=CLIP.value,
            resize=RESIZE.value,
            statistics=REFERENCE.value if (REFERENCE.value or "").endswith(".npz") else None,
            save=SAVE_STATS.value,
            subset=KID_SUBSET.value,
            batch=BATCH.value,
        )
        splits, labelled, subject, shown = None, None, None, None
        if WORKDIR.value is not None:
            pipeline = build.pipeline(WORKDIR.value, CHECKPOINT.value, EMA.value)
            given = dict(guidance=GUIDANCE.value, steps=STEPS.value)
            override = {k: v for k, v in given.items() if v is not None}
            sampling = build.sampling(WORKDIR.value, pipeline, **override)
            about = {"step": pipeline.step} | dict(sampling.about)
            if "prompts" in METRICS.value:
                count = N.value or OF_PROMPTS
                splits = {
                    "seen": build.examples(WORKDIR.value, "validation", count),
                    "unseen": build.examples(WORKDIR.value, "unseen", count),
                }
            if "labels" in METRICS.value:
                labelled = build.labelled(WORKDIR.value, pipeline, N.value or OF_PROMPTS)
            if "condition" in METRICS.value:
                from ldm_jax.quality import conditions

                conditions.field_of(pipeline)
                shown = build.validation(WORKDIR.value, pipeline, N.value or OF_PROMPTS)
                if shown.captions is None:
                    raise ValueError(
                        f"the metric condition reads pictures of shapes, and {shown.name} has no captions to tell which"
                    )
            if ask.metrics:
                subject = model(pipeline, sampling)
        else:
            subject = folders()
        judge = judging.prepare(ask, subject) if ask.metrics else None

    figures: dict[str, Any] = {}
    if splits is not None:
        from ldm_jax.quality import prompts

        where = Path(WORKDIR.value)
        figures |= prompts.figures(pipeline, sampling, splits, SEED.value, where)
        figures["prompts"] = len(splits["seen"][1])
    if labelled is not None:
        from ldm_jax.quality import labels

        figures |= labels.figures(pipeline, sampling, *labelled, SEED.value, Path(WORKDIR.value))
        figures["labels"] = len(labelled[1])
    if shown is not None:
        import numpy as np

        captions = shown.captions()
        real = np.stack([shown.picture(i) for i in range(len(captions))])
        given = (real, shown.conditions(), captions, SEED.value, Path(WORKDIR.value))
        figures |= conditions.figures(pipeline, sampling, *given)
    if judge is not None:
        try:
            figures |= judge()
        except judging.Unusable as error:
            cli.fail(str(error))
    report(figures | about)


def report(figures: dict[str, Any]) -> None:
    """Into the JSON file, TensorBoard and the terminal."""
    if WORKDIR.value is not None and METRICS.value != ["prompts"]:
        from ldm_jax.training import logs

        logs.evaluated(WORKDIR.value, figures["step"], figures)
    out = OUT.value or (WORKDIR.value and Path(WORKDIR.value) / "evaluation.json")
    if out:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        finite = {k: None if v in (math.inf, -math.inf) else v for k, v in figures.items()}
        Path(out).write_text(json.dumps(finite, indent=2) + "\n")
        logging.info("wrote %s", out)
    for name, value in figures.items():
        print(f"{name:24s} {value:.4f}" if isinstance(value, float) else f"{name:24s} {value}")


if __name__ == "__main__":
    cli.run(main, FLAGS)
    sys.exit(0)
