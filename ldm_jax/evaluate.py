"""How good pictures are: those of a trained model, or those in a folder.

    python -m ldm_jax.evaluate --workdir runs/demo/model --n 256 --out runs/demo/evaluation.json
    python -m ldm_jax.evaluate --workdir runs/demo/model --metrics fid,prdc --features shapes:FEATURES.safetensors
    python -m ldm_jax.evaluate --images samples --reference photographs --metrics fid,kid --weights inception.pth

Without --metrics a run on `shapes` is judged by the rules of `quality/prompts.py`. docs/evaluation.md has all metrics.
"""

import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
    "of prompts, condition, fid, sfid, kid, is, prdc, swd, clip, bpd, psnr, ssim, lpips, rfid",
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
BPD_STEPS = flags.DEFINE_integer(
    "bpd_steps",
    None,
    "noise levels of bpd; None: all of a ddpm table, 1000 otherwise",
    lower_bound=2,
    flag_values=FLAGS,
)
OF_PROMPTS, OF_RUN = 256, 1000  # pictures where --n is not given
OF_SHAPES = ("prompts", "condition")  # metrics by the rules of `shapes`
OF_MODEL = (*OF_SHAPES, "bpd", "rfid")  # of a trained model
OF_AUTOENCODER = ("rfid", "psnr", "ssim", "lpips")
Job = Callable[[], dict[str, Any]]


def check_flags() -> None:
    """Looks at the flags alone.

    Raises:
      ValueError: an unknown metric, flags that are missing, or that contradict each other.
    """
    from ldm_jax.build.sections import did_you_mean
    from ldm_jax.quality import scores

    known = (*OF_MODEL, *scores.METRICS, *scores.PAIRS, scores.PATCHES, "clip")
    for name in METRICS.value:
        if name not in known:
            raise ValueError(f"there is no metric {name!r}{did_you_mean(name, known)}")
    if not METRICS.value:
        raise ValueError(f"--metrics names none; choose of {', '.join(known)}")
    if (WORKDIR.value is None) == (IMAGES.value is None):
        raise ValueError("give either --workdir, a run of train.py, or --images, a folder")
    if IMAGES.value is None:
        return
    if of_run := sorted({*OF_MODEL} & set(METRICS.value)):
        raise ValueError(
            f"the metrics {of_run} are of a trained model: give --workdir, or other --metrics"
        )
    if REFERENCE.value is None and set(METRICS.value) - {"is", "clip"}:
        raise ValueError(
            "--reference is missing: the folder or the .npz file that --images is compared with"
        )


def judge(subject: Any, metrics: Sequence[str]) -> Job:
    """What measures the metrics that `quality.judging` knows."""
    from ldm_jax.quality import judging
    from ldm_jax.training import sharding

    ask = judging.Asked(
        tuple(metrics),
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
    return judging.prepare(ask, subject, sharding.make_mesh())


def of_folders() -> list[Job]:
    """Of --images and --reference."""
    from ldm_jax.quality import pictures, subjects

    images = pictures.of_folder(IMAGES.value, SIZE.value)
    subject = subjects.of_folders(images.first(N.value or images.count), reference_pictures())
    return [judge(subject, METRICS.value)]


def reference_pictures() -> Any:
    """The pictures of --reference; None where there are none."""
    from ldm_jax.quality import pictures

    if REFERENCE.value is None or REFERENCE.value.endswith(".npz"):
        return None
    return pictures.of_folder(REFERENCE.value, SIZE.value)


def of_autoencoder() -> tuple[list[Job], dict[str, Any]]:
    """Of --workdir, an autoencoder's; and what is told beside."""
    from ldm_jax import build
    from ldm_jax.quality import subjects

    if other := sorted(set(METRICS.value) - {*OF_AUTOENCODER}):
        raise ValueError(
            f"the metrics {other} are of a diffusion model, and {WORKDIR.value} holds an autoencoder; "
            f"choose of {', '.join(OF_AUTOENCODER)}"
        )
    idle = dict(guidance=GUIDANCE.value, steps=STEPS.value, reference=REFERENCE.value)
    if given := [f"--{name}" for name, value in idle.items() if value is not None]:
        raise ValueError(
            f"an autoencoder's reconstructions are compared with their originals; leave out {', '.join(given)}"
        )
    stage = build.first_stage(WORKDIR.value, CHECKPOINT.value, EMA.value)
    original = build.validation(WORKDIR.value, N.value or OF_RUN).pictures()
    subject = subjects.of_autoencoder(lambda: stage.reconstruct, original, BATCH.value)
    return [judge(subject, METRICS.value)], {"step": stage.step}


def of_diffusion() -> tuple[list[Job], dict[str, Any]]:
    """Of --workdir, a diffusion model's; and what is told beside."""
    from ldm_jax import build
    from ldm_jax.quality import conditions, likelihood, prompts, subjects

    where, seed, found = Path(WORKDIR.value), SEED.value, []
    pipeline = build.pipeline(where, CHECKPOINT.value, EMA.value)
    given = dict(guidance=GUIDANCE.value, steps=STEPS.value)
    override = {k: v for k, v in given.items() if v is not None}
    sampling = build.sampling(where, pipeline, **override)
    if "prompts" in METRICS.value:
        count = N.value or OF_PROMPTS
        splits = {
            "seen": build.examples(where, "validation", count),
            "unseen": build.examples(where, "unseen", count),
        }
        found.append(lambda: prompts.figures(pipeline, sampling, splits, seed, where))
    if "condition" in METRICS.value:
        shown = build.validation(where, N.value or OF_PROMPTS, pipeline)
        conditions.check(pipeline, shown.captions is not None)

        def condition():
            real = np.stack([shown.picture(i) for i in range(shown.count)])
            captions = shown.captions and shown.captions()
            near = shown.neighbours and shown.neighbours()
            given = (real, shown.conditions(), captions, seed, where, near)
            return conditions.figures(pipeline, sampling, *given)

        found.append(condition)
    of = (
        build.validation(where, N.value or OF_RUN, pipeline)
        if {*METRICS.value} - {*OF_SHAPES}
        else None
    )
    if "bpd" in METRICS.value:
        likelihood.check(pipeline)
        points = likelihood.levels(pipeline, BPD_STEPS.value)

        def bits():
            given = (of.pictures(), of.conditions(), points, seed, BATCH.value)
            return likelihood.figures(pipeline, *given)

        found.append(bits)
    if rest := [name for name in METRICS.value if name not in (*OF_SHAPES, "bpd")]:
        subject = subjects.of_model(
            lambda: pipeline,
            sampling,
            reference_pictures(),
            of.pictures(),
            of.conditions,
            of.captions,
            seed,
            BATCH.value,
        )
        found.append(judge(subject, rest))
    return found, {"step": pipeline.step} | dict(sampling.about)


def main(argv: list[str]) -> None:
    cli.compile_cache()
    with cli.plain_errors():
        cli.nothing_more(argv, "all are flags")
        check_flags()
        from ldm_jax import build
        from ldm_jax.quality.pictures import Unusable

        if WORKDIR.value is None:
            jobs, about = of_folders(), {}
        elif build.kind(WORKDIR.value) == "autoencoder":
            jobs, about = of_autoencoder()
        else:
            jobs, about = of_diffusion()
    figures: dict[str, Any] = {}
    for job in jobs:
        try:
            figures |= job()
        except Unusable as error:
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
