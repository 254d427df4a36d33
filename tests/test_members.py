"""A new member of a kind is one new file, found by walking its package; a method with a new kind of file is two."""

import dataclasses
import hashlib
import importlib
import json
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

import sdjax.data.sources
import sdjax.formats.adapters
import sdjax.methods
import sdjax.settings
import sdjax.tasks
from sdjax import convert
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.formats.adapters import kinds
from sdjax.methods.chain import Chain
from sdjax.methods.method import Method
from sdjax.service import programs, records
from sdjax.training import begin, export
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.settings import Train

DATA = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8))
LOSS = """
    def loss(self, frozen, trained, batch, key, step, axis=None):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(trained)), {}
"""  # quick to compile
ROWS = f"""
from dataclasses import dataclass
import jax, jax.numpy as jnp, numpy as np
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about

@dataclass(frozen=True)
class Rows(Method):
    word: str = "<rows>"
    formats = ("embedding",)

    @property
    def words(self):
        return (self.word,)

    def split(self, sd, key=None):
        sd = sd.add_word(self.word)
        return {{"rows": sd.rows(self.word)}}, sd

    def join(self, frozen, trained, key=None):
        return frozen.with_rows(frozen.words[self.word], trained["rows"])

    def adapter(self, frozen, trained):
        return Adapter(words={{self.word: jax.tree.map(np.asarray, trained["rows"])}}, about=about(self))
{LOSS}"""
BIAS = f"""
from dataclasses import dataclass
import jax, jax.numpy as jnp
from sdjax import trees
from sdjax.methods.adapter import Adapter
from sdjax.methods.method import Method, about

@dataclass(frozen=True)
class Bias(Method):
    formats = ("bias",)

    def split(self, sd, key=None):
        trained, rest = trees.partition(sd.parts["unet"], r"^conv_in\\.bias$")
        start = trees.copy(trained["conv_in"]["bias"], jnp.float32)
        return trees.copy(trained, jnp.float32), sd.with_parts(unet=rest).with_own(bias=start)

    def join(self, frozen, trained, key=None):
        return frozen.with_parts(unet=trees.merge(frozen.parts["unet"], trained))

    def adapter(self, frozen, trained):
        shift = trained["conv_in"]["bias"] - frozen.reference.own["bias"]
        return Adapter(edits={{"unet": {{"conv_in.bias": shift}}}}, about=about(self))
{LOSS.replace("x**2", "x")}"""
BIAS_FILE = """
from dataclasses import dataclass
from typing import Any
import jax, numpy as np, jax.numpy as jnp
from sdjax import trees
from sdjax.formats.adapters.format import Format
from sdjax.methods.adapter import Adapter

@jax.tree_util.register_dataclass
@dataclass
class Shift:
    by: Any

    def change(self, weight):
        return weight + self.by - weight

class BiasFile(Format):
    name, called, tags, suffixes = "bias", "bias", ("bias", "b"), (".npy",)

    def matches(self, file):
        return file.path.suffix == ".npy"

    def read(self, file, sd):
        return Adapter(edits={"unet": {"conv_in.bias": Shift(np.load(file.path))}})

    def holds(self, adapter):
        return list(adapter.edits.get("unet", ())) == ["conv_in.bias"]

    def write(self, adapter, folder, about=None):
        np.save(folder / "shift.npy", np.asarray(adapter.edits["unet"]["conv_in.bias"]))
        return folder / "shift.npy"

    def start(self, adapter, method, trained, frozen):
        (edit,) = adapter.edits["unet"].values()
        return jax.tree.map(lambda bias: bias + edit.by, trained), frozen
"""


@pytest.fixture
def add(tmp_path, monkeypatch):
    """Returns add(package, name, text), which puts a file into a package for the time of a test."""

    def put(package, name, text):
        folder = tmp_path / package.__name__
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
        monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
        monkeypatch.setitem(sys.modules, f"{package.__name__}.{name}", None)
        monkeypatch.delitem(sys.modules, f"{package.__name__}.{name}")
        importlib.invalidate_caches()
        return importlib.import_module(f"{package.__name__}.{name}")

    return put


def run(method, **more):
    return Train(
        model="random:tiny", method=method, data=DATA, optim=Optim(lr=1e-2), **{"steps": 1, "checkpoint": 1} | more
    )


def test_a_method_of_a_known_kind_of_file_is_one_file(add, tmp_path, capsys):
    Rows = add(sdjax.methods, "rows", ROWS).Rows
    train(run(Rows()), tmp_path / "out")
    assert "pipe.load_textual_inversion" in capsys.readouterr().out
    held = safetensors.numpy.load_file(tmp_path / "out" / "export" / "learned_embeds.safetensors")
    assert held["<rows>"].shape == (1, 32)
    assert export.read(tmp_path / "out").method == Rows()
    path, step = export.write(tmp_path / "out", tmp_path / "again")
    assert step == 1 and path.read_bytes() == (tmp_path / "out/export/learned_embeds.safetensors").read_bytes()
    again, *_ = begin.begin(run(Rows("<other>"), init=str(path)), pictures=False)
    np.testing.assert_array_equal(again["rows"]["text_encoder"], held["<rows>"])


@pytest.fixture
def shift(add, tmp_path, monkeypatch):
    """Returns (method, file): a run with a method of one file, which is written in a kind of another."""
    method = add(sdjax.methods, "bias", BIAS).Bias()
    add(sdjax.formats.adapters, "bias_file", BIAS_FILE)
    monkeypatch.setattr(kinds, "tags", kinds.tags.__wrapped__)  # a process finds its formats once
    train(run(method), tmp_path / "out")
    return method, tmp_path / "out" / "export" / "shift.npy"


def bias(sd):
    return np.asarray(sd.parts["unet"]["conv_in"]["bias"])


def test_a_kind_of_file_is_one_file(shift, tmp_path):
    """It is written, attached, detached, converted and started from; nothing else of the package names it."""
    (method, path), base = shift, pipeline.load("random:tiny")
    held = np.load(path)
    assert np.abs(held).min() > 1e-3
    half = sdjax.attach(base, path, 0.5)
    np.testing.assert_allclose(bias(half), bias(base) + 0.5 * held, rtol=1e-6)
    assert bias(sdjax.detach(half, path)).tobytes() == bias(base).tobytes()
    again, *_ = begin.begin(run(method, init=str(path)), pictures=False)
    np.testing.assert_allclose(again["conv_in"]["bias"], bias(base) + held, rtol=1e-6)
    assert convert.main([str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    np.testing.assert_array_equal(np.load(tmp_path / "again" / "shift.npy"), held)


def test_programs_and_prompts_know_a_new_kind_of_file(shift, tmp_path, capsys):
    (_, path), here = shift, tmp_path / "adapters"
    (here / "deep").mkdir(parents=True)
    path.rename(here / "deep" / "dark.npy")
    (here / "dark.png").write_bytes(b"a preview")

    def drawn(out, prompt, *more):
        given = ["--model", "random:tiny", "--steps", "1", "--size", "16", "--adapters", str(here), "--prompt", prompt]
        assert programs.main("text2img", "", [*given, "--out", str(tmp_path / out), *more]) == 0
        picture = tmp_path / out / "00000-0.png"
        return np.asarray(Image.open(picture)), records.read(picture)

    plain, _ = drawn("plain", "a cat")
    named, record = drawn("named", "a <b:dark:40>cat")
    given, other = drawn("given", "a cat", "--adapter", f"{here / 'deep/dark.npy'}:40")
    assert np.array_equal(named, given) and not np.array_equal(named, plain)
    assert record.hashes == other.hashes == {"bias dark": hashlib.sha256(np_bytes(here)).hexdigest()[:12]}
    assert records.parse(records.text(record)).hashes == record.hashes
    assert "Bias hashes: " in records.text(record)
    given = ["--model", "random:tiny", "--adapters", str(here), "--out", str(tmp_path / "bad")]
    assert programs.main("text2img", "", [*given, "--prompt", "a <lora:dark>cat"]) == 1
    assert "of the kind bias" in capsys.readouterr().err
    assert programs.main("text2img", "", [*given, "--prompt", "a <c:dark>cat"]) == 1
    assert "expected <bias:name:strength> or <hypernet:name:strength> or <lora" in capsys.readouterr().err


def np_bytes(folder):
    return (folder / "deep" / "dark.npy").read_bytes()


def test_a_source_is_one_file_with_settings_of_its_own(add, tmp_path):
    add(sdjax.data.sources, "grey", """
from dataclasses import dataclass
import numpy as np
from sdjax.data.sources.source import Examples, Source

@dataclass(frozen=True)
class Grey(Source):
    \"\"\"Grey squares.

    level: how bright.
    \"\"\"

    level: int = 128

    def matches(self, path):
        return path == "grey"

    def open(self, data):
        return Squares(self.level, data.word)

class Squares(Examples):
    def __init__(self, level, word):
        self.level, self.word = level, word

    def __len__(self):
        return 3

    def shape(self, i):
        return 64, 64

    def picture(self, i, size):
        return np.full((size, size, 3), self.level, np.uint8)

    def caption(self, i, random):
        return f"a grey {self.word}"

    def other(self, i, random):
        return (i + 1) % 3

    def fingerprint(self):
        return ["grey", self.level]

    def about(self):
        return "3 grey squares"
""")  # fmt: skip
    from sdjax.data import batches

    settings = sdjax.settings.override(
        run(Chain()), ["data.path=grey", "data.source=None", "data.level=255", "data.encode=False"]
    )
    assert settings.data.source.level == 255
    batch = batches.build(settings.data, pipeline.load("random:tiny"), 0)[0]
    assert batch["pixels"].shape == (2, 32, 32, 3) and (batch["pixels"] == 1).all()
    with pytest.raises(ValueError, match="data.levle: Data has no 'levle'; did you mean 'level'"):
        sdjax.settings.override(settings, ["data.levle=3"])
    (tmp_path / "recipe.py").write_text(
        "from sdjax.data.batches import Data\nfrom sdjax.training.settings import Train\n\n\n"
        "def config():\n    return Train(data=Data(path='grey'))\n"
    )
    assert "data.level = 128" in sdjax.settings.describe(tmp_path / "recipe.py")
    data = json.loads(json.dumps(sdjax.settings.to_json(settings)))["data"]
    assert data["source"] == {"class": "Grey", "level": 255}


SAMPLER = """
from sdjax.diffusion.samplers.row import M, Row, X
from sdjax.diffusion.samplers.sampler import Sampler

def rows(path, eta):
    for i, here, there in path.moves():
        x = X / here.a
        yield Row(here, i, there.a * (x + (there.sigma - here.sigma) * (x - M[0]) / here.sigma))

MINE = Sampler("mine", "My Euler", rows, "sigmas", automatic="normal")
"""
PROGRAM = """
import sys
import sdjax.diffusion.samplers
sdjax.diffusion.samplers.__path__.append(sys.argv[1])
from sdjax.service import programs
sys.exit(programs.main("text2img", "", sys.argv[2:]) or programs.main("text2img", "", ["--help"]))
"""


def test_a_sampler_is_one_file(tmp_path):
    """By its own name and A1111's word in programs, help and records; settings are declared once a process."""
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "mine.py").write_text(SAMPLER)
    drawn = ["--model", "random:tiny", "--prompt", "a cat", "--steps", "2", "--size", "16", "--out"]
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "new"), *drawn, str(tmp_path / "out")]
    done = subprocess.run([*command, "--sampler", "My Euler"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "lms, mine, pndm" in " ".join(done.stdout.split())
    assert b"Sampler: My Euler" in (tmp_path / "out" / "00000-0.png").read_bytes()
    assert programs.main("text2img", "", [*drawn, str(tmp_path / "euler"), "--sampler", "euler"]) == 0
    one, other = (np.asarray(Image.open(tmp_path / folder / "00000-0.png")) for folder in ("out", "euler"))
    np.testing.assert_array_equal(one, other)


def test_a_task_is_one_file(add):
    add(sdjax.tasks, "echo", """
from sdjax.tasks.text2img import TextToImage

class Echo(TextToImage):
    name = "echo"

    def matches(self, sd):
        return False
""")  # fmt: skip
    sd = pipeline.load("random:tiny")
    assert sdjax.tasks.of(sd, "echo").name == "echo" and sdjax.tasks.of(sd).name == "text2img"
    with pytest.raises(ValueError, match="task='sing': expected one of echo, inpainting, text2img, upscaling"):
        sdjax.tasks.of(sd, "sing")


def test_a_chain_forwards_every_member_of_the_contract():
    """A member that Method gets and Chain does not pass on would be lost without a word."""
    members = {name for name in vars(Method) if not name.startswith("_")}
    own = {name for name in vars(Chain) if not name.startswith("_")}
    refused = {"loss", "preview"}  # parts that have them train alone
    assert members - own == refused
    for name in refused:
        part = dataclasses.make_dataclass("Part", [], bases=(Method,), namespace={name: lambda self, *_: None})
        with pytest.raises(ValueError, match=f"Part has a {name} of its own; it trains alone"):
            Chain((part(),))


def test_kinds_of_file_are_those_that_methods_name():
    named = {name for method in sdjax.methods.known().values() if method is not Chain for name in method.formats}
    assert named <= set(kinds.known())
