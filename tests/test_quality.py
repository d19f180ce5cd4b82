"""`python -m ldm_jax.evaluate` on folders and on a tiny run, with a feature network of random weights."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from ldm_jax.data.shapes import draw, scene, shapes_dataset_builder, vocabulary
from ldm_jax.metrics import frechet, image, moments, neighbours
from ldm_jax.models.shapes_classifier import ShapesClassifier
from ldm_jax.quality import extractors, features, pictures, shapes_features
from ldm_jax.training import sharding
from ldm_jax.weights import files, shapes_classifier
from tests import tiny
from tests.tiny import quick_compiles  # noqa: F401 (a fixture of this module)

N = 90  # pictures in a folder; the features are 64 numbers


def random_network(path, seed=0):
    world = vocabulary.SIMPLE
    example = jnp.zeros((1, world.side, world.side, 3))
    shapes = jax.eval_shape(shapes_classifier.network(world).init, jax.random.key(0), example)
    rng = np.random.default_rng(seed)

    def drawn(leaf):
        fan = np.prod(leaf.shape[:-1])
        return (rng.standard_normal(leaf.shape) / np.sqrt(fan)).astype(np.float32)

    shapes_classifier.save(path, world, jax.tree.map(drawn, shapes))
    return path


def noise(folder, n=N, seed=0, side=32, width=None, low=0):
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        pixels = rng.integers(low, 256, (side, width or side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.png")
    return folder


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """Two folders of noise, and a feature network in a file."""
    root = tmp_path_factory.mktemp("quality")
    noise(root / "a", seed=1)
    noise(root / "b", seed=2, low=60)
    random_network(root / "shapes.safetensors")
    return root


def evaluate(*argv):
    return tiny.call("ldm_jax/evaluate", *argv)


def flags(root, *more, images="a", reference="b"):
    return [
        *("--images", root / images, "--reference", root / reference),
        *("--features", f"shapes:{root / 'shapes.safetensors'}", *more),
    ]


def sentence(capsys):
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")


def read(folder):
    return np.stack([np.asarray(Image.open(path)) for path in sorted(folder.iterdir())])


@pytest.mark.slow
def test_figures_of_two_folders(given, tmp_path, capsys):
    """Streamed in batches over eight devices, they are those of all features at once."""
    out, stats = tmp_path / "new/out.json", tmp_path / "stats.npz"
    names = "fid,kid,is,prdc,swd,psnr,ssim"
    more = ["--metrics", names, "--kid_subset", 30, "--batch", 20, "--out", out]
    assert evaluate(*flags(given, *more, "--save_stats", stats)) == 0
    found = json.loads(out.read_text())

    _, variables = shapes_classifier.load(given / "shapes.safetensors")
    network = shapes_classifier.network(vocabulary.SIMPLE)
    sets = [read(given / name) for name in "ba"]
    pools = [network.apply(variables, jnp.float32(x)).activations.pool for x in sets]
    expected = frechet.distance(*(moments.of(np.asarray(pool)) for pool in pools))
    assert found["fid"] == pytest.approx(expected, rel=1e-3)
    expected = neighbours.measure(*(np.asarray(pool) for pool in pools))
    assert found["recall"] == pytest.approx(expected.recall, abs=0.03)
    x, y = (jnp.float32(of) / 127.5 - 1 for of in sets)
    assert found["psnr"] == pytest.approx(float(image.psnr(x, y).mean()), rel=1e-5)
    assert found["ssim"] == pytest.approx(float(image.ssim(x, y).mean()), abs=1e-5)
    assert found["swd"] == pytest.approx((found["swd_32"] + found["swd_16"]) / 2)
    assert found["kid"] > 0
    assert found["kid_std"] > 0
    assert 1 < found["is"] < 18
    assert (found["pictures"], found["reference_pictures"]) == (N, N)
    assert f"{found['fid']:.4f}" in capsys.readouterr().out

    # The stored statistics give the same figures; they hold what the metrics needed, and say what they are of.
    again = ["--metrics", "fid,kid,prdc", "--kid_subset", 30, "--out", out]
    assert evaluate(*flags(given, *again), "--reference", stats) == 0
    stored = json.loads(out.read_text())
    for name in ("fid", "kid", "precision", "recall", "density", "coverage"):
        assert stored[name] == pytest.approx(found[name], rel=1e-6), name
    with np.load(stats, allow_pickle=False) as file:
        assert (str(file["features"]), int(file["count"])) == ("shapes/simple", N)
        assert str(file["digest"]) == found["features_sha256"]


def test_equal_folders_have_no_distance(given, tmp_path):
    out = tmp_path / "out.json"
    more = ["--metrics", "fid,prdc,swd,psnr", "--out", out]
    assert evaluate(*flags(given, *more, reference="a")) == 0
    found = json.loads(out.read_text())
    assert abs(found["fid"]) < 1e-3
    assert (found["precision"], found["recall"], found["coverage"]) == (1, 1, 1)
    assert found["swd"] == 0
    assert found["psnr"] is None  # JSON has no infinity


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--metrics", "fidd"], "no metric 'fidd'; did you mean 'fid'"),
        (["--metrics", "prompts"], "['prompts'] are of a trained model"),
        (["--metrics", "rfid"], "['rfid'] are of a trained model"),
        (["--metrics", "fid", "--workdir", "x"], "either --workdir"),
        (
            ["--metrics", "fid", "--n", "64"],
            "fid with the features shapes/simple needs 65 generated",
        ),
        (["--metrics", "sfid"], "sfid with the features shapes/simple needs 449 generated"),
        (["--metrics", "kid"], "kid with the features shapes/simple needs 1000 generated"),
        (["--metrics", "prdc", "--n", "5"], "needs 6 generated pictures"),
        (["--metrics", "lpips"], "lpips needs two files"),
        (["--metrics", "fid", "--features", "inception"], "pt_inception-2015-12-05-6726825d.pth"),
        (["--metrics", "fid", "--features", "vgg"], "no features 'vgg'"),
        (["--metrics", "fid", "--features", "shapes"], "shapes need one file"),
        (["--metrics", "fid", "--features", "shapes:no"], "there is no file no"),
        (["--metrics", "fid", "--size", "16"], "32 x 32 pixels, and those of"),
        (["--metrics", "fid", "--reference", "no.npz"], "there is no file no.npz"),
        (["--metrics", "swd", "--reference", "no.npz"], "swd looks at pixels"),
        (["--metrics", "fid", "--reference", "no"], "there is no folder"),
        (["--metrics", "psnr", "--save_stats", "x.npz"], "--save_stats keeps features"),
    ],
)
def test_what_cannot_be_evaluated(argv, words, given, capsys):
    assert evaluate(*flags(given, *argv)) == 2
    assert words in sentence(capsys)


def test_a_reference_is_needed(given, capsys):
    assert evaluate("--images", given / "a", "--metrics", "fid") == 2
    assert "--reference is missing" in sentence(capsys)
    shapes = f"shapes:{given / 'shapes.safetensors'}"
    assert evaluate("--images", given / "a", "--metrics", "is", "--features", shapes) == 0


def test_statistics_of_something_else(given, tmp_path, capsys):
    """Of other weights, of pictures of another size, of other metrics, or of nobody knows what."""
    stats = tmp_path / "stats.npz"
    more = ["--metrics", "fid", "--save_stats", stats]
    assert evaluate(*flags(given, *more)) == 0
    capsys.readouterr()

    def refused(*argv):
        assert evaluate(*flags(given, *argv), "--reference", stats) == 2
        return sentence(capsys)

    other = random_network(tmp_path / "other.safetensors", seed=1)
    assert "statistics of other weights" in refused(
        "--metrics", "fid", "--features", f"shapes:{other}"
    )
    assert "lacks what these metrics need (vectors)" in refused("--metrics", "fid,prdc")
    with np.load(stats) as file:
        arrays = dict(file)
    for change, words in (
        ({"size": np.array("64 x 64")}, "have 32 x 32 pixels and those of"),
        ({"features": np.array("inception")}, "statistics of other features (inception"),
        ({"resize": np.array("clean")}, "statistics of other resizing (clean"),
        ({"version": np.array("0")}, "does not say which network"),
        ({"count": np.array(64)}, "needs 65 reference pictures"),
    ):
        np.savez(stats, **(arrays | change))
        assert words in refused("--metrics", "fid"), words
    stats.write_bytes(stats.read_bytes()[:100])
    assert "is no .npz file" in refused("--metrics", "fid")
    np.savez(stats, mu=np.array([None]))  # an object: a pickle
    assert "is no .npz file" in refused("--metrics", "fid")


def test_pictures_that_do_not_fit(given, tmp_path, capsys):
    noise(tmp_path / "wide", n=10, width=40)
    message = [*("--metrics", "prdc"), *("--reference", given / "b")]
    assert evaluate(*flags(given, *message, images=tmp_path / "wide")) == 2
    assert "have 32 x 40; give --size 32" in sentence(capsys)
    assert evaluate(*flags(given, *message, "--size", 32, images=tmp_path / "wide")) == 0
    capsys.readouterr()
    few = noise(tmp_path / "few", n=10)
    assert evaluate(*flags(given, "--metrics", "psnr", images=few)) == 2
    assert "have other pictures, such as '010'" in sentence(capsys)
    broken = noise(tmp_path / "broken", n=10)
    (broken / "007.png").write_bytes(b"no picture")
    assert evaluate(*flags(given, *message, images=broken)) == 2
    assert "007.png cannot be used" in sentence(capsys)
    (broken / "007.png").unlink()
    Image.new("RGB", (16, 16)).save(broken / "008.png")
    assert evaluate(*flags(given, *message, images=broken)) == 2
    assert "those of" in sentence(capsys)


def test_weights_of_another_network(given, tmp_path, capsys):
    files.write(tmp_path / "w.safetensors", {"conv.weight": np.zeros((3, 3), np.float32)})
    weights = ["--weights", tmp_path / "w.safetensors"]
    assert evaluate(*flags(given, "--metrics", "fid", "--features", "inception", *weights)) == 2
    assert "is not the FID Inception-v3" in sentence(capsys)
    shapes = f"shapes:{tmp_path / 'w.safetensors'}"
    assert evaluate(*flags(given, "--metrics", "fid", "--features", shapes)) == 2
    assert "holds no feature network of shapes" in sentence(capsys)
    assert evaluate(*flags(given, "--metrics", "lpips", "--lpips", tmp_path / "w.safetensors")) == 2
    assert "not the trunk and the weights of LPIPS" in sentence(capsys)
    tensors = {"conv1.kernel": np.zeros((3, 3), np.float32)}
    about = {"kind": shapes_classifier.KIND, "world": "simple"}
    files.write(tmp_path / "w.safetensors", tensors, about)
    assert evaluate(*flags(given, "--metrics", "fid", "--features", shapes)) == 2
    assert "of another version" in sentence(capsys)


@pytest.mark.slow
def test_a_trained_model(tmp_path, capsys):
    """Samples against validation data, and reconstructions against their originals."""
    run = tmp_path / "run"
    shutil.copytree(tiny.shared_model("text"), run)
    out = tmp_path / "out.json"
    argv = ["--workdir", run, "--metrics", "swd,psnr,ssim", "--n", 10, "--out", out]
    assert evaluate(*argv) == 0
    found = json.loads(out.read_text())
    assert found["swd"] == found["swd_16"] > 0
    assert 0 < found["psnr"] < 30
    assert (found["pictures"], found["step"]) == (10, 0)
    assert list((run / "tensorboard").iterdir())
    assert evaluate(*argv, "--seed", 1) == 0
    other = json.loads(out.read_text())
    assert other["psnr"] == found["psnr"]
    assert other["swd"] != found["swd"]
    capsys.readouterr()
    assert evaluate("--workdir", run, "--metrics", "swd", "--n", 4000) == 2
    assert "examples, not 4000" in sentence(capsys)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["label", "unconditional"])
def test_models_with_other_conditions_are_sampled(kind, tmp_path):
    from ldm_jax import build

    pipeline = build.pipeline(tiny.shared_model(kind))
    of = build.validation(tiny.shared_model(kind), 6, pipeline)
    assert of.picture(5).shape == (16, 16, 3)
    assert (of.captions is None) == (kind == "label")
    made = of.conditions()
    assert all(len(rows) == 6 for rows in made.values())
    assert ("label" in made) == (kind == "label")


@pytest.mark.slow
def test_training_a_feature_network_lowers_its_loss():
    world = vocabulary.SIMPLE
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    kinds = len(world.colours) + len(world.shapes)
    present = rng.integers(0, 2, (16, kinds)).astype(np.float32)
    centre = rng.uniform(size=(16, kinds, 2)).astype(np.float32)
    pair, count = (rng.integers(0, k, 16).astype(np.int32) for k in (18, 2))
    of = shapes_features.Examples(x, pair, present, centre, present, count)
    one, many = (shapes_features.train(world, of, steps) for steps in (1, 30))
    network = ShapesClassifier(18, kinds, 2)
    values = [
        float(shapes_features.loss(network.apply(params, jnp.float32(x)), of))
        for params in (one, many)
    ]
    assert values[1] < 0.5 * values[0]
    told = shapes_features.accuracy(world, many, of)
    assert 0 <= told["kinds"] <= 1
    assert 0 < told["pixels"] < 32


def test_a_last_batch_that_is_not_full(given):
    mesh = sharding.make_mesh()
    extractor = extractors.of_shapes(given / "shapes.safetensors", mesh)
    of = pictures.of_folder(given / "a").first(19)
    parts = list(extractors.run(extractor, of, mesh, batch=16))
    assert [len(part.pool) for part in parts] == [16, 3]
    whole = features.gather(extractor, of, {"vectors"}, mesh, batch=32)
    np.testing.assert_allclose(whole.vectors, np.concatenate([p.pool for p in parts]), atol=1e-5)
    assert whole.pool is None


def test_what_a_feature_network_learns_from(tmp_path):
    """The places and kinds are those of the scenes that were painted; rare combinations count several times."""
    world = vocabulary.SIMPLE._replace(
        name="tiny", splits={"train": 8, "validation": 1, "unseen": 4}
    )
    config = shapes_dataset_builder.config(world)
    builder = shapes_dataset_builder.Builder(
        data_dir=tmp_path, config=config, file_format="array_record"
    )
    builder.download_and_prepare()
    of = shapes_features.training(world, tmp_path)
    assert len(of.x) == 4 + 2 * shapes_features.OFTEN
    kinds = [*world.colours, *world.shapes]
    for i, (split, index) in ((1, ("train", 1)), (4, ("unseen", 0)), (7, ("unseen", 1))):
        painted = scene.sample(world, split, index)
        assert of.count[i] == len(painted.things) - 1
        named = {kinds[k] for k in np.flatnonzero(of.present[i])}
        assert named == {word for thing in painted.things for word in (thing.colour, thing.shape)}
        for thing in painted.things:
            k = kinds.index(thing.colour)
            if of.alone[i, k]:
                top, left, bottom, right = np.divide(draw.extent(thing), world.side)
                middle = ((top + bottom) / 2, (left + right) / 2)
                np.testing.assert_allclose(of.centre[i, k], middle, atol=1e-3)
    assert of.alone.sum() > 20
