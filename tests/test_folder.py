import csv
import json
import pickle
import shutil

import numpy as np
import pytest
from PIL import Image

from ldm_jax.data import folder


def pictures(root, names, size=(6, 4)):
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i % 256, 0, 0)).save(path)
    return root


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_captions_of_metadata_jsonl_in_any_order(tmp_path):
    pictures(tmp_path, ["b.png", "sub/a.jpg"])
    lines(
        tmp_path / "metadata.jsonl",
        [
            {"file_name": "sub/a.jpg", "text": "an ä", "mood": [1.0, 2.0]},
            {"file_name": "b.png", "text": "a b", "mood": [3.0, 4.0]},
        ],
    )
    source = folder.folder(tmp_path)
    assert len(source) == 2
    assert list(source.captions()) == ["a b", "an ä"]
    assert source.fields == ("image", "mood", "caption")
    assert source[1]["mood"] == [1.0, 2.0]
    assert source[1]["image"] == (tmp_path / "sub/a.jpg").read_bytes()
    assert source.name_of(1) == str(tmp_path / "sub/a.jpg")
    assert source.classes is None


def test_captions_of_metadata_csv_and_their_column(tmp_path):
    pictures(tmp_path, ["a.png", "b.png"])
    with (tmp_path / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows(
            [["file_name", "title", "label"], ["a.png", "one, two", "3"], ["b.png", "three", "4"]]
        )
    source = folder.folder(tmp_path, caption_column="title")
    assert [source[i]["caption"] for i in range(2)] == ["one, two", "three"]
    assert [source[i]["label"] for i in range(2)] == ["3", "4"]
    with pytest.raises(ValueError, match=r"no column 'text'.*\['label', 'title'\]"):
        folder.folder(tmp_path)


def test_captions_beside_the_pictures(tmp_path):
    pictures(tmp_path, ["a.png", "b.v2.PNG"])
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.v2.txt").write_text("zweiter, groß", encoding="utf-8")
    assert list(folder.folder(tmp_path).captions()) == ["first", "zweiter, groß"]


def test_class_folders_are_labels_in_alphabetical_order(tmp_path):
    pictures(tmp_path, ["dog/a.png", "cat/x/b.png", "cat/c.png", ".hidden/d.png", "cat/._c.png"])
    source = folder.folder(tmp_path)
    assert source.classes == ("cat", "dog")
    assert [source[i]["label"] for i in range(3)] == [0, 0, 1]
    assert list(source.captions()) == []


def test_pictures_alone(tmp_path):
    source = folder.folder(pictures(tmp_path, ["a.png", "b.webp"]))
    assert source.fields == ("image",)
    assert len(source) == 2


def test_two_conventions_need_a_choice(tmp_path):
    pictures(tmp_path, ["cat/a.png"])
    (tmp_path / "cat/a.txt").write_text("a cat")
    with pytest.raises(ValueError, match=r"txt and classes.*convention='txt'"):
        folder.folder(tmp_path)
    assert list(folder.folder(tmp_path, convention="txt").captions()) == ["a cat"]
    assert folder.folder(tmp_path, convention="classes").classes == ("cat",)
    assert folder.folder(tmp_path, convention="none").fields == ("image",)
    lines(tmp_path / "metadata.jsonl", [{"file_name": "cat/a.png", "text": "x"}])
    (tmp_path / "metadata.csv").write_text("file_name,text\ncat/a.png,y\n")
    with pytest.raises(ValueError, match=r"metadata.jsonl and metadata.csv and txt"):
        folder.folder(tmp_path)
    assert list(folder.folder(tmp_path, convention="metadata.csv").captions()) == ["y"]
    with pytest.raises(ValueError, match="unknown convention 'json'"):
        folder.folder(tmp_path, convention="json")


def test_missing_empty_and_unreadable_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"):
        folder.folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no picture"):
        folder.folder(tmp_path)
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"none of the 2 pictures.*'a.png' cannot be decoded"):
        folder.folder(tmp_path)
    pictures(tmp_path, ["c.png"])
    assert len(folder.folder(tmp_path)) == 3


def test_captions_must_match_the_pictures(tmp_path):
    pictures(tmp_path, ["a.png", "b.png", "c.png"])
    lines(
        tmp_path / "metadata.jsonl",
        [{"file_name": "a.png", "text": "x"}, {"file_name": "z.png", "text": "y"}],
    )
    with pytest.raises(
        ValueError, match=r"2 without a caption, the first is 'b.png'; 1 without a picture.*'z.png'"
    ):
        folder.folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(ValueError, match=r"2 without a caption.*1 without a picture.*'d.txt'"):
        folder.folder(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"file_name": "a.png", "text": "x"', "line 1 .* is not JSON"),
        ("[1]", "line 1 .* is not an object"),
        ('{"text": "x"}', "line 1 .* names no picture"),
        ('{"file_name": "a.png", "text": null}', "caption of 'a.png' .* is None"),
        ('{"file_name": "a.png", "text": "x"}\n' * 2, "line 2 .* a second time"),
        ('{"file_name": "../a.png", "text": "x"}', r"1 without a picture, the first is '../a.png'"),
    ],
)
def test_broken_metadata_is_named_by_its_line(tmp_path, row, message):
    pictures(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text(row)
    with pytest.raises(ValueError, match=message):
        folder.folder(tmp_path)


def test_rows_have_the_same_columns(tmp_path):
    pictures(tmp_path, ["a.png", "b.png"])
    rows = [{"file_name": "a.png", "text": "x", "k": 1}, {"file_name": "b.png", "text": "x"}]
    lines(tmp_path / "metadata.jsonl", rows)
    with pytest.raises(ValueError, match=r"\['k'\] are missing in some rows"):
        folder.folder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one, two\n")
    with pytest.raises(ValueError, match=r"row 2 .* another number of cells"):
        folder.folder(tmp_path)


def test_class_folders_must_hold_all_pictures_and_not_be_splits(tmp_path):
    pictures(tmp_path, ["train/a.png", "validation/b.png"])
    with pytest.raises(ValueError, match="splits, not classes"):
        folder.folder(tmp_path)
    pictures(tmp_path, ["c.png"])
    with pytest.raises(ValueError, match=r"1 of 3 pictures .* outside the class folders.*'c.png'"):
        folder.folder(tmp_path)


def test_the_holdout_is_a_stable_partition(tmp_path):
    pictures(tmp_path, [f"{i:03}.png" for i in range(200)], size=(1, 1))
    parts = {s: folder.folder(tmp_path, split=s, holdout=0.2) for s in ("train", "validation")}
    train, held = (set(parts[s].files) for s in ("train", "validation"))
    assert not train & held
    assert len(train | held) == 200
    assert 15 < len(held) < 70  # 40 expected, deviation 5.7
    pictures(tmp_path, ["new.png"], size=(1, 1))
    again = folder.folder(tmp_path, split="validation", holdout=0.2)
    assert set(again.files) - {"new.png"} == held
    with pytest.raises(ValueError, match=r"validation split .* is empty"):
        folder.folder(tmp_path, split="validation", holdout=1e-9)
    with pytest.raises(ValueError, match="'train', 'validation' or 'all'"):
        folder.folder(tmp_path, split="test")


def test_the_fingerprint_follows_the_content(tmp_path):
    first = pictures(tmp_path / "a", ["1.png", "2.png"])
    (first / "1.txt").write_text("x")
    (first / "2.txt").write_text("y")
    shutil.copytree(first, tmp_path / "b")
    prints = [folder.folder(first).fingerprint, folder.folder(tmp_path / "b").fingerprint]
    assert prints[0] == prints[1]
    (first / "2.txt").write_text("z")
    prints.append(folder.folder(first).fingerprint)
    noise = np.random.default_rng(0).integers(0, 256, (9, 9, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "b" / "1.png")
    prints.append(folder.folder(tmp_path / "b").fingerprint)
    assert len(set(prints)) == 3
    assert all(int(p, 16) >= 0 for p in prints)


def test_a_source_travels_to_worker_processes(tmp_path):
    source = folder.folder(pictures(tmp_path, ["cat/a.png"]))
    again = pickle.loads(pickle.dumps(source))
    assert again == source
    assert again[0] == source[0]
    assert source.only(("image",))[0]["image"] == source[0]["image"]
