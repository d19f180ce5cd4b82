"""Readers of published data sets, each on a small made-up copy in the original's layout of files."""

import hashlib
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import coco, folder, imagenet, listed, lsun, maps, open_images, pipeline, records

SIDE = 16


def picture(path, size=(SIDE, SIDE), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def written(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else json.dumps(text))


def test_imagenet_folders_have_names_in_the_order_of_their_synsets(tmp_path):
    for synset, n in (("n02012849", 2), ("n03126707", 1), ("n01440764", 1)):
        for i in range(n):
            picture(tmp_path / f"train/{synset}/{synset}_{i}.JPEG")
    names = "n01440764 tench, Tinca tinca\nn02012849 crane\nn03126707 crane\n"
    written(tmp_path / "LOC_synset_mapping.txt", names)
    of = imagenet.imagenet(tmp_path)
    assert isinstance(of, records.Source)
    assert of.classes == ("tench, Tinca tinca", "crane (n02012849)", "crane (n03126707)")
    assert [of[i]["label"] for i in range(len(of))] == [0, 1, 1, 2]
    batch = pipeline.batches(of, batch=4, size=8, seed=0, fields=("label",))[0]
    assert sorted(batch["label"]) == [0, 1, 1, 2]
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    assert imagenet.imagenet(tmp_path).classes == ("n01440764", "n02012849", "n03126707")
    with pytest.raises(ValueError, match="ImageNet has no split 'val'; choose one of"):
        imagenet.imagenet(tmp_path, split="val")


def test_imagenet_s_validation_is_in_folders_or_alone_with_its_solution(tmp_path):
    root = tmp_path / "ILSVRC/Data/CLS-LOC"
    for synset in ("n01440764", "n02012849"):
        picture(root / f"train/{synset}/a.JPEG")
    picture(root / "val/ILSVRC2012_val_00000002.JPEG")
    picture(root / "val/ILSVRC2012_val_00000001.JPEG")
    told = (
        "ImageId,PredictionString\nILSVRC2012_val_00000001,n02012849 1 2 3 4 n02012849 5 6 7 8 \n"
    )
    written(tmp_path / "LOC_val_solution.csv", told)
    with pytest.raises(ValueError, match=r"1 pictures of .* are of synsets without a folder"):
        imagenet.imagenet(tmp_path, split="validation")
    written(
        tmp_path / "LOC_val_solution.csv", f"{told}ILSVRC2012_val_00000002,n01440764 1 2 3 4 \n"
    )
    of = imagenet.imagenet(tmp_path, split="validation")
    assert [of[i]["label"] for i in range(2)] == [1, 0]


def test_lsun_and_faces_are_folders_with_or_without_lists(tmp_path):
    # LSUN's export: a folder a letter, webp; FFHQ: a folder a thousand; CelebA-HQ: pictures alone.
    for name in ("a/0/b/a0b1.webp", "a/0/c/a0c2.webp", "0/0/0/0001.webp"):
        picture(tmp_path / "churches" / name)
    every = folder.folder(tmp_path / "churches", convention="none")
    assert (len(every), every.fields) == (3, ("image",))
    written(tmp_path / "train.txt", "a/0/c/a0c2.webp\n\n0/0/0/0001.webp\n")
    of = listed.listed(tmp_path / "churches", tmp_path / "train.txt")
    assert of.files == ("0/0/0/0001.webp", "a/0/c/a0c2.webp")
    assert of.name == "churches (train)"
    assert pipeline.batches(of, batch=2, size=8, seed=0)[0]["x"].shape == (2, 8, 8, 3)
    written(tmp_path / "train.txt", "a/0/c/a0c2.webp\na/0/c/a0c2.webp\n")
    with pytest.raises(ValueError, match=r"names 'a/0/c/a0c2\.webp' more than once"):
        listed.listed(tmp_path / "churches", tmp_path / "train.txt")
    written(tmp_path / "train.txt", "a/0/c/a0c2.webp\ngone.webp\n")
    with pytest.raises(FileNotFoundError, match=r"1 of 2 pictures .* the first is 'gone.webp'"):
        listed.listed(tmp_path / "churches", tmp_path / "train.txt")


def coco_copy(root):
    names = ("000000000009.jpg", "000000000025.jpg")
    images = [
        dict(id=int(name[:-4]), file_name=name, width=32, height=SIDE, coco_url="", license=1)
        for name in names
    ]
    for i, name in enumerate(names):
        picture(root / "val2017" / name, (32, SIDE), seed=i)
        classes = np.full((SIDE, 32), 255, np.uint8)
        classes[:, :16] = 181 - i
        path = root / "stuffthingmaps/val2017" / name.replace("jpg", "png")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(classes).save(path)
    told = [
        dict(image_id=9, caption=" A cat. "),
        dict(image_id=25, caption="A dog."),
        dict(image_id=9, caption="Its tail."),
    ]
    things = [
        dict(id=18, name="dog", supercategory="a"),
        dict(id=1, name="person", supercategory="b"),
    ]
    stuff = [
        dict(id=92, name="banner", supercategory="c"),
        dict(id=183, name="other", supercategory=""),
    ]

    def box(image, category, *bbox, crowd=0):
        return dict(id=0, image_id=image, category_id=category, bbox=bbox, iscrowd=crowd, area=1)

    written(root / "annotations/captions_val2017.json", dict(images=images, annotations=told))
    boxes = [box(9, 18, 8, 4, 16, 8), box(9, 1, 0, 0, 32, 16, crowd=1), box(25, 1, 0, 0, 4, 4)]
    instances = dict(images=images, annotations=boxes, categories=things)
    written(root / "annotations/instances_val2017.json", instances)
    rest = [box(25, 92, 0, 8, 32, 8), box(25, 183, 0, 0, 32, 16)]
    written(
        root / "annotations/stuff_val2017.json",
        dict(images=images, annotations=rest, categories=stuff),
    )
    return root


@pytest.fixture
def bedrooms(tmp_path):
    """LSUN's databases of a category, with five and two pictures; and the pictures by their keys."""
    lmdb = pytest.importorskip("lmdb")
    found = {}
    for split, n in (("train", 5), ("val", 2)):
        with lmdb.open(str(tmp_path / f"bedroom_{split}_lmdb")) as database:
            for i in range(n):
                key = hashlib.sha1(f"{split} {i}".encode()).hexdigest()
                found[key] = picture(tmp_path / "one.webp", seed=i).read_bytes()
                with database.begin(write=True) as writing:
                    writing.put(key.encode(), found[key])
    return tmp_path / "bedroom", found


def test_lsun_s_databases_are_read_as_they_are_published(bedrooms, tmp_path):
    path, found = bedrooms
    of = lsun.lsun(path)
    assert isinstance(of, records.Source)
    assert (len(of), of.fields, of.name) == (5, ("image",), "bedroom_train_lmdb")
    keys = [of.name_of(i).split()[0] for i in range(5)]
    assert keys == sorted(keys)
    assert [of[i]["image"] for i in range(5)] == [found[key] for key in keys]
    copy = pickle.loads(pickle.dumps(of))
    assert copy[3] == of[3]
    assert pipeline.batches(of, batch=5, size=8, seed=0)[0]["x"].shape == (5, 8, 8, 3)
    validation = lsun.lsun(path, split="validation")
    assert len(validation) == 2
    assert validation.fingerprint != of.fingerprint
    written(tmp_path / "names.txt", f"{keys[3]}.webp\n\n{keys[1]}.webp\n")
    some = lsun.lsun(path, names=tmp_path / "names.txt")
    assert [some[i]["image"] for i in range(len(some))] == [found[keys[1]], found[keys[3]]]
    assert some.fingerprint != of.fingerprint


def test_lsun_s_databases_that_cannot_be_read(bedrooms, tmp_path):
    path, _ = bedrooms
    with pytest.raises(ValueError, match="LSUN has no split 'val'; choose one of"):
        lsun.lsun(path, split="val")
    with pytest.raises(FileNotFoundError, match=r"there is no '.*kitchen_train_lmdb"):
        lsun.lsun(tmp_path / "kitchen")
    written(tmp_path / "names.txt", "0123.webp\n")
    with pytest.raises(ValueError, match=r"1 of the 1 pictures .* the first is '0123'"):
        lsun.lsun(path, names=tmp_path / "names.txt")
    (tmp_path / "hall_train_lmdb").mkdir()
    (tmp_path / "hall_train_lmdb" / "data.mdb").write_bytes(b"nothing" * 2000)
    with pytest.raises(ValueError, match=r"hall_train_lmdb' cannot be read .*; download it anew"):
        lsun.lsun(tmp_path / "hall")


def test_without_lmdb_its_package_is_named(tmp_path, monkeypatch):
    (tmp_path / "hall_train_lmdb").mkdir()
    (tmp_path / "hall_train_lmdb" / "data.mdb").touch()
    monkeypatch.setitem(sys.modules, "lmdb", None)
    with pytest.raises(ValueError, match=r"need the package lmdb: pip install 'ldm_jax\[lsun\]'"):
        lsun.lsun(tmp_path / "hall")


def test_coco_has_captions_boxes_and_maps(tmp_path):
    root = coco_copy(tmp_path)
    of = coco.captions(root, split="validation")
    assert of[0]["caption"] == ["A cat.", "Its tail."]
    assert list(of.captions()) == ["A cat.", "Its tail.", "A dog."]

    of = coco.boxes(root, split="validation")
    assert of.classes == ("person", "dog", "banner")
    first, second = of[0]["boxes"], of[1]["boxes"]
    np.testing.assert_allclose(first["bbox"], [[0.25, 0.25, 0.75, 0.75], [0, 0, 1, 1]])
    assert first["label"].tolist() == [1, 0]
    assert first["group"].tolist() == [0, 1]
    assert second["label"].tolist() == [0, 2]  # "other" is no class
    things = coco.boxes(root, split="validation", stuff=False, fewest=1)
    assert [len(things[i]["boxes"]["label"]) for i in range(2)] == [2, 1]
    layout = dict(classes=(("group", 2), ("label", 3)), objects=2, vocab=82)
    batch = pipeline.batches(of, batch=2, size=16, seed=0, fields=("layout",), layout=layout)[0]
    assert batch["layout"].shape == (2, 8)
    assert batch["layout"].dtype == np.int32

    of = coco.stuff(root, split="validation")
    batch = pipeline.batches(of, batch=2, size=(8, 16), seed=0, fields=("segmentation",))[0]
    assert {*np.unique(batch["segmentation"])} == {-1, 180, 181}
    known = dict(segmentation=range(-1, 181))
    with pytest.raises(ValueError, match=r"has the class 181 in its field .* \(0 to 180\)"):
        pipeline.batches(
            of, batch=2, size=(8, 16), seed=0, fields=("segmentation",), classes=known
        )[0]


def test_coco_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="COCO has no split 'val'"):
        coco.boxes(tmp_path, split="val")
    with pytest.raises(FileNotFoundError, match=r"there is no .*val2017"):
        coco.boxes(tmp_path, split="validation")
    root = coco_copy(tmp_path)
    (root / "val2017/000000000025.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 2 pictures .* '000000000025.jpg'"):
        coco.boxes(root, split="validation")


def open_images_copy(root):
    for name in ("00aa", "00bb"):
        picture(root / f"validation/{name:0>16}.jpg")
    written(root / "class-descriptions-boxable.csv", "/m/02,Tree\n/m/01,Tortoise\n")
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    head += "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
    rows = (
        "00aa,xclick,/m/02,1,0.25,0.75,0.0,0.5,0,0,1,0,0",
        "00aa,xclick,/m/01,1,0.0,1.0,0.5,1.0,0,0,0,0,0",
        "00bb,xclick,/m/01,1,0.0,0.001,0.0,0.001,0,0,0,0,0",
        "00bb,xclick,/m/01,1,0.0,1.0,0.0,1.0,0,0,0,0,0",
    )
    written(root / "validation-annotations-bbox.csv", "\n".join((head, *rows)) + "\n")
    return root


def test_open_images_boxes_come_from_its_table(tmp_path):
    root = open_images_copy(tmp_path)
    of = open_images.open_images(root, split="validation")
    assert isinstance(of, records.Source)
    assert of.classes == ("Tortoise", "Tree")
    assert Path(of.name_of(0)).name == "00000000000000aa.jpg"
    assert len(of) == 1  # the other has one box that is not too small
    boxes = of[0]["boxes"]
    np.testing.assert_allclose(boxes["bbox"], [[0, 0.25, 0.5, 0.75], [0.5, 0, 1, 1]])
    assert (boxes["label"].tolist(), boxes["group"].tolist()) == ([1, 0], [1, 0])
    assert len(open_images.open_images(root, split="validation", fewest=1)) == 2
    other = open_images.open_images(root, split="validation", fewest=1)
    assert other.fingerprint != of.fingerprint


def test_open_images_that_is_damaged(tmp_path):
    root = open_images_copy(tmp_path)
    table = root / "validation-annotations-bbox.csv"
    whole = table.read_text()
    table.write_text(whole.replace("00aa,xclick,/m/02", "00aa,xclick,/m/77"))
    with pytest.raises(ValueError, match=r"line 2 of .* has the class '/m/77'"):
        open_images.open_images(root, split="validation")
    table.write_text(whole.replace("0.25,0.75", "0.25,1.75"))
    with pytest.raises(ValueError, match=r"open_images \(validation\): the box .* lies outside"):
        open_images.open_images(root, split="validation")
    table.unlink()
    with pytest.raises(FileNotFoundError, match="as it was published"):
        open_images.open_images(root, split="validation")


def test_maps_lie_beside_their_pictures(tmp_path):
    for i in range(4):
        picture(tmp_path / f"pictures/{i}.jpg", (24, 16), i)
        (tmp_path / "maps").mkdir(exist_ok=True)
        classes = np.full((32, 48), i, np.uint8)  # of twice the picture's size
        classes[:16] = 255
        Image.fromarray(classes).save(tmp_path / f"maps/{i}.png")
    of = maps.folder(tmp_path / "pictures", tmp_path / "maps", void=255)
    assert isinstance(of, records.Source)
    options = dict(batch=4, size=(8, 12), seed=0, fields=("segmentation",))
    batch = pipeline.batches(of, **options)[0]
    assert batch["segmentation"].shape == (4, 8, 12, 1)
    np.testing.assert_array_equal(batch["segmentation"][:, :4], -1)
    assert sorted(batch["segmentation"][:, 4:].mean((1, 2, 3))) == [0, 1, 2, 3]
    assert pipeline.batches(of, batch=4, size=8, seed=0)[0].keys() == {"x", "_bad"}
    # A map of another shape is told, with its picture.
    Image.fromarray(np.zeros((48, 48), np.uint8)).save(tmp_path / "maps/2.png")
    bad = pipeline.batches(maps.folder(tmp_path / "pictures", tmp_path / "maps"), **options)[0]
    assert (bad["_bad"] == 2).sum() == 1
    (tmp_path / "maps/1.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of the 4 pictures .* have no map, .*1\.png"):
        maps.folder(tmp_path / "pictures", tmp_path / "maps")
