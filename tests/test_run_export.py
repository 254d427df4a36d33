"""What a run's checkpoints hold, exported later: the same bytes as the run's own export; steps, weights, refusals."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from sdjax import trees
from sdjax.convert import main
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.formats.adapters import attachable
from sdjax.formats.storage import files
from sdjax.methods.chain import Chain
from sdjax.methods.clip import Clip
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.methods.vae import Vae
from sdjax.runtime import compile_cache
from sdjax.training import export
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

RUN = Train(
    model="random:tiny",
    method=Full(("unet",), "attn2"),
    data=Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8)),
    optim=Optim(lr=1e-2),
    steps=3,
    checkpoint=1,
    ema=0.9,
)
METHODS = {
    "textual inversion": TextualInversion("<new>", "face"),
    "vae": Vae(recon="l2"),
    "clip": Clip(),
    "e4t tuning": Chain((E4T(), Full())),
}


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The program keeps no compiled programs in the user's folder."""
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)


def there(folder):
    """Returns {path: bytes} of all files of a folder, or of one file's folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "full"
    train(RUN, out)
    return out


def test_command_writes_what_the_run_exported(run, tmp_path, capfd, monkeypatch):
    before, opened, read_json = there(run), [], files.read_json
    monkeypatch.setattr(files, "read_json", lambda path: opened.append(path) or read_json(path))
    assert main([str(run), str(tmp_path / "cat")]) == 0
    assert f"wrote {tmp_path / 'cat'}, step 3" in capfd.readouterr().out
    assert there(tmp_path / "cat") == there(run / "export") and there(run) == before
    assert [path for path in opened if path.parent == run] == [run / "config.json"]  # once


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name == "e4t tuning" else []) for name in METHODS]
)
def test_every_method_writes_what_its_run_exported(name, tmp_path):
    data = dataclasses.replace(RUN.data, word="<new>" if name == "textual inversion" else "")
    if name == "e4t tuning":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), np.uint8)).save(tmp_path / "a.png")
        data = dataclasses.replace(data, source=None, path=str(tmp_path / "a.png"), word="*s", concept="same")
    train(dataclasses.replace(RUN, method=METHODS[name], data=data, ema=0.0, steps=1), tmp_path / "run")
    export.write(tmp_path / "run", tmp_path / "again")
    assert there(tmp_path / "again") == there(tmp_path / "run" / "export") != {}


def test_steps_and_weights(run, tmp_path):
    def unet(source, *more):
        path, step = export.write(source, tmp_path / "out", *more)
        return trees.digest(trees.matching(pipeline.load(path).parts["unet"], "attn2")), step

    manager = ocp.CheckpointManager((run / "checkpoints").absolute(), item_names=("state", "meta"))
    state = manager.restore(2, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]
    raw, averaged = (trees.digest(trees.flatten(state[name]["unet"])) for name in ("trained", "ema"))
    assert unet(run, 2, "raw") == unet(run / "checkpoints" / "2", None, "raw") == (raw, 2)
    assert unet(run, 2) == unet(run / "checkpoints" / "2", None, "ema") == (averaged, 2)
    assert unet(run)[1] == 3 and len({raw, averaged, unet(run)[0]}) == 3


def test_a_run_without_a_moving_average_has_raw_weights_only(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    settings = {**json.loads((run / "config.json").read_text()), "ema": 0.0}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"weights='ema': .* kept no moving average"):
        export.write(tmp_path, tmp_path / "no", weights="ema")


def test_a_damaged_checkpoint_is_passed_over_unless_it_was_asked_for(run, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "run")
    largest = max((tmp_path / "run/checkpoints/3").rglob("*"), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 4
    largest.write_bytes(data)
    assert export.write(tmp_path / "run", tmp_path / "out")[1] == 2
    said = capsys.readouterr().err
    assert "checkpoints/3: its numbers are not those that were saved" in said
    assert (tmp_path / "run/checkpoints/3").is_dir()
    with pytest.raises(ValueError, match="no checkpoint of 3 is complete"):
        export.write(tmp_path / "run", tmp_path / "no", 3)


def test_what_is_refused(run, tmp_path, capsys):
    other = tmp_path / "other"
    (other / "checkpoints").mkdir(parents=True)
    settings = json.loads((run / "config.json").read_text())
    for change, message in (
        ({"method": {"class": "os.system"}}, "method.class='os.system': accepted are .*Chain, "),
        ({"method": {"class": "Data"}}, "holds no settings of a run"),
        ({"optim": {"class": "Optim", "lr": "fast"}}, "optim.lr='fast'"),
        ({}, "other: has no checkpoint yet"),
    ):
        (other / "config.json").write_text(json.dumps({**settings, **change}))
        with pytest.raises(ValueError, match=message):
            export.write(other, tmp_path / "no")
    for arguments, message in (
        ((run, tmp_path / "no", 7), "step=7: .* there are 1, 2, 3"),
        ((run / "checkpoints" / "2", tmp_path / "no", 3), "step=3: .* is step 2"),
        ((run, tmp_path / "no", None, "best"), "weights='best': accepted are ema, raw"),
        ((tmp_path, tmp_path / "no"), "neither a run's folder nor one of its checkpoints"),
    ):
        with pytest.raises(ValueError, match=message):
            export.write(*arguments)
    assert main([str(run), str(tmp_path / "no"), "--dtype", "float16"]) == 1
    assert "accepted are step, weights, recipe, not dtype" in capsys.readouterr().err
    assert main(["pocket", str(tmp_path / "no"), "--step", "3"]) == 1
    assert "pocket: step: for a run's folder; this is none" in capsys.readouterr().err
    assert main(["random:tiny", str(tmp_path / "no"), "--vision", str(run / "config.json")]) == 1
    assert "expected a folder or hub id with an image encoder, not a file" in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_another_base_model_is_refused(tmp_path):
    """Where the model that a run began with was written over, neither an export nor the run itself goes on."""
    sd, model = pipeline.load(RUN.model), tmp_path / "model"
    pipeline.save(sd, model)
    data = dataclasses.replace(RUN.data, word="<new>")
    settings = dataclasses.replace(RUN, model=str(model), method=METHODS["textual inversion"], data=data, steps=1)
    train(settings, tmp_path / "run")
    pipeline.save(sd.with_parts(vae=jax.tree.map(jnp.zeros_like, sd.parts["vae"])), model)
    before = there(tmp_path / "run")
    with pytest.raises(ValueError, match="config.json does not match the start of the run: .* belong to base model"):
        export.write(tmp_path / "run", tmp_path / "no")
    with pytest.raises(ValueError, match="its run started from another model or picture"):
        train(dataclasses.replace(settings, steps=2), tmp_path / "run")
    assert there(tmp_path / "run") == before


def test_a_single_file_gets_its_words_beside_it_whatever_the_vocabulary(tmp_path, capsys):
    """pocket's own vocabulary has no place elsewhere, its learned word has: as a file, which is said."""
    sd = pipeline.load("pocket").add_word("*s", 1, "face")
    pipeline.save(sd, tmp_path / "cat")
    assert main([str(tmp_path / "cat"), str(tmp_path / "cat.safetensors")]) == 0
    said = capsys.readouterr().out
    path = tmp_path / "cat-s.safetensors"
    assert f"wrote {path}: the word *s as an embedding; in A1111 its word is the file name, cat-s" in said
    held, found = pipeline.load(tmp_path / "cat.safetensors"), attachable.read(path, sd).words
    assert held.words == {}
    np.testing.assert_allclose(found["*s"]["text_encoder"], sd.rows("*s")["text_encoder"], atol=1e-6)


def test_runs_of_before_keep_their_settings_of_the_drawn_world(run, tmp_path):
    """Data had count, domain, looks and named of its own."""
    settings = json.loads((run / "config.json").read_text())
    world = {"count": 8, "domain": "", "looks": False, "named": 0.0}
    del settings["data"]["source"], settings["task"], settings["preserve"]
    for path in ("pocketland", "photos"):
        old = {**settings, "data": {**settings["data"], **world, "path": path}}
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert export.read(tmp_path).data.source == (Pocketland(count=8) if path == "pocketland" else None)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "data": {**settings["data"], **world}}))
    assert export.read(tmp_path) == RUN
