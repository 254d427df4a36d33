"""What a file or a text may ask for: numbers out of their range, endless texts and lists are refused, and soon."""

import json
import time
import zlib

import numpy as np
import pytest
from PIL import Image

from sdjax.data import tags
from sdjax.data.classes import ClassData
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.formats.models import folder, presets
from sdjax.formats.storage import files, parameters
from sdjax.images import reading
from sdjax.models.clip import ImageConfig, TextConfig
from sdjax.models.controlnet import ControlNetConfig
from sdjax.models.unet import UNetConfig
from sdjax.models.vae import VaeConfig
from sdjax.service import lists, records
from sdjax.text import grammars

SECONDS = 2.0  # of processor time
LONG = 100_000  # letters

TEXTS = {
    "spaces": " " * LONG,
    "spaces before a word": "a" + " " * LONG + "b",
    "spaces around a colon": " " * (LONG // 2) + ":" + " " * (LONG // 2) + "x",
    "spaces around BREAK": " " * LONG + "BREAK" + " " * LONG,
    "BREAKs": "BREAK " * (LONG // 6),
    "ANDs": "a AND " * (LONG // 6),
    "colons": ":" * LONG,
    "colons and spaces": ": " * (LONG // 2),
    "open angles": "<a:" * (LONG // 3),
    "open angles of lora": "<lora:" * (LONG // 6) + ">",
    "open brackets": "(" * LONG,
    "open brackets and words": "(a" * (LONG // 2) + ")" * (LONG // 2),
    "square brackets": "[a:" * (LONG // 3),
    "nests of ninety": ("[" * 90 + "a" + "]" * 90) * (LONG // 181),
    "nests that stay open": ("(" * 99 + "a " * 500) + "b" * LONG,
    "bars": "[" + "|" * LONG + "]",
    "a bar too much": "[a|b" * (LONG // 4),
    "backslashes": "\\" * LONG,
    "digits": "(a:" + "1" * LONG + ")",
    "points": "(a:" + "." * LONG,
    "braces": "{" * LONG,
    "bars in braces": "{" + "|" * LONG,
    "commas and spaces": " ," * (LONG // 2),
    "stars": "*" * LONG,
}


def parsed(text):
    text, _ = grammars.adapters(text, {"lora": "lora"})
    for part, _ in grammars.parts(text):
        for _, one in grammars.schedule(part, 20):
            grammars.emphasis(one)
    grammars.comfy_emphasis(text)


def alone(text):
    grammars.emphasis(text)


def varied(text):
    tags.chosen(text, np.random.default_rng(0))
    ClassData(identifiers=("sks",)).prompt(text)


def recorded(text):
    records.parse(f"{text}\nSteps: 20, Sampler: Euler a, CFG scale: 7, Seed: 1, {text[:20_000]}")


@pytest.mark.parametrize("read", [parsed, alone, varied, recorded])
def test_no_text_takes_long(read):
    for name, text in TEXTS.items():
        begun = time.process_time()
        try:
            read(text)
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 300, name
        assert time.process_time() - begun < SECONDS, name


NUMBERS = [
    (UNetConfig, {"layers_per_block": 1_000_000}),
    (UNetConfig, {"layers_per_block": -1}),
    (UNetConfig, {"layers_per_block": True}),
    (UNetConfig, {"block_out_channels": [320] * 100}),
    (UNetConfig, {"block_out_channels": [10**18, 320, 320, 320]}),
    (UNetConfig, {"block_out_channels": []}),
    (UNetConfig, {"block_out_channels": "320"}),
    (UNetConfig, {"in_channels": 10**400}),
    (UNetConfig, {"norm_num_groups": 0}),
    (UNetConfig, {"norm_eps": float("nan")}),
    (UNetConfig, {"attention_head_dim": 0}),
    (UNetConfig, {"attention_head_dim": [8, "8", 8, 8]}),
    (UNetConfig, {"sample_size": 1 << 40}),
    (UNetConfig, {"num_class_embeds": 1 << 40}),
    (VaeConfig, {"layers_per_block": 1_000_000}),
    (VaeConfig, {"scaling_factor": "0.18215"}),
    (VaeConfig, {"in_channels": -3}),
    (VaeConfig, {"latent_channels": 1 << 30}),
    (TextConfig, {"num_hidden_layers": 1_000_000}),
    (TextConfig, {"vocab_size": 1 << 40}),
    (TextConfig, {"hidden_size": 1 << 30}),
    (TextConfig, {"layer_norm_eps": float("inf")}),
    (ImageConfig, {"image_size": 1 << 20}),
    (ImageConfig, {"num_hidden_layers": 1_000_000}),
    (ControlNetConfig, {"conditioning_embedding_out_channels": [16] * 1000}),
    (Schedule, {"num_train_timesteps": 300_000_000}),
    (Schedule, {"steps_offset": 1 << 40}),
    (Schedule, {"beta_start": float("nan")}),
]


@pytest.mark.parametrize(("kind", "values"), NUMBERS, ids=lambda value: str(value)[:40])
def test_numbers_out_of_their_range(kind, values):
    (name,) = values
    begun = time.process_time()
    with pytest.raises(ValueError, match=name) as error:
        kind.from_json(values)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - begun < SECONDS


def test_the_ranges_leave_room_for_every_built_in_shape():
    for shape in presets.SHAPES.values():
        assert UNetConfig(**shape["unet"]).layers >= 2 and VaeConfig(**shape["vae"]).layers >= 2
    for tower in presets.TOWERS.values():
        assert ImageConfig(**tower).layers >= 24


def test_a_config_of_more_layers_than_weights_is_refused_before_they_are_made(tmp_path):
    files.write_json(tmp_path / "config.json", {"num_hidden_layers": 900, "hidden_size": 64, "num_attention_heads": 1})
    config = folder.read_config(tmp_path / "config.json", TextConfig.from_json)
    held = files.Arrays("model.safetensors", {"a": np.zeros(1, np.float32)})
    begun = time.process_time()
    with pytest.raises(ValueError, match="model.safetensors: does not fit its config.json: 900 layers, 1 weights"):
        parameters.read(held, type("Network", (), {"config": config}), "text_encoder")
    assert time.process_time() - begun < SECONDS


def test_a_list_has_a_most(tmp_path, monkeypatch):
    assert lists.WHOLE == 200_000
    monkeypatch.setattr(lists, "WHOLE", 2000)
    path = tmp_path / "jobs.jsonl"
    path.write_text((json.dumps({"prompt": "a cat", "seed": "0-999"}) + "\n") * 100)
    begun = time.process_time()
    with pytest.raises(ValueError, match=r"jobs.jsonl: row 3: more than 2000 pictures in all; .*several lists"):
        lists.read(path)
    assert time.process_time() - begun < SECONDS


@pytest.mark.parametrize("side", [30_000, 1 << 30])
def test_pictures_of_a_billion_pixels_are_refused_by_their_header(side, tmp_path):
    path = tmp_path / "a.png"
    Image.new("L", (16, 16)).save(path)
    data = bytearray(path.read_bytes())
    data[16:24] = side.to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    path.write_bytes(data)
    for read in (reading.picture, reading.mask, reading.shape):
        begun = time.process_time()
        with pytest.raises(ValueError, match="a.png: "):
            read(path)
        assert time.process_time() - begun < SECONDS


def test_json_that_is_nested_deep(tmp_path):
    path = tmp_path / "config.json"
    path.write_text("[" * 200_000)
    for read in (files.read_json, records.read):
        with pytest.raises(ValueError, match="config.json: "):
            read(path)
