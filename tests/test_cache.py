"""Pictures, moments and prompts that are kept: found by content, made anew where damaged, with the same losses."""

import dataclasses
import functools
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from programs import photo
from tiny import pictures

from sdjax import trees
from sdjax.data import batches, cache, sources, stream
from sdjax.data.batches import Data
from sdjax.data.sources import drawn
from sdjax.data.sources.drawn import Pocketland
from sdjax.data.store import HEAD, MAGIC, Store, key
from sdjax.formats import pipeline
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.settings import SettingError, load
from sdjax.training import program
from sdjax.training.begin import begin
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

ROOT = Path(__file__).parents[1]
DATA = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=6))


@pytest.fixture
def source():
    return sources.open(DATA)


@functools.cache
def tiny():
    return pipeline.load("random:tiny")


def arrays(number):
    return {"a": np.full((3, 2), number, np.float32), "b": np.arange(number, dtype=np.uint8)}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


@pytest.fixture
def records(tmp_path):
    """A file of records 1 to 3, and where each begins."""
    path, starts = tmp_path / "a.records", {}
    store = Store(path)
    for number in (1, 2, 3):
        starts[number] = path.stat().st_size
        store.put(key(number), arrays(number))
    return path, starts


def test_records_are_found_again_and_come_from_other_processes(records):
    path, _ = records
    one, other = Store(path), Store(path)
    same(one.get(key(2)), arrays(2))
    assert one.get(key(4)) is None and one.damaged == 0 and len(one) == 3
    one.put(key(4), arrays(4))
    other.put(key(5), arrays(5))
    same(other.get(key(4)), arrays(4))
    size = path.stat().st_size
    one.put(key(5), arrays(5))  # there already, as it sees now
    assert path.stat().st_size == size
    assert key("a", 1, [2]) != key("a", 12) and len(key()) == 16


def test_a_record_that_was_changed_or_cut_is_as_if_it_were_not_there(records):
    path, starts = records
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[starts[2] + HEAD.size + 3] ^= 1  # in its arrays: the next one is found
    path.write_bytes(changed)
    store = Store(path)
    assert store.damaged == 1 and [key(n) in store for n in (1, 2, 3)] == [True, False, True]
    store.put(key(2), arrays(2))
    same(Store(path).get(key(2)), arrays(2))
    changed = bytearray(whole)
    changed[starts[2] + 17] ^= 1  # in its length: what follows cannot be found
    path.write_bytes(changed)
    assert [key(n) in Store(path) for n in (1, 2, 3)] == [True, False, False]
    for size in (starts[3] + 40, starts[3] + 5):  # of a process that was killed while it wrote
        path.write_bytes(whole[:size])
        store = Store(path)
        assert len(store) == 2 and path.stat().st_size == starts[3]
        store.put(key(3), arrays(3))
        assert path.read_bytes() == whole
    path.write_bytes(MAGIC[:5])
    assert len(Store(path)) == 0 and path.read_bytes() == MAGIC
    path.write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="a.records: is no file of records; remove it, or choose another data.cache"):
        Store(path)


def test_places_save_looking_through_the_records(records, monkeypatch):
    path, starts = records
    monkeypatch.setattr("sdjax.data.store.MANY", 2)
    Store(path).settle()
    looked, scanned = [], Store._scanned
    monkeypatch.setattr(
        Store, "_scanned", lambda self, view, size: looked.append(self.end) or scanned(self, view, size)
    )
    store, places = Store(path), path.with_suffix(".places")
    assert not looked and len(store) == 3 and len(store.new) == 0 and key(4) not in store
    for number in (1, 2, 3):
        same(store.get(key(number)), arrays(number))
    for number in range(4, 9):
        store.put(key(number), arrays(number))
    assert min(looked) == Store(path).old.end  # only what came after
    store.settle()
    looked.clear()
    again = Store(path)
    assert not looked and all(again.get(key(number)) is not None for number in range(1, 9))
    whole, data = path.read_bytes(), bytearray(path.read_bytes())
    data[starts[2] + HEAD.size + 3] ^= 1
    path.write_bytes(data)
    assert Store(path).damaged == 0 and Store(path).get(key(2)) is None
    again.forget()
    assert Store(path).damaged == 1 and len(Store(path)) == 7
    path.write_bytes(whole)
    store.new = {name: store.old.get(name) for name in map(key, range(1, 9))}
    store.settle()
    good = places.read_bytes()
    damaged = bytearray(good)
    damaged[-1] ^= 1
    for content in (bytes(damaged), b"", damaged[:70]):
        places.write_bytes(content)
        assert len(Store(path)) == 8 and looked
    places.write_bytes(good)
    path.write_bytes(whole[: starts[3]])  # another, shorter file under the same name
    assert len(Store(path)) == 2


@pytest.mark.parametrize("settled", [False, True])
def test_a_record_found_damaged_is_written_again(records, monkeypatch, settled):
    path, starts = records
    monkeypatch.setattr("sdjax.data.store.MANY", 2)
    store = Store(path)
    if settled:
        store.settle()
    data = bytearray(path.read_bytes())
    data[starts[2] + HEAD.size + 3] ^= 1
    path.write_bytes(data)
    assert key(2) in store and store.get(key(2)) is None and key(2) not in store
    store.put(key(2), arrays(2))
    for one in (store, Store(path)):
        same(one.get(key(2)), arrays(2))
        same(one.get(key(3)), arrays(3))
    size = path.stat().st_size
    store.put(key(2), arrays(2))  # whole now
    assert path.stat().st_size == size
    for number in (4, 5):
        store.put(key(number), arrays(number))
    store.settle()
    again = Store(path)
    assert len(again) == 5 and len(again.old) == 5
    same(again.get(key(2)), arrays(2))


def test_many_kept_pictures_are_not_asked_for_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MANY", 2)
    monkeypatch.setattr("sdjax.data.store.MANY", 2)
    data = dataclasses.replace(DATA, cache=str(tmp_path))
    first = batches.build(data, tiny(), 0)[1]
    asked, content = [], drawn.Drawn.content
    monkeypatch.setattr(drawn.Drawn, "content", lambda self, i: asked.append(i) or content(self, i))
    again = batches.build(data, tiny(), 0)
    assert not asked
    same(again[1], first)
    records = bytearray((tmp_path / "moments.records").read_bytes())
    records[len(MAGIC) + HEAD.size + 100] ^= 1
    (tmp_path / "moments.records").write_bytes(records)
    damaged = batches.build(data, tiny(), 0)
    with pytest.raises(ValueError, match="moments.records: the moments of picture .* are damaged; run again"):
        for step in range(6):
            damaged[step]
    same(batches.build(data, tiny(), 0)[1], first)  # made anew


def test_a_disk_without_room_is_said_before_it_is_full(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 100))
    with pytest.raises(ValueError, match="MB to write, 0.00 MB free"):
        batches.build(dataclasses.replace(DATA, cache=str(tmp_path)), tiny(), 0)
    assert len(Store(tmp_path / "moments.records")) == 0


def test_only_what_is_new_is_made_and_what_was_killed_goes_on(tmp_path, monkeypatch):
    (tmp_path / "photos").mkdir()
    for i in range(3):
        photo(tmp_path / "photos" / f"{i}.png", i)
    data = Data(path=str(tmp_path / "photos"), size=32, batch=2, word="a", cache=str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PIXELS", 32 * 32)  # one picture at a time
    made, put = [], Store.put

    def counted(self, name, arrays):
        if len(made) == 2 and not broken:
            broken.append(True)
            raise KeyboardInterrupt
        made.append(name)
        put(self, name, arrays)

    broken = []
    monkeypatch.setattr(Store, "put", counted)
    with pytest.raises(KeyboardInterrupt):
        batches.build(data, tiny(), 0)
    batches.build(data, tiny(), 0)
    assert len(made) == len(set(made)) == 3
    photo(tmp_path / "photos" / "aaa.png", 7)  # the others have other numbers now
    shown = batches.build(data, tiny(), 0)
    assert len(made) == 4
    monkeypatch.setattr(Store, "put", put)
    fresh = batches.build(dataclasses.replace(data, cache=str(tmp_path / "other")), tiny(), 0)
    for step in range(2):
        same(shown[step], fresh[step])
    changed = tiny().with_parts(vae=jax.tree.map(lambda x: x * 1.5, tiny().parts["vae"]))
    assert np.abs(batches.build(data, changed, 0)[0]["moments"] - shown[0]["moments"]).max() > 0.01


def test_other_drawing_code_is_another_source(source, monkeypatch, tmp_path):
    before, first = source.fingerprint(), source.content(0)
    (tmp_path / "__init__.py").write_text("other")
    monkeypatch.setattr(drawn.pocketland, "__file__", str(tmp_path / "__init__.py"))
    assert source.fingerprint() != before and source.fingerprint()[:5] == before[:5]
    assert source.content(0) != first


def test_another_view_is_among_the_pictures_whatever_their_number(source):
    """Six pictures are four of one identity and two of the next; seven leave the second with three, five with one."""
    for count in (5, 6, 7, 8):
        some = sources.open(Data(path="pocketland", size=32, source=Pocketland(count=count)))
        for i in range(count):
            found = {some.other(i, np.random.default_rng(seed)) for seed in range(40)}
            group = {j for j in range(i - i % 4, i - i % 4 + 4) if j < count}
            assert found == (group - {i} or {i})


def losses(settings, monkeypatch, few):
    """Returns the losses of three batches, and the last batch."""
    monkeypatch.setattr(cache, "FEW", few)
    trained, frozen, data, _ = begin(settings)
    loss = jax.jit(default_loss(settings.method, settings))
    return [float(loss(frozen, trained, data[step], jax.random.key(step), 0)[0]) for step in range(3)], data[2]


def test_losses_are_the_same_with_and_without_what_is_kept(tmp_path, monkeypatch):
    run = Train(model="random:tiny", method=Full(("unet",), "attn2"), data=dataclasses.replace(DATA, dropout=0.3))
    plain, batch = losses(run, monkeypatch, few=0)
    assert "pixels" in batch and "text" not in batch
    memory, batch = losses(run, monkeypatch, few=6)
    assert "moments" in batch and "text" not in batch
    folder = dataclasses.replace(run, data=dataclasses.replace(run.data, cache=str(tmp_path)))
    first, batch = losses(folder, monkeypatch, few=0)
    assert "moments" in batch and batch["text"]["context"].shape[0] == 2
    again, _ = losses(folder, monkeypatch, few=0)
    np.testing.assert_allclose([memory, first], [plain] * 2, rtol=2e-5)
    assert again == first
    path = tmp_path / "moments.records"
    changed = bytearray(path.read_bytes())
    changed[len(MAGIC) + HEAD.size + 200] ^= 0x55
    path.write_bytes(changed)
    assert losses(folder, monkeypatch, few=0)[0] == first  # made anew


def smooth(folder, count=3):
    """Writes smooth pictures, of 48 x 48 pixels and without symmetry, with captions of two phrases; returns Data."""
    folder.mkdir()
    for i, one in enumerate(pictures(count, 48)):
        Image.fromarray(one).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a face, number {i}, red, blue")
    return Data(path=str(folder), size=32, batch=4, shuffle=True)


def moments_of(batch):
    """Returns the moments of a batch of pixels."""
    return np.asarray(jax.jit(lambda sd, pixels: sd.moments(pixels))(tiny(), batch["pixels"]))


@pytest.mark.parametrize("flip", [0.5, 1.0])
def test_flips_keep_the_moments_of_both_pictures(tmp_path, flip):
    """The same pictures and prompts as without a cache, in the same steps."""
    data = dataclasses.replace(smooth(tmp_path / "photos"), flip=flip)
    plain = batches.build(dataclasses.replace(data, encode=False), tiny(), 0)
    memory = batches.build(data, tiny(), 0)
    files = batches.build(dataclasses.replace(data, cache=str(tmp_path / "cache")), tiny(), 0)
    assert len(Store(tmp_path / "cache" / "moments.records")) == (6 if flip < 1 else 3)
    for step in range(4):
        np.testing.assert_allclose(memory[step]["moments"], moments_of(plain[step]), atol=1e-5)
        same(files[step], memory[step])
        same(memory[step]["ids"], plain[step]["ids"])
    one, mirrored = (memory.source.stored(0, flag)["moments"] for flag in ((False, True) if flip < 1 else (True, True)))
    assert np.abs(mirrored - one[:, ::-1]).max() > 0.01  # so moments cannot be mirrored instead


def test_a_new_mask_encodes_no_picture_again(tmp_path, monkeypatch):
    data = dataclasses.replace(smooth(tmp_path / "photos"), mask=True, flip=0.5, cache=str(tmp_path / "cache"))

    def paint(side):
        mask = np.zeros((48, 48), np.uint8)
        mask[:, :side] = 255
        Image.fromarray(mask).save(tmp_path / "photos" / "0.mask.png")

    def shown():
        made = batches.build(data, tiny(), 0)
        plain = batches.build(dataclasses.replace(data, encode=False, cache=""), tiny(), 0)
        for step in range(2):
            np.testing.assert_array_equal(made[step]["mask"], plain[step]["mask"])
            np.testing.assert_allclose(made[step]["moments"], moments_of(plain[step]), atol=1e-5)
        return np.concatenate([made[step]["mask"] for step in range(2)])

    paint(24)
    before, size = shown(), (tmp_path / "cache" / "moments.records").stat().st_size
    monkeypatch.setattr(Store, "put", None)  # nothing is encoded
    paint(12)
    assert (shown().mean((1, 2, 3)) < before.mean((1, 2, 3))).any()
    assert (tmp_path / "cache" / "moments.records").stat().st_size == size


def test_random_crops_are_encoded_as_they_come(tmp_path):
    data = dataclasses.replace(smooth(tmp_path / "photos"), crop="random")
    assert "pixels" in batches.build(data, tiny(), 0)[0]
    with pytest.raises(SettingError, match="^cache='x': expected '' with crop='random', which cuts every picture anew"):
        dataclasses.replace(data, cache="x")


class Two:
    """Two processes of a run, as threads."""

    def __init__(self, monkeypatch):
        self.barrier, self.own, self.flags = threading.Barrier(2, timeout=120), threading.local(), [True, True]
        for name in ("several", "place", "together", "every"):
            monkeypatch.setattr(cache.processes, name, getattr(self, name))

    def several(self):
        return True

    def place(self):
        return self.own.place, 2

    def together(self, act):
        result = act()
        self.barrier.wait()
        return result

    def every(self, flag):
        self.flags[self.own.place] = flag
        self.barrier.wait()
        return all(self.flags)

    def run(self, act):
        """Returns the results of act(0) and act(1) in two threads."""

        def one(place):
            self.own.place = place
            return act(place)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(one, (0, 1)))


@pytest.mark.parametrize("alike", [True, False])
def test_processes_divide_what_is_missing(tmp_path, monkeypatch, alike):
    """Each computes a half for both; with folders of their own, each computes all."""
    data, made, put = smooth(tmp_path / "photos", 5), {0: set(), 1: set()}, Store.put
    plain = batches.build(data, tiny(), 0)
    monkeypatch.setattr(cache, "PIXELS", 32 * 32)  # one picture at a time
    monkeypatch.setattr(cache, "MANY", 2)
    two = Two(monkeypatch)

    def counted(self, name, arrays):
        if "moments" in arrays:
            made[two.own.place].add(name)
        put(self, name, arrays)

    def built(place):
        cached = dataclasses.replace(data, cache=str(tmp_path / f"cache{'' if alike else place}"))
        return batches.build(cached, tiny(), 0)

    monkeypatch.setattr(Store, "put", counted)
    for one in two.run(built):
        for step in range(3):
            same(one[step], plain[step])
    assert [len(made[place]) for place in (0, 1)] == ([3, 2] if alike else [5, 5])
    assert made[0].isdisjoint(made[1]) == alike
    made[0].clear()
    made[1].clear()
    two.run(built)
    assert not made[0] and not made[1]


def test_prompts_are_kept_only_where_the_text_encoder_does_not_learn(tmp_path):
    data = dataclasses.replace(DATA, cache=str(tmp_path), word="<new>")
    for method, kept in ((Full(("unet",), "attn2"), True), (Full(("unet", "text_encoder")), False),
                         (TextualInversion("<new>", "face"), False)):  # fmt: skip
        assert (begin(Train(model="random:tiny", method=method, data=data))[2].texts is not None) == kept
    unets = [Train(model="random:tiny", method=Lora(rank=2), data=data, seed=seed) for seed in (0, 1)]
    one, other = (begin(settings)[2].texts for settings in unets)
    assert one.which == other.which  # a LoRA of the UNet leaves texts as they are
    assert trees.depends(lambda tree: tree["a"] + tree["b"], {"a": jnp.ones(2), "b": jnp.ones(2)})
    assert not trees.depends(lambda tree: (tree["a"] * 2, jnp.ones(2))[1], {"a": jnp.ones(2)})


def test_batches_of_other_processes_get_the_kept_texts(tmp_path, monkeypatch):
    """The others are this one here; they encode nothing."""
    data = dataclasses.replace(DATA, cache=str(tmp_path), workers=2, dropout=0.3)
    made = begin(Train(model="random:tiny", method=Full(("unet",), "attn2"), data=data))[2]

    def batched(example, first, count, threads, workers):
        assert workers == 2 and "text" not in example(first)
        return within(example, first, count, 0, 0)

    within = stream.batched
    alone = [made[step] for step in (1, 2)]
    monkeypatch.setattr(stream, "batched", batched)
    for one, other in zip(alone, made.iterate(1), strict=False):
        assert one.keys() == other.keys() and "text" in one
        jax.tree.map(np.testing.assert_array_equal, one, other)


def test_the_program_fills_what_a_run_will_look_up(tmp_path, capsys):
    line = [str(ROOT / "configs/full.py"), "model=random:tiny", "data.path=pocketland", "data.count=6", "data.size=32",
            "data.batch=2", "epochs=1", f"data.cache={tmp_path}"]  # fmt: skip
    assert program.fill(line) == 0
    said = capsys.readouterr().out
    prompts = len(Store(tmp_path / "texts.records"))
    assert f"{tmp_path}: 6 pictures, {prompts} prompts" in said and 2 <= prompts <= 7
    sizes = [path.stat().st_size for path in sorted(tmp_path.glob("*.records"))]
    data = begin(load(line[0], line[1:]))[2]
    for step in range(3):
        assert "text" in data[step] and "text" in data.of(range(1))[step]
    assert [path.stat().st_size for path in sorted(tmp_path.glob("*.records"))] == sizes
    assert program.fill(line[:-1]) == 1
    assert "error: data.cache='': expected the folder" in capsys.readouterr().err
