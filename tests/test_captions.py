"""Captions: beside pictures, in metadata.jsonl of any folder, by folders' names; and what else a folder holds."""

import collections
import csv
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.folder import Folder
from sdjax.formats import pipeline
from sdjax.images import captions, reading

GREY = Image.fromarray(np.full((32, 32, 3), 90, np.uint8))


def make(root, *names):
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        GREY.point(lambda x, i=i: x + i).save(root / name)


def metadata(folder, **rows):
    lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows.items()]
    (folder / "metadata.jsonl").write_text("\n".join(lines))


def found(path):
    return {item.path.name: item.caption for item in reading.find(path)}


def folder(path, **changes):
    return Folder(Data(path=str(path), **changes))


def test_metadata_of_sub_folders_names_pictures_from_there_and_the_nearest_counts(tmp_path):
    make(tmp_path, "a.png", "train/1.png", "train/2.png", "train/3.png", "train/deep/4.png", "train/deep/5.png")
    metadata(tmp_path, **{"./a.png": "root a", "train/1.png": "root 1", "train/3.png": "root 3"})
    metadata(tmp_path / "train", **{"1.png": "near 1", "./2.png": "near 2", "deep/4.png": "near 4"})
    metadata(tmp_path / "train" / "deep", **{"4.png": "nearest 4", "../deep/5.png": "nearest 5"})
    said = {"a.png": "root a", "1.png": "near 1", "2.png": "near 2", "3.png": "root 3", "4.png": "nearest 4"}
    with pytest.raises(
        ValueError, match=r"deep/metadata\.jsonl: 1 entries without a picture, such as '../deep/5\.png'"
    ):
        reading.find(tmp_path)  # a file names nothing outside its own folder
    metadata(tmp_path / "train" / "deep", **{"4.png": "nearest 4", "x/../5.png": "nearest 5"})
    assert found(tmp_path) == said | {"5.png": "nearest 5"}
    (tmp_path / "train" / "1.txt").write_text("its own")
    assert found(tmp_path)["1.png"] == "its own"
    assert found(tmp_path / "train" / "2.png") == {"2.png": "near 2"}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_metadata_in_columns(kind, tmp_path):
    make(tmp_path, "a.png", "train/b.png")
    rows = {"file_name": ["./a.png", "train/b.png"], "text": ['a "red"  cat, on grass', "a dög"], "more": ["1", "2"]}
    path = tmp_path / f"metadata.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([list(rows), *zip(*rows.values(), strict=True)])
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.table(rows), path)
    assert found(tmp_path) == {"a.png": 'a "red" cat, on grass', "b.png": "a dög"}
    metadata(tmp_path, **{"a.png": "x"})
    with pytest.raises(ValueError, match=r"metadata\..* lies beside it; expected one of them"):
        reading.find(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    path.write_bytes(b"file_name,words\na.png,x\n")
    with pytest.raises(ValueError, match=rf"metadata\.{kind}(, line 2: expected|: cannot be read)"):
        reading.find(tmp_path)


def test_a_word_does_not_take_the_place_of_captions_in_sub_folders(tmp_path):
    make(tmp_path, "train/1.png")
    metadata(tmp_path / "train", **{"1.png": "a dog on a sofa"})
    assert folder(tmp_path, word="sks").caption(0, np.random.default_rng(0)) == "a dog on a sofa"


@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt", ".caption", ".CAPTION"])
def test_caption_files_end_so_in_letters_of_any_case(tmp_path, ending):
    make(tmp_path, "IMG.1.png", "b.png")
    (tmp_path / f"IMG.1{ending}").write_text("a dog")
    assert found(tmp_path) == {"IMG.1.png": "a dog", "b.png": ""}
    assert found(tmp_path / "IMG.1.png") == {"IMG.1.png": "a dog"}
    (tmp_path / "IMG.1.txt").write_text("first")
    assert found(tmp_path)["IMG.1.png"] == "first"


def test_masks_end_so_in_letters_of_any_case(tmp_path):
    make(tmp_path, "a.png")
    GREY.save(tmp_path / "a.mask.PNG")
    assert [item.mask and item.mask.name for item in reading.find(tmp_path)] == ["a.mask.PNG"]


def test_kohyas_folders_say_how_often_and_what(tmp_path):
    make(tmp_path, "10_sks  dog/1.png", "10_sks  dog/2.png", "3_style_x/near/3.png", "plain/4.png", "5.png", "2_/6.png")
    (tmp_path / "10_sks  dog" / "2.caption").write_text("a dog asleep")
    items = {item.path.name: (item.times, item.caption, item.subject) for item in reading.find(tmp_path)}
    assert items == {
        "1.png": (10, "sks dog", "10_sks  dog"),
        "2.png": (10, "a dog asleep", "10_sks  dog"),
        "3.png": (3, "style_x", "3_style_x/near"),
        "4.png": (1, "", "plain"),
        "5.png": (1, "", ""),
        "6.png": (2, "", "2_"),
    }
    assert captions.of_folder(Path("20240131_holiday")) == (1, "")
    make(tmp_path, "0_off/7.png")
    with pytest.raises(ValueError, match="folder '0_off': 0 times an epoch; expected 1_ or more"):
        reading.find(tmp_path)


def test_an_epoch_shows_each_picture_as_often_as_its_folder_says_and_goes_on_in_the_same_order(tmp_path):
    make(tmp_path, "3_sks dog/1.png", "3_sks dog/2.png", "1_dog/3.png", "4.png")
    (tmp_path / "4.txt").write_text("a house")
    data = batches.build(Data(path=str(tmp_path), size=32, batch=4, encode=False), pipeline.load("random:tiny"), 0)
    assert len(data.source) == 4 and sorted(data.source.epoch()) == [0, 1, 1, 1, 2, 2, 2, 3]
    stream = data.iterate(0, threads=0)
    steps = [next(stream) for _ in range(4)]  # two epochs
    tones = np.concatenate([np.round((step["pixels"][:, 0, 0, 0] + 1) * 127.5 - 90) for step in steps])
    for epoch in (tones[:8], tones[8:]):
        assert collections.Counter(epoch.astype(int).tolist()) == {0: 3, 1: 3, 2: 1, 3: 1}
    again = next(data.iterate(2, threads=0))
    jax.tree.map(np.testing.assert_array_equal, again, steps[2])


def test_repeats_leave_subjects_the_fingerprint_and_one_picture_as_they_are(tmp_path):
    make(tmp_path / "plain", "dog/1.png", "dog/2.png")
    make(tmp_path / "often", "10_dog/1.png", "10_dog/2.png")
    plain, often = (folder(tmp_path / name, word="dog") for name in ("plain", "often"))
    assert plain.fingerprint() == often.fingerprint()
    assert {int(often.other(0, np.random.default_rng(seed))) for seed in range(20)} == {1}
    make(tmp_path / "one", "10_dog/1.png")
    data = Data(path=str(tmp_path / "one"), size=32, batch=2)
    one = batches.build(data, pipeline.load("random:tiny"), 0)
    assert one.single is not None and one[7]["moments"].shape[0] == 2


def test_without_repeats_the_order_is_that_of_the_pictures(tmp_path):
    make(tmp_path, *(f"{i}.png" for i in range(5)))
    assert list(folder(tmp_path, word="dog").epoch()) == [0, 1, 2, 3, 4]


def test_pictures_that_are_passed_over_are_counted(tmp_path):
    make(tmp_path, "1_dog/a.png", "b.png")
    for name in ("c.HEIC", "x/d.heic", "e.gif", ".hidden/f.heic", ".g.heic", "notes.md", "b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert reading.passed_over(tmp_path) == {".gif": 1, ".heic": 2}
    assert folder(tmp_path, word="dog").about() == "2 pictures, 2 captions; passed over: 1 .gif, 2 .heic"
    make(tmp_path, "3_dog/h.png")
    assert folder(tmp_path, word="dog").about() == "3 pictures, 5 an epoch, 3 captions; passed over: 1 .gif, 2 .heic"
    assert folder(tmp_path / "b.png", word="dog").about() == "1 picture, 1 caption"
    with pytest.raises(ValueError, match=r"x': no images \(1 \.heic passed over\); expected \.jpg \.png \.webp"):
        reading.find(tmp_path / "x")
