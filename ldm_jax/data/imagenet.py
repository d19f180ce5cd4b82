"""ImageNet (ILSVRC 2012) as folders of JPEG files.

    train/n01440764/n01440764_10026.JPEG      a folder a synset
    val/n01440764/...                         the same, or
    val/ILSVRC2012_val_00000001.JPEG          pictures alone, with LOC_val_solution.csv (as Kaggle has it)
    LOC_synset_mapping.txt                    n01440764 tench, Tinca tinca; synset_words.txt will do, too

`train` and `val` may lie below ILSVRC/Data/CLS-LOC.
"""

import csv
import os
from pathlib import Path

from ldm_jax.data.folder import SUFFIXES, Folder
from ldm_jax.data.tables import existing, lines, of_rows

FOLDERS = {"train": "train", "validation": "val"}
KAGGLE = "ILSVRC/Data/CLS-LOC"
NAMES = ("LOC_synset_mapping.txt", "synset_words.txt")
SOLUTION = "LOC_val_solution.csv"


def imagenet(path: str | os.PathLike, *, split: str = "train") -> Folder:
    """Pictures with labels: the numbers of the synsets in alphabetical order, which is that of every published model.

    `classes` are the names, such as "tench, Tinca tinca", or the synsets where no file tells names.

    Raises:
      FileNotFoundError: a folder or a file that is not there.
      ValueError: a split that there is not, synsets without a name, or names that two synsets share.
    """
    if split not in FOLDERS:
        raise ValueError(f"ImageNet has no split {split!r}; choose one of {tuple(FOLDERS)}")
    root = Path(path).expanduser()
    data = root / KAGGLE if (root / KAGGLE).is_dir() else root
    synsets = sorted(entry.name for entry in existing(data / "train").iterdir() if entry.is_dir())
    where = existing(data / FOLDERS[split])
    found = {
        file.relative_to(where).as_posix(): file.parent.name
        for file in where.rglob("*")
        if file.name.lower().endswith(SUFFIXES)
    }
    if any("/" not in name for name in found):
        with existing(root / SOLUTION).open(newline="") as file:
            told = {row["ImageId"]: row["PredictionString"] for row in csv.DictReader(file)}
        found = {name: told.get(Path(name).stem, "nothing").split()[0] for name in found}
    numbers = {synset: number for number, synset in enumerate(synsets)}
    if unknown := [name for name, synset in found.items() if synset not in numbers]:
        raise ValueError(
            f"{len(unknown)} pictures of {str(where)!r} are of synsets without a folder in {str(data / 'train')!r}, "
            f"the first is {min(unknown)!r} of {found[min(unknown)]!r}; complete the folders, or remove them"
        )
    rows = {name: {"label": numbers[synset]} for name, synset in found.items()}
    return of_rows(f"imagenet ({split})", where, rows, named(root, synsets))


def named(root: Path, synsets: list[str]) -> list[str]:
    """The names of synsets, or the synsets themselves where there is no file of names.

    WordNet has two cranes and two maillots: where two synsets share a name, it has the synset behind it.

    Raises:
      ValueError: the file does not name all of them.
    """
    file = next((root / name for name in NAMES if (root / name).is_file()), None)
    if file is None:
        return synsets
    names = dict(line.split(maxsplit=1) for line in lines(file))
    if unknown := [synset for synset in synsets if synset not in names]:
        raise ValueError(
            f"{file} does not name {len(unknown)} synsets, the first is {unknown[0]!r}"
        )
    chosen = [names[synset] for synset in synsets]
    return [
        f"{name} ({synset})" if chosen.count(name) > 1 else name
        for name, synset in zip(chosen, synsets, strict=True)
    ]
