"""What exported files say: kohya's and ModelSpec's names, hashes as A1111 computes them, cards, what stays private."""

import getpass
import hashlib
import json
import socket

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from PIL import Image

import sdjax
from sdjax.data.batches import Data
from sdjax.diffusion.noise_schedule import Schedule
from sdjax.formats import pipeline
from sdjax.formats.adapters import about
from sdjax.formats.adapters.about import Facts
from sdjax.formats.models import presets
from sdjax.formats.storage import hashes, headers
from sdjax.methods.adapter import Adapter
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.models.unet import UNet, UNetConfig
from sdjax.training import facts, run_folder
from sdjax.training.settings import Train

CAPTIONS = ("a red cat, on grass", "a red cat, at home", "sleeping,  on grass")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home") / "private-album"
    folder.mkdir()
    for i, text in enumerate(CAPTIONS):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(text)
    return folder


def exported(pictures, out, **more):
    """Returns the path of what a run wrote, which learned nothing, and its header."""
    method, sd = TextualInversion("<cat>", "cat"), pipeline.load("random:tiny")
    settings = Train(model="random:tiny", method=method, data=Data(path=str(pictures), size=32), steps=7, **more)
    (out / "samples").mkdir(parents=True)
    Image.new("RGB", (20, 10), (9, 8, 7)).save(out / "samples" / "0000005.png")
    trained, frozen = method.split(sd)
    path, _ = run_folder.export(method, frozen, trained, out / "export", **facts.told(settings, out, 7))
    with safetensors.safe_open(path, "np") as file:
        return path, file.metadata()


def test_a_run_says_what_it_was(pictures, tmp_path):
    path, said = exported(pictures, tmp_path / "my cat")
    assert said["ss_output_name"] == said["modelspec.title"] == "my cat"
    assert said["modelspec.trigger_phrase"] == "<cat>" and said["format"] == "pt"
    assert said["modelspec.architecture"] == "stable-diffusion/textual-inversion"
    assert (said["ss_steps"], said["ss_seed"], said["ss_num_train_images"]) == ("7", "0", "3")
    assert (said["ss_resolution"], said["modelspec.resolution"]) == ("(32, 32)", "32x32")
    tags = {"a red cat": 2, "on grass": 2, "at home": 1, "sleeping": 1}
    assert json.loads(said["ss_tag_frequency"]) == {"private-album": tags}
    assert json.loads(said["ss_dataset_dirs"]) == {"private-album": {"n_repeats": 1, "img_count": 3}}
    assert said["ss_sd_model_name"] == "random:tiny" and json.loads(said["settings"])["init"] == "cat"
    assert sdjax.attach(pipeline.load("random:tiny"), path).words
    again, _ = exported(pictures, tmp_path / "twice" / "my cat")
    assert again.read_bytes() == path.read_bytes()


def test_hashes_are_of_the_tensors(pictures, tmp_path):
    path, said = exported(pictures, tmp_path / "cat")
    data = path.read_bytes()
    wanted = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert said["sshs_model_hash"] == wanted and said["modelspec.hash_sha256"] == f"0x{wanted}"
    assert hashes.autov3(path) == wanted[:12]
    tensors, held = safetensors.numpy.load_file(path), headers.metadata(path)
    headers.tell(path, {**held, "modelspec.author": "ä"})
    assert headers.metadata(path) == {**held, "modelspec.author": "ä"} and hashes.autov3(path) == wanted[:12]
    np.testing.assert_array_equal(safetensors.numpy.load_file(path)["<cat>"], tensors["<cat>"])
    about.seal(path)
    assert headers.metadata(path)["sshs_model_hash"] == wanted


def test_the_card_is_a1111s(pictures, tmp_path):
    path, _ = exported(pictures, tmp_path / "cat")
    beside = path.with_suffix(".json")
    card = json.loads(beside.read_text())
    assert set(card) == {"description", "sd version", "activation text", "preferred weight", "negative text", "notes"}
    assert card["activation text"] == "<cat>" and card["sd version"] == "Unknown" and card["preferred weight"] == 1
    assert card["notes"].startswith(f"AutoV2 {hashes.autov2(path)}")
    assert Image.open(path.with_name("learned_embeds.preview.png")).getpixel((0, 0)) == (9, 8, 7)
    beside.write_text('{"notes": "mine"}')
    assert about.card(path, {}) == [] and json.loads(beside.read_text()) == {"notes": "mine"}


@pytest.mark.parametrize("public", [False, True])
def test_what_stays_private(public, pictures, tmp_path):
    """Never paths, users and machines; in a public file no captions, no names of folders and models either."""
    path, said = exported(pictures, tmp_path / "cat", public=public)
    written = b"".join(one.read_bytes() for one in path.parent.iterdir())
    never = [str(pictures.parent), str(tmp_path), socket.gethostname(), "Users"]
    never += [getpass.getuser()] if getpass.getuser() not in ("root",) else []
    assert not [text for text in never if text.encode() in written]
    told = [text for text in ("red cat", "on grass", "private-album", "random:tiny") if text.encode() in written]
    assert told == ([] if public else ["red cat", "on grass", "private-album", "random:tiny"])
    assert said["modelspec.trigger_phrase"] == "<cat>" and said["ss_output_name"] == "cat"
    assert set(about.PRIVATE) & said.keys() == ({"ss_output_name"} if public else set(about.PRIVATE) & said.keys())


@pytest.mark.parametrize(
    ("name", "shape", "version"),
    [
        ("sd15", "stable-diffusion-v1", "sd_v1"),
        ("sd21", "stable-diffusion-v2-768-v", "sd_v2_v"),
        ("tiny", "stable-diffusion", ""),
    ],
)
def test_base_models_have_the_names_of_others(name, shape, version):
    networks = {"unet": UNet(UNetConfig(**presets.SHAPES[name]["unet"]))}
    schedule = Schedule(prediction_type="v_prediction" if name == "sd21" else "epsilon")
    sd = pipeline.load("random:tiny").replace(networks=networks, schedule=schedule)
    told = about.metadata(Adapter(), Facts(title="x"), sd)
    assert told["modelspec.architecture"] == shape and told.get("ss_base_model_version", "") == version
    assert told["modelspec.prediction_type"] == ("v" if name == "sd21" else "epsilon")
    assert told["ss_v2"] == str(name == "sd21")
