"""The unofficial E4T in use: `make tune` from a hub, its export, bad folders, OpenCLIP's tower from its own file."""

import json
import os
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from hub_server import asking, files_of, serving
from PIL import Image
from port_folder import Port, photo
from test_e4t_port import bare, relative, said, started
from torch_step import models

import sdjax
from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.formats.models import open_clip
from sdjax.images import reading
from sdjax.methods.e4t import E4T
from sdjax.sampling.settings import TextToImage
from sdjax.service.maker import Maker
from sdjax.service.request import Request
from sdjax.stable_diffusion import to_pixels

ROOT = Path(__file__).parents[1]
BASE, FACES = "CompVis/stable-diffusion-v1-4", "mkshing/e4t-diffusion-ffhq-celebahq-v1"
SMALL = "steps=2 data.batch=2 data.size=32 compute=float32 frozen=float32 remat=false data.mask=true"


@pytest.fixture(scope="module")
def port():
    _, unet, text = models()
    return Port(unet, text)


@pytest.fixture(scope="module")
def folder(port, tmp_path_factory):
    return port.write(tmp_path_factory.mktemp("port") / "pretrained")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder of a small model without a vision tower."""
    return sdjax.save(bare(pipeline.load("random:tiny")), tmp_path_factory.mktemp("base") / "sd14")


@pytest.fixture(scope="module")
def tuned(folder, base, tmp_path_factory):
    """The export of `make tune MODEL=... INIT=... IMAGE=...`, both ids from a hub, with a mask beside the picture."""
    place = tmp_path_factory.mktemp("tune")
    Image.fromarray(photo(size=40)).save(place / "face.jpg")
    Image.fromarray(np.pad(np.full((20, 20), 255, np.uint8), 10)).save(place / "face.mask.png")
    asked = ["make", "-n", "--no-print-directory", "tune", f"MODEL={BASE}", f"INIT={FACES}", f"IMAGE={place}/face.jpg",
             f"ARGS={SMALL} out={place}/run"]  # fmt: skip
    said = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    command = [sys.executable, *shlex.split(said.splitlines()[-1])[1:]]
    with serving({BASE: files_of(base), FACES: files_of(folder)}, place / "hub") as (env, paths):
        run = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ".", **env}
        )
        assert run.returncode == 0, run.stderr
        for name in ("encoder.pt", "weight_offsets.pt"):
            assert any(path.startswith(f"/{FACES}/resolve/") and path.endswith(name) for path in paths)
    assert "1 mask" in run.stdout
    return place / "run" / "export"


def test_tuning_from_the_hub_leaves_a_model_with_its_encoder(tuned):
    names = sorted(path.name for path in (tuned / "e4t").iterdir())
    assert names == ["concept.png", "config.json", "encoder.safetensors", "offsets.safetensors"]
    sd = sdjax.load(tuned)
    (encoder,) = sd.conditioners
    assert type(encoder.kind).__name__ == "Tokens" and np.isfinite(said(sd)).all()


def test_its_export_is_attached_to_the_base_model(tuned, base):
    """As --model and as --adapter it is the same."""
    whole, attached = sdjax.load(tuned), sdjax.attach(sdjax.load(base), tuned)
    assert relative(said(attached), said(whole)) < 1e-4
    assert relative(said(sdjax.load(base), "a photo of face"), said(whole)) > 1e-4


def test_pictures_of_a_photo_without_tuning(folder, base, tmp_path):
    Image.fromarray(photo(5, 48)).save(tmp_path / "a.png")
    made = TextToImage(prompt="a photo of *s", model=str(base), adapter=(str(folder),), steps=1)
    maker, asked = Maker(), Request(replace(made, image=str(tmp_path / "a.png")))
    with pytest.raises(ValueError, match="image=None: the adapter's encoder has seen none"):
        maker.make([Request(made)])
    assert maker.make([asked]).shape == (1, 32, 32, 3)
    assert list(maker.record(asked, (32, 32)).hashes) == ["model", "e4t pretrained"]
    sd = maker.model([asked])
    wanted = to_pixels(reading.subject(tmp_path / "a.png", 32))
    np.testing.assert_array_equal(sd.reference.own["e4t"].concept, wanted)


# ---- bad folders ---------------------------------------------------------------------------------


def damaged(port, folder, change):
    """Writes a folder of which `change` spoils a file; returns it."""
    change(port.write(folder))
    return folder


def saved(name, change):
    """Returns a change of the weights of a file."""

    def spoil(folder):
        state = torch.load(folder / name)
        torch.save(change(dict(state)), folder / name)

    return spoil


def without(*parts):
    return lambda state: {name: x for name, x in state.items() if not any(part in name for part in parts)}


def config(**more):
    def spoil(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **more}))

    return spoil


class Evil:
    def __reduce__(self):
        return os.system, ("exit 1",)


BAD = {
    "code": (lambda f: torch.save({"a": Evil()}, f / "encoder.pt"), "encoder.pt: cannot be read: .*is not among"),
    "cut off": (lambda f: (f / "encoder.pt").write_bytes((f / "encoder.pt").read_bytes()[:-900]), "encoder.pt: cannot"),
    "empty": (lambda f: (f / "weight_offsets.pt").write_bytes(b""), "weight_offsets.pt: cannot be read"),
    "a list": (lambda f: torch.save([1], f / "weight_offsets.pt"), "weight_offsets.pt: holds no weights by name"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: no such file"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json: not a JSON file"),
    "no word": (config(placeholder_token=None), "config.json: placeholder_token=None: expected a text"),
    "scale": (config(domain_embed_scale="big"), "config.json: domain_embed_scale='big': expected a number"),
    "nested": (config(pretrained_args=3), "config.json: pretrained_args=3: expected an object"),
    "first version": (saved("encoder.pt", lambda s: {"linear.weight": torch.zeros(1)}), "encoder.pt: .*first version"),
    "no tower": (
        saved("encoder.pt", without("clip_vision")),
        r"encoder.pt: holds no clip_vision.\*, the vision tower; give it with vision=",
    ),
    "head": (saved("encoder.pt", without("first_linears.3.bias")), r"encoder.pt: does not fit the model and its"),
    "tower": (saved("encoder.pt", without("clip_vision.ln_pre.bias")), "missing vision_model.pre_layrnorm.bias"),
    "rows": (
        saved("encoder.pt", lambda s: {**s, "clip_vision.transformer.resblocks.0.attn.in_proj_bias": torch.zeros(385)}),
        "encoder.pt: ",
    ),
    "patches": (saved("encoder.pt", lambda s: {**s, "clip_vision.conv1.weight": torch.zeros(3)}), "encoder.pt: conv1"),
    "width": (
        saved("encoder.pt", lambda s: {**s, "clip_vision.conv1.weight": torch.zeros(0, 3, 8, 8)}), "encoder.pt: conv1"
    ),
    "offset": (saved("weight_offsets.pt", lambda s: {**s, "mid_block.wo_x.v": torch.ones(1)}), "unexpected mid_block"),
    "integers": (
        saved("weight_offsets.pt", lambda s: {n: x.int() if n.endswith(".v") else x for n, x in s.items()}),
        "weight_offsets.pt: .*instead of floating point",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_folder_is_one_line_that_names_its_file(port, tmp_path, name):
    change, message = BAD[name]
    folder = tmp_path / "bad"
    damaged(port, folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        kinds.opened(folder, bare(models()[0]))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_bad_tuned_folder_is_one_line_that_names_its_file(port, tmp_path):
    for name, change, message in (
        ("unet.pt", saved("unet.pt", without("conv_in")), "missing conv_in"),
        ("text_encoder.pt", saved("text_encoder.pt", lambda s: {"a": torch.ones(2)}), "has 0 rows"),
        ("domain.png", lambda f: (f / "domain.png").write_bytes(b"GIF"), "not an image"),
    ):
        folder = port.write(tmp_path / name, tuned=True, picture=photo())
        change(folder)
        with pytest.raises(ValueError, match=message) as caught:
            kinds.opened(folder, bare(models()[0]))
        assert str(folder / name) in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_that_is_not_the_files_is_refused(folder, tmp_path):
    for method, message in (
        (E4T(domain="a"), "method.domain='a': expected 'face', with which .* was trained"),
        (E4T(scale=0.2), "method.scale=0.2: expected 0.1"),
        (E4T(features="level"), "method.features='level': expected 'all'"),
    ):
        with pytest.raises(ValueError, match=message):
            started(folder, method)


# ---- OpenCLIP's tower ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub_file(port):
    """Returns a function that writes an OpenCLIP model as its hub has it, with a projection and a text tower."""
    state = {f"visual.{name}": x for name, x in port.encoder.clip_vision.state_dict().items()}
    more = {
        "visual.proj": torch.randn(128, 32),
        "logit_scale": torch.ones(()),
        "positional_embedding": torch.ones(3, 4),
    }
    told = {"model_cfg": {"embed_dim": 32, "vision_cfg": {"image_size": 24, "layers": 2, "width": 128,
                                                          "head_width": 64, "patch_size": 8}}}  # fmt: skip

    def write(path, config=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        save = safetensors.torch.save_file if path.suffix == ".safetensors" else torch.save
        save({**state, **more}, path)
        if config:
            (path.parent / open_clip.CONFIG).write_text(json.dumps(told))
        return path

    return write


def test_open_clips_file_is_its_tower(port, hub_file, tmp_path):
    picture = torch.tensor(np.random.default_rng(0).normal(size=(2, 24, 24, 3)).astype(np.float32))
    with torch.no_grad():
        pooled, tokens = port.encoder.clip_vision(picture.permute(0, 3, 1, 2))
    wanted = torch.cat([pooled[:, None], tokens], 1)
    for name in (*open_clip.WEIGHTS[::2], "other.bin"):
        path = hub_file(tmp_path / name / name)
        sd = pipeline.load("random:tiny", vision=path if name == "other.bin" else path.parent)
        network, params = sd.networks["image_encoder"], {"params": sd.parts["image_encoder"]}
        assert relative(network.apply(params, jnp.asarray(picture), method="tokens"), wanted) < 1e-5
        embeds, _, _ = network.apply(params, jnp.asarray(picture))
        assert relative(embeds, pooled @ open_clip_projection(path)) < 1e-5


def open_clip_projection(path):
    return (
        torch.load(path)["visual.proj"] if path.suffix == ".bin" else safetensors.torch.load_file(path)["visual.proj"]
    )


def test_a_tower_from_the_hub_serves_a_folder_without_one(port, hub_file, folder, tmp_path, monkeypatch):
    """The same head and offsets, the tower by vision= from OpenCLIP's file."""
    alone = port.write(tmp_path / "alone", tower=False)
    held = files_of(hub_file(tmp_path / "hub" / open_clip.WEIGHTS[2]).parent)
    with asking({"laion/clip": held}, tmp_path / "home", monkeypatch):
        config = pipeline.load("random:tiny", vision="laion/clip").networks["image_encoder"].config
    assert (config.hidden_size, config.num_attention_heads, config.hidden_act) == (128, 2, "gelu")
    sd = pipeline.load("random:tiny", vision=hub_file(tmp_path / "file" / "clip.bin", config=False))
    _, own = kinds.opened(alone, sd)
    _, other = kinds.opened(folder, bare(sd))
    assert "image_encoder" not in own.trees and own.about["config"]["hidden_size"] == 128
    np.testing.assert_array_equal(
        own.trees["head"]["final_linear"]["bias"], other.trees["head"]["final_linear"]["bias"]
    )
