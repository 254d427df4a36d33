"""The Maker: pictures of requests, what it loads once, and how much of that it keeps."""

import dataclasses
import sys
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdjax
from sdjax.formats import pipeline
from sdjax.formats.adapters import attachable
from sdjax.sampling.settings import ControlNet, ImageToImage, TextToImage
from sdjax.service import maker
from sdjax.service.request import Request, grouped, several
from sdjax.settings import SettingError

TINY = TextToImage(prompt="a face", model="random:tiny", steps=2)
CHANGE = "lora_te_text_model_encoder_layers_0_mlp_fc1.diff"


def test_pictures_are_those_of_the_function_and_the_model_is_loaded_once(tmp_path, monkeypatch):
    loaded, load = [], pipeline.load
    monkeypatch.setattr(pipeline, "load", lambda *source, **given: loaded.append(source) or load(*source, **given))
    made_by = maker.Maker(tmp_path)
    requests = several([TINY], 2)
    assert [one.settings.seed for one in requests] == [0, 1] and len(list(grouped(requests))) == 1
    made = made_by.make(requests)
    wanted = sdjax.text2img(load("random:tiny"), ["a face"] * 2, steps=2, seeds=[0, 1])
    np.testing.assert_array_equal(made, wanted)
    made_by.record(requests[0], (32, 32))
    np.testing.assert_array_equal(made_by.make(requests), made)
    assert loaded == [("random:tiny",)]


def test_what_was_used_first_goes_where_there_is_no_room():
    held, made = maker.Cache(room=2000), []

    def load(name, size=200):
        return held.get(name, lambda: made.append(name) or np.zeros(size, np.float32))

    for name in "abab":
        load(name)
    assert made == ["a", "b"]
    for name in ("c", "b", "a"):  # 800 bytes each: two have room
        load(name)
    assert made == ["a", "b", "c", "a"] and list(held.items) == ["b", "a"]
    load("large", 4000)
    assert list(held.items) == ["large"]  # one always stays
    shared = np.zeros(400, np.float32)
    held = maker.Cache(room=2000)
    for name in "ab":
        held.get(name, lambda: (shared, np.zeros(1)))
    assert len(held.items) == 2  # what they share counts once


def test_threads_wait_for_what_one_of_them_loads():
    held, made, wait_for_all = maker.Cache(room=1000), [], threading.Barrier(4)

    def load(i):
        time.sleep(0.05)
        made.append(i)
        return np.full(150, i)  # one has room

    def ask(_):
        wait_for_all.wait()
        return [int(held.get(i, lambda: load(i))[0]) for i in range(3)]  # noqa: B023

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [[0, 1, 2]] * 4
    held = maker.Cache(room=1e6)
    made.clear()
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(ask, range(4))) == [[0, 1, 2]] * 4
    assert made == [0, 1, 2]


def test_files_of_a_list_lie_in_its_folder(tmp_path):
    (tmp_path / "list").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "outside.png")
    made = ImageToImage(prompt="a", model="random:tiny", image="../outside.png", steps=2)
    with pytest.raises(ValueError, match="lies outside"):
        maker.Maker(tmp_path).make([Request(made, (tmp_path / "list").resolve())])
    with pytest.raises(SettingError, match="image='none.png': no such file; expected a picture's file"):
        maker.Maker(tmp_path).make([Request(ImageToImage(prompt="a", model="random:tiny", image="none.png"), tmp_path)])


def test_the_adapters_folder_is_walked_once_in_a_call(tmp_path, monkeypatch):
    save_file({"emb_params": np.ones((2, 32), np.float32)}, tmp_path / "ink.safetensors")
    save_file({CHANGE: np.ones((64, 32), np.float32)}, tmp_path / "cat.safetensors")
    walked, walk = [], Path.rglob
    monkeypatch.setattr(Path, "rglob", lambda path, *given: walked.append(path) or walk(path, *given))
    made_by, made = maker.Maker(tmp_path), dataclasses.replace(TINY, steps=1, grammar="a1111")
    request = Request(dataclasses.replace(made, prompt="a <lora:cat:0.5> ink"))
    for call in (
        lambda: made_by.model([request]),
        lambda: made_by.record(request, (32, 32)),
        lambda: made_by.hashes(request),
        lambda: made_by.notes([request]),
    ):
        walked.clear()
        call()
        assert walked == [tmp_path]


def test_a_file_is_read_once_for_its_strengths_and_counts(tmp_path, monkeypatch):
    save_file({CHANGE: np.ones((64, 32), np.float32)}, tmp_path / "cat.safetensors")
    read, found = attachable.read, []
    monkeypatch.setattr(attachable, "read", lambda *given: found.append(given[0].name) or read(*given))
    made_by = maker.Maker(tmp_path, room=1e9)
    plain = maker._bytes(made_by.base(Request(TINY))[0])
    for strength in (0.1, 0.2):
        made = dataclasses.replace(TINY, grammar="a1111", prompt=f"a <lora:cat:{strength}>")
        made_by.model([Request(made)])
    assert found == ["cat.safetensors"]
    size = 64 * 32 * 4
    assert maker._bytes(*made_by.held.items.values()) == plain + size + 4 + 2 * size  # the factors, two sums


@pytest.fixture
def restless():
    """Threads that change places a thousand times as often as usual."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(before / 1000)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize("count", [8, *(pytest.param(count, marks=pytest.mark.slow) for count in (24, 60, 200))])
def test_threads_make_the_pictures_that_one_makes(tmp_path, restless, count):
    """Two threads draw pictures of one Maker while a third attaches adapters; not all that is loaded has room."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        save_file({CHANGE: random.standard_normal((64, 32), np.float32)}, tmp_path / f"{name}.safetensors")
    save_file({"emb_params": random.standard_normal((2, 32), np.float32)}, tmp_path / "ink.safetensors")
    texts = ("a face", "a <lora:cat:0.9> face", "ink", "<lora:cat:0.4><lora:dog:1> ink face", "a <lora:dog:2> face")
    tiny = dataclasses.replace(TINY, steps=1, size="16", grammar="a1111")
    wanted = [Request(dataclasses.replace(tiny, prompt=texts[i % 5], seed=i)) for i in range(min(40, count))]
    made_by = maker.Maker(tmp_path)
    base = made_by.base(wanted[0])[0]
    made_by.held.room = 1.5 * maker._bytes(base)
    made, done = {}, threading.Event()

    def draw(first):
        for i in range(first, count, 2):
            made[i] = made_by.make([wanted[i % len(wanted)]], progress=i % 20 < 2)

    def attach():
        while not done.is_set():
            for name in ("cat", "dog"):
                sdjax.detach(sdjax.attach(base, tmp_path / f"{name}.safetensors", random.normal()))
            made_by.model([wanted[random.integers(5)]])

    with ThreadPoolExecutor() as threads:
        attaching, drawing = threads.submit(attach), [threads.submit(draw, first) for first in (0, 1)]
        wait(drawing, return_when=FIRST_EXCEPTION)
        done.set()
        for one in (*drawing, attaching):
            one.result()
    jax.clear_caches()  # what was traced beside other threads
    alone = maker.Maker(tmp_path)
    pictures = [alone.make([request]) for request in wanted]
    assert len({picture.tobytes() for picture in pictures}) == len(wanted)
    for i in range(count):
        k = i % len(wanted)
        np.testing.assert_array_equal(made[i], pictures[k], err_msg=wanted[k].settings.prompt)


@pytest.mark.parametrize("name", ["cat.safetensors", "folder/unet/x.safetensors", "folder/scheduler/config.json"])
@pytest.mark.parametrize("setting", ["model", "vae", "adapter", "control"])
def test_what_is_written_again_is_loaded_again(tmp_path, monkeypatch, name, setting):
    monkeypatch.setattr(maker.Maker, "_load", lambda *_: object())
    monkeypatch.setattr(maker.controlnet, "load_control", lambda *_: object())
    monkeypatch.setattr(maker.control, "applied", lambda held, *_: held[0])
    monkeypatch.setattr(maker, "_named_picture", lambda *_: None)
    given = tmp_path / Path(name).parts[0]
    made_by, values = (
        maker.Maker(tmp_path),
        {setting: (str(given),) if setting in ("adapter", "control") else str(given)},
    )
    kind = ControlNet if setting == "control" else TextToImage
    request = Request(kind(**{"prompt": "a", "control_image": ("a.png",)} | values if kind is ControlNet else values))
    tiny = pipeline.load("random:tiny") if setting == "control" else None

    def held():
        return made_by._controls(tiny, request) if setting == "control" else made_by.base(request)[0]

    seen = []
    for text in ("a", "longer"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        seen += [held(), held()]
    assert seen[0] is seen[1] is not seen[2] is seen[3]
