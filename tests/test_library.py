"""The library: what lies in folders, what it tells of itself, what is shared of it and what is thrown away."""

import dataclasses
import io
import json
import os
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file, save_file

from sdjax.formats.storage import headers
from sdjax.formats.storage.hashes import autov3
from sdjax.formats.storage.tensor_file import TensorFile
from sdjax.sampling.settings import Interpolate, TextToImage
from sdjax.service import descriptions, library, orders, records, sharing
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.settings import SettingError
from sdjax.web import server
from tests.serving import ask

UNET = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
METADATA = {
    "ss_network_dim": "4", "ss_learning_rate": "1e-4", "ss_dataset_dirs": '{"/home/me/photos": 1}',
    "ss_tag_frequency": json.dumps({"a": {"ink": 4, "pen ": 2}, "b": {"pen": 3}}),
    "ss_training_comment": "for my mother",
}  # fmt: skip


def lora(path, width=768, **metadata):
    names = {f"{UNET}.lora_down.weight": (4, width), f"{UNET}.lora_up.weight": (320, 4), f"{UNET}.alpha": ()}
    save_file({name: np.ones(shape, np.float32) for name, shape in names.items()}, path, metadata or METADATA)
    return path


@pytest.fixture
def place(tmp_path):
    for name in ("models", "loras", "models/sub"):
        (tmp_path / name).mkdir()
    return Place(tmp_path / "ui", "pocket", tmp_path / "models", tmp_path / "loras").made()


def test_kinds_are_told_by_what_a_file_holds(place):
    one = np.zeros(1, np.float32)
    files = {
        "sd.safetensors": "model.diffusion_model.input_blocks.0.0.weight",
        "sub/v.safetensors": "decoder.conv_in.weight",
        "c.safetensors": "control_model.input_hint_block.0.weight", "other.safetensors": "something",
    }  # fmt: skip
    for name, tensor in files.items():
        save_file({tensor: one}, place.models / name)
    for name in ("old.ckpt", "x.vae.pt", "notes.txt", "damaged.safetensors", ".hidden.safetensors"):
        (place.models / name).write_bytes(b"x")
    for name, about in (("folder", "model_index.json"), ("net", "config.json")):
        (place.models / name).mkdir()
        (place.models / name / about).write_text('{"_class_name": "ControlNetModel"}')
    lora(place.adapters / "ink.safetensors")
    (place.adapters / "ink.png").write_bytes(b"no picture")
    found = {one.name: one.kind for one in Library(place).entries()}
    assert found == {
        "pocket": "model", "sd.safetensors": "model", "sub/v.safetensors": "vae", "c.safetensors": "controlnet",
        "old.ckpt": "model", "x.vae.pt": "vae", "folder": "model", "net": "controlnet", "ink": "lora",
    }  # fmt: skip


def test_kinds_of_pickles_are_told_by_what_they_hold(place):
    """Not by their names: the usual autoencoder and ControlNets are .ckpt and .pth files, nested or not."""
    one = torch.zeros(1)
    files = {
        "vae-ft-mse-840000-ema-pruned.ckpt": {"state_dict": {"decoder.conv_in.weight": one, "loss.logvar": one}},
        "control_sd15_canny.pth": {"control_model.input_hint_block.0.weight": one, "model.diffusion_model.x": one},
        "control_v11p.ckpt": {"state_dict": {"input_hint_block.0.weight": one}},
        "sd.vae.pt": {"model.diffusion_model.input_blocks.0.0.weight": one},
        "words.pt": {"string_to_param": {"*": one}},
    }
    for name, held in files.items():
        torch.save(held, place.models / name)
    found = Library(place)
    wanted = {"vae-ft-mse-840000-ema-pruned.ckpt": "vae", "control_sd15_canny.pth": "controlnet",
              "control_v11p.ckpt": "controlnet", "sd.vae.pt": "model"}  # fmt: skip
    assert {one.name: one.kind for one in found.entries() if one.name != "pocket"} == wanted
    found.save()
    with pytest.MonkeyPatch.context() as patch:  # a later start asks the cache
        patch.setattr(library, "_file_kind", lambda path: pytest.fail("read again"))
        assert {one.name for one in Library(place).entries("controlnet")} == set(list(files)[1:3])


def test_what_a_file_tells(place):
    path = lora(place.adapters / "ink.safetensors")
    about = descriptions.of("lora", path)
    assert about["words"] == [["pen", 5], ["ink", 4]] and about["base"] == "sd1"
    assert about["training"]["rank"] == "4" and about["training"]["rate"] == "1e-4"
    assert about["hashes"]["autov3"] == autov3(path)
    for width, base in ((1024, "sd2"), (2048, "sdxl"), (64, "")):
        assert descriptions.of("lora", lora(place.adapters / "w.safetensors", width, format="pt"))["base"] == base
    modelspec = {
        "modelspec.trigger_phrase": "a sks",
        "modelspec.title": "T\0itle",
        "modelspec.architecture": "x-v1-sdxl",
    }
    about = descriptions.of("lora", lora(place.adapters / "m.safetensors", 768, **modelspec))
    assert about["words"] == [["a sks", 0]] and about["title"] == "Title" and about["base"] == "sdxl"


def test_cards_and_previews_of_other_tools(place):
    path = lora(place.adapters / "ink.safetensors", format="pt")
    (place.adapters / "ink.json").write_text(json.dumps({"activation text": "ink art", "preferred weight": 0.7}))
    (place.adapters / "ink.civitai.info").write_text(json.dumps({"trainedWords": ["x"], "baseModel": "SD 1.5"}))
    (place.adapters / "ink.preview.png").write_bytes(b"png")
    about = descriptions.of("lora", path)
    assert about["words"] == [["ink art", 0]] and about["card"]["weight"] == 0.7
    assert descriptions.preview(path).name == "ink.preview.png"
    for text in ("no json", "[1]", "[" * 100_000, '{"activation text": 3, "notes": {}}', "x" * (2 << 20)):
        (place.adapters / "ink.json").write_text(text)
        (place.adapters / "ink.civitai.info").write_text(text)
        assert "weight" not in descriptions.of("lora", path)["card"]


def test_a_file_is_described_once_and_again_where_it_changed(place, monkeypatch):
    path, read = lora(place.adapters / "ink.safetensors"), []
    of = descriptions.of
    monkeypatch.setattr(library.descriptions, "of", lambda *given: read.append(given) or of(*given))
    over = threading.Event()
    over.set()
    Library(place).describe_all(over)
    assert read == []
    over.clear()
    Library(place).describe_all(over)
    again = Library(place)
    again.describe_all(over)
    entry = again.find("lora", "ink")
    assert len(read) == 1 and again.known_of(entry)["base"] == "sd1" and again.hash(entry) == again.title(entry)[5:-1]
    os.utime(path, (1, 1))
    assert again.known_of(entry) == {}
    again.described(entry)
    assert len(read) == 2
    again.kept.write_text("damaged")
    assert Library(place).known == {}


def test_names(place):
    for name in ("a.safetensors", "sub/a.safetensors"):
        save_file({"model.diffusion_model.x": np.zeros(1, np.float32)}, place.models / name)
    found = Library(place)
    assert found.find("model", "sub/a.safetensors").path == place.models / "sub" / "a.safetensors"
    assert found.find("model", "a").path == found.find("model", "a.safetensors").path == place.models / "a.safetensors"
    for name in ("", "b", "../models/a.safetensors", str(place.models / "a.safetensors"), "sub"):
        with pytest.raises(SettingError, match="expected one of"):
            found.find("model", name)
    assert (
        orders.pictures(found, "text2img", {"prompt": "x", "model": "sub/a"})["settings"]["model"]
        == "sub/a.safetensors"
    )


def test_frames_count_as_pictures_of_a_job(place):
    found, values = Library(place), {"prompt": "a", "to_seed": 2}
    order = orders.pictures(found, "interpolate", values | {"frames": orders.MOST})
    assert orders.requests(found, order)[0].settings.frames == orders.MOST
    for do in (lambda: orders.pictures(found, "interpolate", values | {"frames": orders.MOST + 1}),
               lambda: orders.requests(found, order | {"settings": values | {"frames": 1000}})):  # fmt: skip
        with pytest.raises(SettingError, match="frames=.*at most 100"):
            do()
    with pytest.raises(SettingError, match=r"frames=1000000000: expected a whole number, 2 to 1000"):
        Interpolate(prompt="a", frames=10**9)


def test_a_package_holds_what_others_need_and_nothing_private(place, tmp_path):
    path, picture = lora(place.adapters / "ink.safetensors"), tmp_path / "made.png"
    record = records.of(TextToImage(prompt="my secret", seed=4), (32, 32))
    records.save(picture, np.zeros((32, 32, 3), np.uint8), record, beside=False)
    found = Library(place)
    entry = found.find("lora", "ink")
    made = sharing.package(entry, found.described(entry), tmp_path / "ink.zip", [picture], "CC-BY-4.0", {"steps": 5})
    with zipfile.ZipFile(made) as archive:
        assert set(archive.namelist()) == {"ink.safetensors", "pictures/00.png", "README.md"}
        archive.extractall(tmp_path / "out")
    out, card = tmp_path / "out", (tmp_path / "out" / "README.md").read_text()
    assert (
        "license: CC-BY-4.0" in card
        and "base_model: sd1" in card
        and "steps: 5" in card
        and "![](pictures/00.png)" in card
    )
    assert TensorFile(out / "ink.safetensors").metadata == {"ss_network_dim": "4", "ss_learning_rate": "1e-4"}
    assert autov3(out / "ink.safetensors") == autov3(path)
    for name, tensor in load_file(path).items():
        np.testing.assert_array_equal(load_file(out / "ink.safetensors")[name], tensor)
    assert records.read(out / "pictures/00.png")["seed"] == 4
    everything = b"".join(one.read_bytes() for one in out.rglob("*") if one.is_file())
    assert b"my secret" not in everything and b"/home/me" not in everything and b"mother" not in everything
    sharing.package(entry, found.described(entry), tmp_path / "ink.zip", [picture], private=True)
    with zipfile.ZipFile(tmp_path / "ink.zip") as archive:
        assert archive.read("ink.safetensors") == path.read_bytes() and b"my secret" in archive.read("pictures/00.png")


def test_a_packaged_model_says_nothing_private(place, tmp_path):
    """A folder's metadata.json is cleaned as a header is, and its preview shows prompts."""
    model = place.models / "cat"
    model.mkdir()
    (model / "model_index.json").write_text("{}")
    save_file({"a": np.zeros(1, np.float32)}, model / "model.safetensors")
    (model / headers.NAME).write_text(json.dumps(METADATA))
    Image.new("RGB", (4, 4)).save(model / headers.PREVIEW)
    found = Library(place)
    entry = found.find("model", "cat")
    made = sharing.package(entry, found.described(entry), tmp_path / "cat.zip")
    with zipfile.ZipFile(made) as archive:
        assert json.loads(archive.read("cat/metadata.json")).keys() == {"ss_network_dim", "ss_learning_rate"}
        assert "cat/preview.png" not in archive.namelist()
    with zipfile.ZipFile(sharing.package(entry, {}, tmp_path / "cat.zip", private=True)) as archive:
        assert json.loads(archive.read("cat/metadata.json")) == METADATA and "cat/preview.png" in archive.namelist()


def test_the_trash_takes_a_file_with_what_lies_beside_it(place):
    lora(place.adapters / "ink.safetensors")
    for name in ("ink.json", "ink.preview.png", "ink2.json"):
        (place.adapters / name).write_bytes(b"{}")
    found = Library(place)
    name = sharing.discard(found, found.find("lora", "ink"))
    assert {path.name for path in (place.root / "trash" / name).iterdir()} == {
        "ink.safetensors",
        "ink.json",
        "ink.preview.png",
    }
    assert [path.name for path in place.adapters.iterdir()] == ["ink2.json"]
    with pytest.raises(SettingError):
        sharing.discard(found, found.find("model", "pocket"))


def test_the_trash_takes_files_below_a_folder_that_is_a_link(place, tmp_path):
    lora(place.adapters / "ink.safetensors")
    (tmp_path / "link").symlink_to(place.adapters)
    found = Library(dataclasses.replace(place, adapters=tmp_path / "link"))
    sharing.discard(found, found.find("lora", "ink"))
    assert not (place.adapters / "ink.safetensors").exists()


def test_what_the_server_was_started_with_stays(place, tmp_path):
    (place.models / "own").mkdir()
    (place.models / "own" / "model_index.json").write_text("{}")
    for model in (place.models / "own", tmp_path / "elsewhere"):
        model.mkdir(exist_ok=True)
        (model / "model_index.json").write_text("{}")
        found = Library(dataclasses.replace(place, model=str(model)))
        with pytest.raises(SettingError):
            sharing.discard(found, found.own)
        assert model.is_dir()


def test_over_http(place):
    lora(place.adapters / "ink.safetensors")
    image = Image.new("RGB", (16, 16))
    image.save(place.adapters / "ink.png")
    app = server.create_app(place)
    app.state.services.library.described(app.state.services.library.find("lora", "ink"))
    (one,) = ask(app, "GET", "/api/library?kind=lora").json()
    assert one["preview"] and one["notes"] == "" and one["base"] == "sd1"
    assert ask(app, "GET", "/api/library/lora/preview?name=ink").body.startswith(b"\x89PNG")
    got = ask(app, "POST", "/api/library/lora/notes", {"name": "ink", "notes": "mine", "tags": ["a", "b"]})
    assert got.json()["notes"] == "mine" and ask(app, "GET", "/api/library?kind=lora").json()[0]["tags"] == ["a", "b"]
    zipped = ask(app, "POST", "/api/library/lora/package", {"name": "ink", "licence": "MIT"})
    assert zipped.status == 200 and "ink.zip" in zipped.headers["content-disposition"]
    assert "ink.safetensors" in zipfile.ZipFile(io.BytesIO(zipped.body)).namelist()
    for path, body in (
        ("lora/package", {"name": "ink", "pictures": [[1, 0]]}),
        ("lora/package", {"name": "ink", "pictures": ["../x"]}),
        ("lora/package", {"name": "ink", "to": "/tmp/x"}), ("lora/notes", {"name": "ink", "notes": "x" * 10**5}),
        ("lora/delete", {"name": "../ink"}), ("lora/delete", {}), ("model/delete", {"name": "pocket"}),
    ):  # fmt: skip
        assert ask(app, "POST", f"/api/library/{path}", body).status == 422, (path, body)
    assert ask(app, "POST", "/api/library/cats/delete", {"name": "ink"}).status == 404
    assert ask(app, "GET", "/api/library/lora/delete?name=ink").status in (404, 405)
    assert ask(app, "POST", "/api/library/lora/delete", {"name": "ink"}).status == 200
    assert ask(app, "GET", "/api/library?kind=lora").json() == [] and list(Path(place.adapters).iterdir()) == []
