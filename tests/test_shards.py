"""Pictures in tar shards, parquet and Arrow files: found, read by row, damaged, split, the same in every layout."""

import dataclasses
import itertools
import pickle
import shutil
import time
import tracemalloc
from pathlib import Path

import cloudpickle
import hub_server
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3_server import serving
from tables import parquet, photo, shard, table

from sdjax.data import batches, buckets, places, sources, splits
from sdjax.data.batches import Data
from sdjax.data.buckets import Plan
from sdjax.data.sources import pictures
from sdjax.data.sources.arrow import ArrowFiles
from sdjax.data.sources.parquet import Parquet
from sdjax.data.sources.tar import TarShards
from sdjax.formats import pipeline

COUNT = 7
WORDS = [f"picture number {i}" for i in range(COUNT)]
PHOTOS = [photo(i, (40 + 8 * (i % 3), 48)) for i in range(COUNT)]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Indexes go to a folder of the test."""
    monkeypatch.setenv("SDJAX_DATA", str(tmp_path / "home"))
    return tmp_path / "home"


def folder(tmp_path):
    place = tmp_path / "folder"
    place.mkdir()
    for i, data in enumerate(PHOTOS):
        (place / f"{i}.png").write_bytes(data)
        (place / f"{i}.txt").write_text(WORDS[i])
    return place


def shards(tmp_path):
    place = tmp_path / "shards"
    place.mkdir()
    made = [{f"./{i}.png": PHOTOS[i], f"./{i}.txt": WORDS[i].encode()} for i in range(COUNT)]
    shard(place / "a-0.tar", made[:4])
    shard(place / "a-1.tar", made[4:])
    return place


def files(tmp_path):
    place = tmp_path / "files"
    parquet(place / "data" / "train-00000-of-00002.parquet", PHOTOS[:4], text=WORDS[:4])
    parquet(place / "data" / "train-00001-of-00002.parquet", PHOTOS[4:], text=WORDS[4:])
    return place


def saved(tmp_path):
    """A folder as Dataset.save_to_disk writes it: Arrow streams and their names."""
    place = tmp_path / "saved"
    place.mkdir()
    for k, part in enumerate((slice(0, 4), slice(4, COUNT))):
        whole = table(PHOTOS[part], text=WORDS[part])
        with pa.OSFile(str(place / f"data-0000{k}-of-00002.arrow"), "wb") as file:
            with pa.ipc.new_stream(file, whole.schema) as writer:
                writer.write_table(whole, max_chunksize=3)
    names = '[{"filename": "data-00000-of-00002.arrow"}, {"filename": "data-00001-of-00002.arrow"}]'
    (place / "state.json").write_text('{"_data_files": ' + names + ', "_split": null}')
    return place


LAYOUTS = {"folder": folder, "tar": shards, "parquet": files, "arrow": saved}


def opened(path, **changes):
    return sources.open(Data(path=str(path), size=32, **changes))


@pytest.mark.parametrize(("layout", "direct"), [("tar", 1), ("parquet", 1), ("parquet", 0), ("arrow", 1)])
def test_the_same_pictures_give_the_same_batches_in_every_layout(tmp_path, monkeypatch, layout, direct):
    monkeypatch.setattr("sdjax.data.sources.parquet.DIRECT", (1 << 20) * direct)
    sd = pipeline.load("random:tiny")
    how = dict(size=32, batch=3, crop="random", flip=0.5, encode=False, buckets=2)
    one, other = (batches.build(Data(path=str(LAYOUTS[name](tmp_path)), **how), sd, 5) for name in ("folder", layout))
    assert one.plan.about() == other.plan.about() and len(one.plan.shapes) == 2
    for a, b in itertools.islice(zip(one.iterate(4), other.iterate(4), strict=True), 6):
        assert a["pixels"].shape == b["pixels"].shape
        np.testing.assert_array_equal(a["pixels"], b["pixels"])
        np.testing.assert_array_equal(*(x["ids"]["text_encoder"] for x in (a, b)))
    for stream in (one, other):  # as the processes of data.workers get it
        np.testing.assert_array_equal(pickle.loads(pickle.dumps(stream))[4]["pixels"], stream[4]["pixels"])


def test_sources_are_found_by_their_files(tmp_path):
    kinds = {"tar": TarShards, "parquet": Parquet, "arrow": ArrowFiles}
    for name, make in LAYOUTS.items():
        place = make(tmp_path)
        assert type(sources.matching(str(place))) is kinds.get(name, sources.known()["ImageFolder"])
    assert isinstance(sources.matching(str(tmp_path / "shards" / "a-{0..1}.tar")), TarShards)
    assert isinstance(sources.matching(str(tmp_path / "files" / "data" / "*.parquet")), Parquet)
    (tmp_path / "folder" / "metadata.parquet").write_bytes(b"")  # captions of an image folder
    shutil.copy(tmp_path / "shards" / "a-0.tar", tmp_path / "folder")
    assert type(sources.matching(str(tmp_path / "folder"))).__name__ == "ImageFolder"


def test_columns_are_found_or_named(tmp_path, monkeypatch):
    columns = dict(caption=[["one", " two  lines\n"], [], ["three"]], url=["a", "b", "c"], thumb=[b"", b"", b""])
    path = parquet(tmp_path / "a.parquet", PHOTOS[:3], **columns)
    with pytest.raises(ValueError, match=r"a.parquet, row 2 \(1 of 3 rows\): no caption; fill its cell, set data.word"):
        opened(path)
    examples = opened(path, word="cat")
    said = {examples.caption(0, np.random.default_rng(i)) for i in range(20)}
    assert said == {"one", "two lines"} and examples.caption(1, np.random.default_rng(0)) == "cat"
    other = opened(path, source=Parquet(caption_column="url"))
    assert other.caption(2, np.random.default_rng(0)) == "c"
    assert opened(path, templates="none").caption(1, np.random.default_rng(0)) == ""
    for wanted, message in (
        (dict(image_column="url"), "data.image_column='url': expected one of image, thumb"),
        (dict(caption_column="image"), "data.caption_column='image': expected one of caption, url"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path, source=Parquet(**wanted))
    pq.write_table(pa.table({"a": [b"1"], "b": [b"2"]}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match="data.image_column='': expected the column of pictures in .*: a, b"):
        opened(tmp_path / "b.parquet")
    parquet(tmp_path / "mixed" / "a.parquet", PHOTOS[:1], text=["a"])  # a struct; bytes
    pq.write_table(pa.table({"image": PHOTOS[1:2], "text": ["b"]}), tmp_path / "mixed" / "b.parquet")
    for kept in (1 << 20, 0):
        monkeypatch.setattr("sdjax.data.sources.parquet.DIRECT", kept)
        assert opened(tmp_path / "mixed").picture(1, 32).shape == (32, 32, 3)
    parquet(tmp_path / "both" / "a.parquet", PHOTOS[:1], text=["a"])
    parquet(tmp_path / "both" / "b.parquet", PHOTOS[:1], words=["b"])
    with pytest.raises(ValueError, match="b.parquet: no column 'text' as in the first file"):
        opened(tmp_path / "both")


def test_a_cell_without_a_usable_picture_is_named(tmp_path):
    pictures = [PHOTOS[0], b"no picture", None, PHOTOS[1]]
    examples = opened(parquet(tmp_path / "a.parquet", pictures, text=list("abcd")))
    for row, message in ((1, "a.parquet, row 2: not an image"), (2, "a.parquet, row 3: no picture")):
        with pytest.raises(ValueError, match=message) as error:
            examples.picture(row, 32)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="row 2: not an image"):
        examples.check(32)
    with pytest.raises(ValueError, match="row 2: not an image"):
        examples.shapes()


def test_splits_are_never_mixed(tmp_path):
    for name, i in (("train", 0), ("validation", 1), ("test", 2)):
        parquet(tmp_path / "hub" / "data" / f"{name}-00000-of-00001.parquet", [PHOTOS[i]], text=[WORDS[i]])
        (tmp_path / "web").mkdir(exist_ok=True)
        shard(tmp_path / "web" / f"{name}-000.tar", [{"a.png": PHOTOS[i], "a.txt": WORDS[i].encode()}])
    for place in ("hub", "web"):
        path = str(tmp_path / place)
        for suffix, i in (("", 0), ("#validation", 1), ("#val", 1), ("#test", 2)):
            examples = opened(path + suffix)
            assert len(examples) == 1 and examples.caption(0, np.random.default_rng(0)) == WORDS[i]
        with pytest.raises(ValueError, match="expected a split after '#': test, train, validation"):
            opened(path + "#dev2")
        held = batches.measured(Data(path=path + "#train", validation="#test"))
        assert held.path == path + "#test" and len(sources.open(held)) == 1
    names = {"data/train-00000-of-00002.parquet": "train", "default/validation/0000.parquet": "validation",
             "my_val_01.tar": "validation", "latest.tar": "train", "pets-00000-of-00001.parquet": "pets",
             "Testing/0.tar": "test"}  # fmt: skip
    assert {name: splits.of(name) for name in names} == names


def test_masks_and_conditions_come_with_their_rows(tmp_path):
    mask = np.zeros((40, 48), np.uint8)
    mask[:, :24] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    half = (tmp_path / "m.png").read_bytes()
    (tmp_path / "t").mkdir()
    shard(tmp_path / "t" / "a.tar", [
        {"a.png": PHOTOS[0], "a.txt": b"a", "a.mask.png": half, "a.condition.png": PHOTOS[3]}
    ])  # fmt: skip
    parquet(tmp_path / "p" / "a.parquet", [PHOTOS[0]], text=["a"], mask=[half], conditioning_image=[PHOTOS[3]])
    found = [
        opened(tmp_path / place, mask=True, condition="files").example(0, 32, np.random.default_rng(0))
        for place in ("t", "p")
    ]
    for name in ("picture", "mask", "condition"):
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert found[0]["mask"][:, :12].min() == 1 and found[0]["mask"][:, -8:].max() == 0
    for changes in (dict(mask=True), dict(condition="files")):
        (name,) = changes
        with pytest.raises(ValueError, match=f"data.{name}=.* has none; expected rows that hold a {name}"):
            opened(parquet(tmp_path / "bare.parquet", [PHOTOS[0]], text=["a"]), **changes)


def test_a_shard_that_changed_is_indexed_again(tmp_path, home):
    path = shard(tmp_path / "a.tar", [{"a.png": PHOTOS[0], "a.json": b'{"caption": "one", "url": "x"}'}])
    assert opened(path).caption(0, np.random.default_rng(0)) == "one"
    made = sorted(home.iterdir())
    opened(path)
    assert sorted(home.iterdir()) == made  # nothing new
    shard(path, [{"b.png": PHOTOS[1], "b.caption": b"two"}])
    examples = opened(path)
    assert examples.caption(0, np.random.default_rng(0)) == "two" and len(list(home.iterdir())) == 2
    data = bytearray(path.read_bytes())
    data[600] ^= 1  # while a run reads it
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"a.tar, row 1 \(b.png\): not the bytes that were indexed"):
        examples.picture(0, 32)


def test_a_damaged_index_is_made_again(tmp_path, home):
    opened(shard(tmp_path / "a.tar", [{"a.png": PHOTOS[0], "a.txt": b"one"}]))
    (index,) = home.iterdir()
    whole = index.read_bytes()
    for damaged in (whole[:-5], whole[:40], b"", whole[:200] + bytes([whole[200] ^ 1]) + whole[201:]):
        index.write_bytes(damaged)
        assert opened(tmp_path / "a.tar").caption(0, np.random.default_rng(0)) == "one"
        assert index.read_bytes() == whole


def test_a_damaged_unpacked_picture_is_named(tmp_path, home, monkeypatch):
    monkeypatch.setattr("sdjax.data.sources.parquet.DIRECT", 0)
    path = parquet(tmp_path / "a.parquet", PHOTOS[:2], text=["a", "b"])
    first = opened(path).picture(1, 32)
    (unpacked,) = [file for file in home.iterdir() if PHOTOS[1] in file.read_bytes()]
    data = bytearray(unpacked.read_bytes())
    data[data.index(PHOTOS[1]) + 60] ^= 1
    unpacked.write_bytes(data)
    with pytest.raises(ValueError, match="a.parquet, row 2: its unpacked copy in .* is damaged; remove that folder"):
        opened(path).picture(1, 32)
    shutil.rmtree(home)
    np.testing.assert_array_equal(opened(path).picture(1, 32), first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:1700], "cut short"),
        (lambda data: data[: data.index(b"1.png")], "not a whole, plain .tar|damaged, cut short"),
        (lambda data: data.replace(b"ustar", b"xstar", 2), "damaged|not a whole"),
        (lambda data: data + data, "followed by another archive"),
        (lambda data: b"\x1f\x8b" + data, "not a whole, plain .tar"),
        (lambda data: b"", "not a whole, plain .tar"),
    ],
)
def test_damaged_shards_are_one_line(tmp_path, change, message):
    made = [{f"{i}.png": PHOTOS[i], f"{i}.txt": WORDS[i].encode()} for i in range(2)]
    path = shard(tmp_path / "a.tar", made)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        opened(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"no picture"}, "a.tar, a.png: not an image"),
        ({"a.png": PHOTOS[0], "a.jpg": PHOTOS[1]}, "a.jpg: a second picture of its example"),
        ({"a.png": PHOTOS[0], "a.txt": b"\xff\xfe\xff"}, "a.txt: not UTF-8 text"),
        ({"a.png": PHOTOS[0], "a.json": b"{"}, "a.json: not UTF-8 text of JSON"),
        ({"a.png": PHOTOS[0], "a.txt": b"x" * 70000}, "a.txt: longer than 65536 bytes"),
        ({"a.txt": b"x"}, "a.tar: no pictures"),
    ],
)
def test_strange_members_are_named(tmp_path, members, message):
    with pytest.raises(ValueError, match=message):
        opened(shard(tmp_path / "a.tar", [members]))


def test_damaged_tables_are_one_line(tmp_path):
    path = parquet(tmp_path / "a.parquet", PHOTOS[:2], text=["a", "b"])
    saved(tmp_path)
    arrow = tmp_path / "saved" / "data-00000-of-00002.arrow"
    for file in (path, arrow):
        data = file.read_bytes()
        for damaged in (data[: len(data) // 2], b"PAR1", b"no table at all"):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match="damaged|cannot be read|no rows") as error:
                opened(file)
            assert str(file) in str(error.value) and "\n" not in str(error.value)


def test_what_is_not_there_is_said(tmp_path):
    (tmp_path / "a-0.tar").write_bytes(b"")
    for path, message in (
        (tmp_path / "none.parquet", "no such file or folder"),
        (tmp_path / "a-{0..2}.tar", "a-1.tar: no such file"),
        ("memory://nothing", "data.path='memory://nothing': expected"),
        ("nonsense://bucket/a.tar", "nonsense://: no such protocol"),
    ):
        with pytest.raises(ValueError, match=message):
            opened(path)
    with pytest.raises(ValueError, match="data.words="):
        opened(shards(tmp_path), words=(("a", "b"),))


def test_latents_of_a_folder_serve_its_shards(tmp_path):
    """The key of kept moments is what a picture's bytes are, wherever they lie."""
    sd = pipeline.load("random:tiny")
    how = dict(size=32, batch=3, cache=str(tmp_path / "cache"))
    one = batches.build(Data(path=str(folder(tmp_path)), **how), sd, 5)
    kept = (tmp_path / "cache" / "moments.records").stat().st_size
    other = batches.build(Data(path=str(shards(tmp_path)), **how), sd, 5)
    assert (tmp_path / "cache" / "moments.records").stat().st_size == kept
    np.testing.assert_array_equal(one[3]["moments"], other[3]["moments"])
    sent = cloudpickle.loads(cloudpickle.dumps(other))
    np.testing.assert_array_equal(sent[3]["moments"], other[3]["moments"])


def test_held_out_rows_do_not_train(tmp_path):
    sd, data = pipeline.load("random:tiny"), Data(path=str(shards(tmp_path)), size=32, batch=2, validation=0.3)
    train, held = batches.build(data, sd, 3), batches.held_out(data, sd, 3)
    assert held is not None and (len(train.source), len(held.source)) == (5, 2)
    said = [
        {part.source.caption(i, np.random.default_rng(0)) for i in range(len(part.source))} for part in (train, held)
    ]
    assert said[0] | said[1] == set(WORDS) and not said[0] & said[1]


def test_a_web_server_lists_whole_addresses_without_sizes(monkeypatch):
    """What fsspec gives of http: names with the protocol; sizes only of a file that is asked for."""
    found = {"http://here/photos/a.tar": b"shard"}

    class Web:
        def find(self, url, detail):
            assert url == "http://here/photos"
            return {name: {"name": name, "size": None} for name in found}

        def info(self, name):
            return {"name": name, "size": len(found[name]), "ETag": "1"}

        def cat_file(self, url, start, end):
            return found[url][start:end]

    monkeypatch.setattr(places, "_spec", lambda protocol: Web())
    (file,) = places.listed("http://here/photos", (".tar",))
    assert (file.path, file.size, file.stamp) == ("http://here/photos/a.tar", 5, "1") and file.read(1, 3) == b"har"
    places._reader.cache_clear()


def test_files_in_memory_are_a_bucket(tmp_path):
    import fsspec

    system = fsspec.filesystem("memory")
    for place in (shards(tmp_path), files(tmp_path)):
        for file in place.rglob("*.*"):
            system.pipe(f"/{place.name}/{file.relative_to(place)}", file.read_bytes())
    data = dataclasses.replace(Data(size=32, batch=3, encode=False), path="memory://shards")
    sd = pipeline.load("random:tiny")
    wanted = batches.build(dataclasses.replace(data, path=str(tmp_path / "shards")), sd, 5)[4]["pixels"]
    for path in ("memory://shards", "memory://shards/a-*.tar", "memory://shards/a-{0..1}.tar", "memory://files#train"):
        found = batches.build(dataclasses.replace(data, path=path), sd, 5)
        assert found.source.remote
        np.testing.assert_array_equal(found[4]["pixels"], wanted)
    assert len(places.listed("memory://shards/a-0.tar", (".tar",))) == 1


def test_a_bucket_is_read_by_range(tmp_path, monkeypatch):
    """Arrow's own S3 client: listing in pages, one request per picture once the index is made."""
    monkeypatch.setattr(pictures, "KEPT", 0)
    local = {place.name: place for place in (shards(tmp_path), files(tmp_path))}
    objects = {
        f"{place.name}/{file.relative_to(place)}": file.read_bytes()
        for place in local.values()
        for file in place.rglob("*.*")
    }
    sd = pipeline.load("random:tiny")
    data = Data(size=32, batch=2, encode=False)
    wanted = batches.build(dataclasses.replace(data, path=str(local["shards"])), sd, 5)
    for name, value in {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "here"}.items():
        monkeypatch.setenv(name, value)
    with serving(objects | {f"shards/note-{i}.md": b"" for i in range(5)}) as (endpoint, asked):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        for path in ("s3://bucket/shards", "s3://bucket/shards/a-{0..1}.tar", "s3://bucket/files"):
            found = batches.build(dataclasses.replace(data, path=path), sd, 5)
            np.testing.assert_array_equal(found[4]["pixels"], wanted[4]["pixels"])
            asked.clear()
            np.testing.assert_array_equal(found[7]["pixels"], wanted[7]["pixels"])
            if "shards" in path:
                assert [method for method, *_ in asked] == ["GET", "GET"] and all(part for *_, part in asked)
        with pytest.raises(ValueError, match=r"s3://bucket/none.tar: no such file|expected .tar files"):
            opened("s3://bucket/none.tar")
    places._reader.cache_clear()


def test_a_million_rows_open_in_seconds_and_in_flat_memory(tmp_path):
    """What is kept for each row is a few numbers in arrays: no Python object, no text, no picture."""
    count, word = 1_000_000, pa.array([f"a caption, number {i}" for i in range(1000)])
    data = Data(path=str(tmp_path / "a.parquet"), size=32, batch=8, encode=False, validation=0.1, templates="captions")
    schema = pa.schema([("image", pa.binary()), ("text", pa.string())])
    pictures = pa.array([PHOTOS[0], PHOTOS[1]] * 500, pa.binary())
    with pq.ParquetWriter(data.path, schema, compression="zstd") as file:
        for _ in range(count // 100_000):
            rows_of = [pa.chunked_array([column] * 100) for column in (pictures, word)]
            file.write_table(pa.table(rows_of, schema=schema), row_group_size=100)
    sd = pipeline.load("random:tiny")
    sources.open(data)  # makes the index
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    start = time.process_time()
    examples = sources.open(data)
    opened_in, (opened_with, _) = time.process_time() - start, tracemalloc.get_traced_memory()
    train, held = batches.build(data, sd, 0, examples), batches.held_out(data, sd, 0)
    batch = train[123_456]
    built_with, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held is not None and (len(train.source), len(held.source)) == (900_000, 100_000)
    assert batch["pixels"].shape == (8, 32, 32, 3)
    assert opened_in < 5 and time.process_time() - start < 30
    assert opened_with < 4 << 20  # 4 bytes a row: footers of ten thousand row groups, not of a million rows
    assert built_with < 40 << 20 and peak < 120 << 20
    assert pa.total_allocated_bytes() - before < 16 << 20


def test_a_million_sizes_are_divided_in_seconds():
    sizes = np.random.default_rng(0).integers(300, 3000, (1_000_000, 2))
    start = time.process_time()
    tracemalloc.start()
    shapes, which = buckets.assign(sizes, 512, 64, 5)
    plan = Plan({shape: np.flatnonzero(which == k) for k, shape in enumerate(shapes)}, 8, 0)
    assert plan.picture(400_000, 3)[0] in shapes and len(plan.shapes) == 5
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert time.process_time() - start < 20 and peak < 400 << 20


@pytest.mark.parametrize("layout", ["arrow", "parquet", "tar"])
def test_files_of_other_tools_are_read(layout):
    """tests/data/datasets: written by datasets 5.2.0 (save_to_disk, to_parquet) and webdataset 1.0.2 (TarWriter)."""
    place = Path(__file__).parent / "data" / "datasets" / layout
    train, test = opened(place), opened(f"{place}#test")
    assert (len(train), len(test)) == (3, 1)
    for i, (examples, row) in enumerate([(train, 0), (train, 1), (train, 2), (test, 0)]):
        assert examples.caption(row, np.random.default_rng(0)) == f"picture number {i}"
        assert examples.shape(row) == (16, 16 + i) and (examples.picture(row, 16) == 40 * i).all()


def test_a_data_set_on_the_hub_is_read_by_range(tmp_path, monkeypatch):
    import huggingface_hub

    place = files(tmp_path)
    wanted = opened(place).picture(5, 32)
    with hub_server.serving({"datasets/someone/photos": hub_server.files_of(place)}, tmp_path) as (env, asked):
        system = huggingface_hub.HfFileSystem(endpoint=env["HF_ENDPOINT"], skip_instance_cache=True)
        monkeypatch.setattr(places, "_spec", lambda protocol: system)
        examples = opened("hf://datasets/someone/photos")
        assert len(examples) == COUNT and examples.remote
        np.testing.assert_array_equal(examples.picture(5, 32), wanted)
        assert any("/resolve/main/data/train-00001-of-00002.parquet" in path for path in asked)
    places._reader.cache_clear()
