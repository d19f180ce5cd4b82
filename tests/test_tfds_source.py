import io
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from ldm_jax.data import tfds_source

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def png(value, mode="RGB"):
    file = io.BytesIO()
    Image.new(mode, (8, 8), (value, 0, 0) if mode == "RGB" else value).save(file, "PNG")
    file.seek(0)
    return file


class Tiny(tfds.core.GeneratorBasedBuilder):
    """Eight pictures, of which number i is i * 10 red."""

    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None  # there is no package with a description

    def _info(self):
        kinds = tfds.features
        return tfds.core.DatasetInfo(
            builder=self,
            features=kinds.FeaturesDict(
                {
                    "image": kinds.Image(shape=(8, 8, 3), encoding_format="png"),
                    "text": kinds.Text(),
                    "label": kinds.ClassLabel(names=["even", "odd"]),
                    "captions": kinds.Sequence({"text": kinds.Text(), "id": np.int64}),
                    "vector": kinds.Tensor(shape=(2,), dtype=np.float32),
                    "segmentation": kinds.Image(shape=(8, 8, 1), encoding_format="png"),
                }
            ),
        )

    def _split_generators(self, _):
        return {"train": self._pictures(8), "test": self._pictures(3)}

    def _pictures(self, n):
        for i in range(n):
            yield (
                i,
                {
                    "image": png(i * 10),
                    "text": f"number {i}, ä",
                    "label": i % 2,
                    "captions": [{"text": f"{word} {i}", "id": 0} for word in ("a", "b")],
                    "vector": np.array([i, -i], np.float32),
                    "segmentation": png(i, "L"),
                },
            )

    def _generate_examples(self):
        raise NotImplementedError("the splits generate")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    Tiny(data_dir=root, file_format="array_record").download_and_prepare()
    return root


def number(record):
    return int(Image.open(io.BytesIO(record["image"])).getpixel((0, 0))[0]) // 10


def test_records_are_encoded_pictures_with_their_texts_and_numbers(data_dir):
    source = tfds_source.tfds("tiny", data_dir, "train", caption="text")
    assert len(source) == 8
    assert source.classes == ("even", "odd")
    assert source.name == "tiny/1.0.0 (train)"
    assert sorted(number(source[i]) for i in range(8)) == list(range(8))
    for i in range(8):
        record = source[i]
        n = number(record)
        assert record["caption"] == record["text"] == f"number {n}, ä"
        assert record["label"] == n % 2
        assert record["vector"].tolist() == [n, -n]
        assert isinstance(record["segmentation"], bytes)
    assert set(record) == set(source.fields)
    assert sorted(source.captions()) == [f"number {i}, ä" for i in range(8)]
    assert source.name_of(3) == "record 3 of tiny/1.0.0 (train)"
    with pytest.raises(IndexError, match="8 records"):
        source[8]


def test_only_the_fields_that_are_asked_for_are_read(data_dir):
    source = tfds_source.tfds("tiny", data_dir, caption="text")
    narrow = source.only(("image", "label"))
    assert set(narrow[2]) == {"image", "label"}
    assert narrow[2]["image"] == source[2]["image"]
    assert narrow.fingerprint == source.fingerprint


def test_a_caption_may_be_one_of_several_inside_a_feature(data_dir):
    source = tfds_source.tfds("tiny", data_dir, caption="captions/text")
    n = number(source[0])
    assert source[0]["caption"] == [f"a {n}", f"b {n}"]
    assert len(list(source.captions())) == 16


def test_slices_and_sums_of_splits(data_dir):
    halves = [tfds_source.tfds("tiny", data_dir, s) for s in ("train[:50%]", "train[50%:]")]
    seen = [number(half[i]) for half in halves for i in range(4)]
    assert sorted(seen) == list(range(8))
    assert len(tfds_source.tfds("tiny", data_dir, "train+test[:1]")) == 9
    prints = [half.fingerprint for half in halves]
    assert prints[0] != prints[1]
    assert prints[0] == tfds_source.tfds("tiny", data_dir, "train[:50%]").fingerprint


def test_the_newest_version_or_the_one_that_is_named(data_dir, tmp_path):
    for version in ("1.0.0", "9.0.0", "10.0.0"):
        shutil.copytree(data_dir / "tiny" / "1.0.0", tmp_path / "tiny" / version)
    assert tfds_source.tfds("tiny", tmp_path).directory.endswith("10.0.0")
    assert tfds_source.tfds("tiny:9.0.0", tmp_path).directory.endswith("9.0.0")
    (tmp_path / "tiny").rename(tmp_path / "small")
    (tmp_path / "tiny").mkdir()
    (tmp_path / "small").rename(tmp_path / "tiny" / "small")
    assert len(tfds_source.tfds("tiny/small", tmp_path)) == 8
    with pytest.raises(ValueError, match=r"configs \['small'\]; name one of them, as 'tiny/small'"):
        tfds_source.tfds("tiny", tmp_path)


def test_what_is_not_prepared_says_how_to_prepare_it(data_dir, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=rf"tfds build cifar10 --data_dir {tmp_path} --file"
    ):
        tfds_source.tfds("cifar10", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"ldm_jax.data.shapes .* --config scenes"):
        tfds_source.tfds("shapes/scenes", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'tiny:2.0.0' is not prepared"):
        tfds_source.tfds("tiny:2.0.0", data_dir)
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    for path in (tmp_path / "tiny").rglob("*train.array_record*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files of tiny/1.0.0 \(train\) are missing"):
        tfds_source.tfds("tiny", tmp_path)


def test_the_wrong_file_format_says_so(data_dir, tmp_path):
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    info = tmp_path / "tiny" / "1.0.0" / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(ValueError, match=r"stored as tfrecord, which has no random access"):
        tfds_source.tfds("tiny", tmp_path)


@pytest.mark.parametrize("split", ["valid", "train[:", "valid[:3]"])
def test_an_unknown_split_lists_the_splits(data_dir, split):
    with pytest.raises(ValueError, match=r"choose one of \['test', 'train'\]"):
        tfds_source.tfds("tiny", data_dir, split)


def test_an_empty_slice_is_refused(data_dir):
    with pytest.raises(ValueError, match="is empty"):
        tfds_source.tfds("tiny", data_dir, "train[:0%]")


@pytest.mark.parametrize("name", ["sentence", "captions/words", "text/x"])
def test_a_missing_feature_lists_the_features(data_dir, name):
    with pytest.raises(ValueError, match=rf"no feature '{name}'; its features are \['captions'"):
        tfds_source.tfds("tiny", data_dir, caption=name)


def test_a_caption_must_be_text(data_dir):
    with pytest.raises(ValueError, match=r"'label' of tiny/1.0.0 is no text"):
        tfds_source.tfds("tiny", data_dir, caption="label")


def test_another_process_reads_the_same_without_tensorflow(data_dir, tmp_path):
    source = tfds_source.tfds("tiny", data_dir, caption="text")
    (tmp_path / "source").write_bytes(pickle.dumps(source))
    code = (
        "import pickle, sys\n"
        f"source = pickle.loads(open({str(tmp_path / 'source')!r}, 'rb').read())\n"
        "print(repr([source[i]['caption'] for i in range(8)]))\n"
        "assert not {'tensorflow', 'torch', 'jax'} & set(sys.modules), 'imported'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == repr([source[i]["caption"] for i in range(8)])
