"""Whole models and ControlNets say how they were trained: in their folder, and in the single file made from it."""

import hashlib
import json

import diffusers
import jax
import pytest
import safetensors
from PIL import Image

from sdjax import convert
from sdjax.data.batches import Data
from sdjax.formats import pipeline
from sdjax.formats.storage import headers
from sdjax.methods.controlnet import ControlNet
from sdjax.methods.full import Full
from sdjax.service import descriptions
from sdjax.training import facts, run_folder
from sdjax.training.settings import Train

WORD = "sks dog"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "private-album"
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "0.png")
    (folder / "0.txt").write_text("asleep")
    return folder


def exported(method, pictures, out, public=False):
    """Returns (path, lines on its use) of a run's export, which learned nothing."""
    sd = pipeline.load("random:tiny")
    data = Data(path=str(pictures), size=32, word=WORD)
    settings = Train(model="random:tiny", method=method, data=data, steps=7, public=public)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), (9, 8, 7)).save(out / "samples" / "0000005.png")
    trained, frozen = method.split(sd, jax.random.key(0))
    return run_folder.export(method, frozen, trained, out / "export", **facts.told(settings, out, 7))


def written(path):
    """Returns the header of a single file, after the hash in it is found to be that of its tensors."""
    data = path.read_bytes()
    wanted = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    with safetensors.safe_open(path, "np") as file:
        said = file.metadata()
    assert said["sshs_model_hash"] == wanted and said["modelspec.hash_sha256"] == f"0x{wanted}"
    return said


CASES = {
    "model": (Full(), lambda path: diffusers.StableDiffusionPipeline.from_pretrained(path), ""),
    "controlnet": (ControlNet(), lambda path: diffusers.ControlNetModel.from_pretrained(path), "/controlnet"),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_folder_and_its_single_file_say_what_they_were(kind, pictures, tmp_path, capsys):
    method, load, suffix = CASES[kind]
    path, use = exported(method, pictures, tmp_path / "my dog")
    said = json.loads((path / headers.NAME).read_text())
    assert said["modelspec.trigger_phrase"] == WORD and said["modelspec.title"] == "my dog" and said["ss_steps"] == "7"
    assert said["modelspec.architecture"] == f"stable-diffusion{suffix}"
    assert Image.open(path / headers.PREVIEW).getpixel((0, 0)) == (9, 8, 7)
    assert kind == "controlnet" or f'"a photo of {WORD}"' in use[0]
    load(path)
    assert descriptions.of(kind, path)["training"]["steps"] == "7"
    assert descriptions.preview(path) == path / headers.PREVIEW
    before = {one: one.read_bytes() for one in path.rglob("*") if one.is_file()}
    again, _ = exported(method, pictures, tmp_path / "my dog")
    assert {one: one.read_bytes() for one in again.rglob("*") if one.is_file()} == before
    file = tmp_path / "dog.safetensors"
    assert convert.main([str(path), str(file)]) == 0
    assert f"wrote {file.with_suffix('.json')}" in capsys.readouterr().out
    header = written(file)
    assert (
        said.items() <= header.items() and json.loads(file.with_suffix(".json").read_text())["activation text"] == WORD
    )
    assert Image.open(tmp_path / "dog.preview.png").getpixel((0, 0)) == (9, 8, 7)
    assert convert.main([str(file), str(tmp_path / "back")]) == 0
    assert json.loads((tmp_path / "back" / headers.NAME).read_text()) == said
    assert convert.main([str(file), str(tmp_path / "half.safetensors"), "--dtype", "float16"]) == 0
    assert written(tmp_path / "half.safetensors")["ss_steps"] == "7"


def test_a_public_model_says_nothing_of_its_pictures(pictures, tmp_path):
    path, _ = exported(Full(), pictures, tmp_path / "dog", public=True)
    text = (path / headers.NAME).read_text()
    assert not [word for word in ("asleep", "private-album", "random:tiny", str(tmp_path)) if word in text]
    assert WORD in text and not (path / headers.PREVIEW).exists()


def test_another_model_in_its_place_does_not_inherit_it(pictures, tmp_path):
    path, _ = exported(Full(), pictures, tmp_path / "dog")
    pipeline.save(pipeline.load("random:tiny"), path)
    assert not (path / headers.NAME).exists()


def test_only_known_names_are_carried(tmp_path):
    """Another program's metadata.json, or its texts, do not reach our header."""
    (tmp_path / headers.NAME).write_text(
        json.dumps({"ss_steps": "7", "name": "x", "ss_seed": 1, "sshs_model_hash": "y"})
    )
    assert headers.described(tmp_path) == {"ss_steps": "7"}
    (tmp_path / headers.NAME).write_text("{")
    with pytest.raises(ValueError, match=headers.NAME):
        headers.described(tmp_path)
    assert headers.described(tmp_path / "none") == {}
