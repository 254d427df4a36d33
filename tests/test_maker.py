"""The Maker: pictures of requests, what it loads once, and how much of that it keeps."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import sdjax
from sdjax.formats import pipeline
from sdjax.formats.adapters import reading
from sdjax.sampling.settings import ImageToImage, TextToImage
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
    held, made = maker.Held(room=2000), []

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
    held = maker.Held(room=2000)
    for name in "ab":
        held.get(name, lambda: (shared, np.zeros(1)))
    assert len(held.items) == 2  # what they share counts once


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
    read, found = reading.read, []
    monkeypatch.setattr(reading, "read", lambda *given: found.append(given[0].name) or read(*given))
    made_by = maker.Maker(tmp_path, room=1e9)
    plain = maker._bytes(made_by.base(Request(TINY))[0])
    for strength in (0.1, 0.2):
        made = dataclasses.replace(TINY, grammar="a1111", prompt=f"a <lora:cat:{strength}>")
        made_by.model([Request(made)])
    assert found == ["cat.safetensors"]
    size = 64 * 32 * 4
    assert maker._bytes(*made_by.held.items.values()) == plain + size + 4 + 2 * size  # the factors, two sums
