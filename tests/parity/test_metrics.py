"""Features and metrics of sets of pictures against torch-fidelity, with random weights read from a file of torch."""

import jax
import numpy as np
import pytest
from PIL import Image

from ldm_jax.metrics import frechet, inception_score, kernel_distance, moments, neighbours
from ldm_jax.models.inception import InceptionV3
from ldm_jax.quality import extractors, pictures
from ldm_jax.training import sharding
from ldm_jax.weights import features, table
from tests.parity import vision

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.parity

LAYERS = ["2048", "logits_unbiased"]
N, SIDE = 40, 75  # of the pictures; neither side divides 299


def state(seed=0):
    """Random weights under the published names, from shapes that our table knows."""
    rng = np.random.default_rng(seed)
    example = jax.ShapeDtypeStruct((1, 299, 299, 3), np.float32)
    shapes = jax.eval_shape(InceptionV3().init, jax.random.key(0), example)

    def drawn(leaf):
        if len(leaf.shape) == 1:
            return rng.uniform(0.5, 1.0, leaf.shape).astype(np.float32)
        fan = np.prod(leaf.shape[:-1])
        return (rng.standard_normal(leaf.shape) * np.sqrt(2 / fan)).astype(np.float32)

    made = table.export(features.INCEPTION, jax.tree.map(drawn, shapes))
    return {name: torch.tensor(array) for name, array in made.items()}


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Their network with the means and variances of data, the file of its weights, and a folder of pictures."""
    vision.available()
    pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    folder = tmp_path_factory.mktemp("metrics")
    file = folder / "inception.pth"
    torch.save(state(), file)
    network = FeatureExtractorInceptionV3(
        "inception-v3-compat", LAYERS, feature_extractor_weights_path=str(file)
    )
    rng = np.random.default_rng(1)
    (folder / "pictures").mkdir()
    for i in range(N):
        coarse = rng.integers(0, 256, (4 + i % 9, 5, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((SIDE, SIDE + 7)).save(folder / f"pictures/{i:02d}.png")
    x = torch.tensor(np.stack([np.array(Image.open(p)) for p in sorted(folder.glob("pictures/*"))]))
    x = x.permute(0, 3, 1, 2)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.train().momentum = None  # the mean over what it sees
    network(x[:8])
    network.eval()
    torch.save(network.state_dict(), file)
    with torch.no_grad():
        theirs = [network(part) for part in x.split(8)]
    return file, folder / "pictures", [torch.cat(layer) for layer in zip(*theirs, strict=True)]


@pytest.fixture(scope="module")
def ours(reference):
    file, folder, _ = reference
    mesh = sharding.make_mesh()
    extractor = extractors.of_inception([file], "tensorflow", mesh)
    parts = extractors.run(extractor, pictures.of_folder(folder), mesh, batch=16)
    return [np.concatenate(layer) for layer in zip(*parts, strict=True)]


def test_inception_features_equal_those_of_torch_fidelity(reference, ours):
    pool, logits = (layer.numpy() for layer in reference[2])
    assert pool.std(0).mean() > 0.05  # the pictures are told apart
    np.testing.assert_allclose(ours[0], pool, atol=2e-3)
    np.testing.assert_allclose(ours[2], logits, atol=2e-3)


def test_spatial_features_are_seven_channels_of_mixed_6d(reference, ours):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    file, folder, _ = reference
    network = FeatureExtractorInceptionV3("", LAYERS, feature_extractor_weights_path=str(file))
    seen = []
    network.Mixed_6d.branch1x1.register_forward_hook(lambda *of: seen.append(of[-1]))
    first = np.array(Image.open(sorted(folder.iterdir())[0]))
    with torch.no_grad():
        network(torch.tensor(first).permute(2, 0, 1)[None])
    wanted = seen[0][0, :7].permute(1, 2, 0).numpy().ravel()
    np.testing.assert_allclose(ours[1][0], wanted, atol=2e-3)


def test_fid_equals_torch_fidelity(reference, ours):
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    half = N // 2
    pool = reference[2][0]
    stats = [fid_features_to_statistics(part) for part in (pool[:half], pool[half:])]
    theirs = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    mine = frechet.distance(moments.of(ours[0][:half]), moments.of(ours[0][half:]))
    assert abs(mine - theirs) < 2e-3


def test_kid_equals_torch_fidelity(reference, ours):
    from torch_fidelity.metric_kid import kid_features_to_metric

    half, pool = N // 2, reference[2][0]
    theirs = kid_features_to_metric(
        pool[:half], pool[half:], kid_subsets=20, kid_subset_size=15, verbose=False
    )
    mine = kernel_distance.distance(ours[0][:half], ours[0][half:], subset=15, subsets=20)
    assert abs(mine.mean - theirs["kernel_inception_distance_mean"]) < 1e-5
    assert abs(mine.std - theirs["kernel_inception_distance_std"]) < 1e-5


def test_inception_score_equals_torch_fidelity(reference, ours):
    from torch_fidelity.metric_isc import isc_features_to_metric

    theirs = isc_features_to_metric(reference[2][1], splits=4)
    mine = inception_score.score(ours[2], splits=4)
    assert mine.mean > 1.01
    assert abs(mine.mean - theirs["inception_score_mean"]) < 1e-5
    assert abs(mine.std - theirs["inception_score_std"]) < 1e-5


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_precision_and_recall_equal_torch_fidelity(reference, ours, seed):
    """Of the pictures' features, and of clouds that overlap in part."""
    from torch_fidelity.metric_prc import prc_features_to_metric

    if seed is None:
        real, generated = ours[0][: N // 2], ours[0][N // 2 :]
    else:
        rng = np.random.default_rng(seed)
        real = rng.standard_normal((300, 8)).astype(np.float32)
        generated = 0.4 + 0.8 * rng.standard_normal((250, 8)).astype(np.float32)
    theirs = prc_features_to_metric(torch.tensor(generated), torch.tensor(real), verbose=False)
    mine = neighbours.measure(real, generated)
    assert mine.precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert mine.recall == pytest.approx(theirs["recall"], abs=1e-6)
    if seed is not None:
        assert 0.2 < mine.recall < 0.98
        assert 0.2 < mine.precision < 0.999
