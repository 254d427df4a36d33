"""Weights are read lazily and strictly, written whole or not at all; models come from a hub through its own client."""

import json
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import diffusers
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hub_server import serving

from sdjax.formats.storage import files
from sdjax.formats.storage.files import Tensor

STEM, DIFFUSION = "model", "diffusion_pytorch_model"
RNG = np.random.default_rng(0)
ARRAYS = {
    "b.weight": RNG.standard_normal((3, 5)).astype(np.float32),
    "a": RNG.standard_normal((7,)).astype(np.float16),
    "c.scalar": np.float32(3.5).reshape(()),
    "d": RNG.standard_normal((2, 3)).astype(ml_dtypes.bfloat16),
}


def tensors(arrays=None):
    arrays = ARRAYS if arrays is None else arrays
    return {name: Tensor(array.shape, array.dtype, lambda array=array: array) for name, array in arrays.items()}


def same(weights, arrays=None):
    arrays = ARRAYS if arrays is None else arrays
    assert set(weights.names) == set(arrays)
    for name, array in arrays.items():
        assert weights.shape(name) == array.shape and weights.read(name).dtype == array.dtype
        np.testing.assert_array_equal(weights.read(name), array)


def one_line(error, *words):
    text = str(error.value)
    assert "\n" not in text and all(str(word) in text for word in words), text


def test_what_is_written_is_read_by_the_safetensors_library(tmp_path):
    files.write_weights(tmp_path, STEM, tensors())
    read = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    assert read.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)
    same(files.open_weights(tmp_path, STEM))


@pytest.mark.parametrize("size", [1, 20, 75, 10**6])
def test_shards(tmp_path, size):
    files.write_weights(tmp_path, STEM, tensors(), shard_size=size)
    same(files.open_weights(tmp_path, STEM))
    shards = len(list(tmp_path.glob("*.safetensors")))
    assert shards == {1: 4, 20: 3, 75: 2, 10**6: 1}[size]
    assert (tmp_path / "model.safetensors.index.json").exists() == (shards > 1)


def test_variants(tmp_path):
    half = {name: array.astype(np.float16) for name, array in ARRAYS.items()}
    files.write_safetensors(tmp_path / "model.fp16.safetensors", tensors(half), {})
    same(files.open_weights(tmp_path, STEM), half)
    files.write_weights(tmp_path, STEM, tensors())
    same(files.open_weights(tmp_path, STEM))
    same(files.open_weights(tmp_path, STEM, "fp16"), half)
    with pytest.raises(ValueError) as error:
        files.open_weights(tmp_path, STEM, "bf16")
    one_line(error, "model.bf16.safetensors", "no such file")


def test_bad_files_are_refused_by_name(tmp_path):
    path = tmp_path / "model.safetensors"
    files.write_weights(tmp_path, STEM, tensors())
    good = path.read_bytes()
    for bad in [
        good[:-3],
        good[:40],
        b"",
        b"a text that is no model",
        struct.pack("<Q", 10**12) + good[8:],
        good + b"more",
    ]:
        path.write_bytes(bad)
        with pytest.raises(ValueError) as error:
            files.open_weights(tmp_path, STEM)
        one_line(error, path)
    path.unlink()
    with pytest.raises(ValueError) as error:
        files.open_weights(tmp_path, STEM)
    one_line(error, path, "no such file")
    with pytest.raises(ValueError) as error:
        files.open_weights(tmp_path / "none", STEM)
    one_line(error, tmp_path / "none", "no such folder")


def test_an_index_cannot_lead_elsewhere(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    files.write_weights(tmp_path, "model-00001-of-00001", tensors())
    index = inside / "model.safetensors.index.json"
    elsewhere = ["../model-00001-of-00001.safetensors", str(tmp_path / "model-00001-of-00001.safetensors"), "..", 3]
    for shard in [*elsewhere, "sub/model.safetensors", "..\\model.safetensors", "gone.safetensors"]:
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError) as error:
            files.open_weights(inside, STEM)
        one_line(error, inside)
    for content in ["", "[]", "{}", '{"weight_map": 3}', "[" * 100_000]:
        index.write_text(content)
        with pytest.raises(ValueError) as error:
            files.open_weights(inside, STEM)
        one_line(error, index)


# ---- pickled weights -----------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("marked",)


@pytest.fixture
def pickled(tmp_path, monkeypatch):
    """A folder of diffusers' with pickled weights in one file, one in shards, and their weights."""
    monkeypatch.chdir(tmp_path)
    model = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    model.save_pretrained(tmp_path / "one", safe_serialization=False)
    model.save_pretrained(tmp_path / "shards", safe_serialization=False, max_shard_size="40KB")
    return tmp_path, {name: value.numpy() for name, value in model.state_dict().items()}


def test_pickled_weights_are_read_where_there_are_no_others(pickled):
    folder, state = pickled
    same(files.open_weights(folder / "one", DIFFUSION), state)
    assert len(list((folder / "shards").glob("*.bin"))) > 1
    same(files.open_weights(folder / "shards", DIFFUSION), state)
    (folder / "one" / f"{DIFFUSION}.bin").rename(folder / "one" / "pytorch_model.fp16.bin")
    same(files.open_weights(folder / "one", STEM), state)  # as transformers calls them
    files.write_weights(folder / "shards", DIFFUSION, tensors())
    same(files.open_weights(folder / "shards", DIFFUSION))


@pytest.mark.parametrize("kind", ["one", "shards"])
def test_an_attack_in_pickled_weights_is_an_error(pickled, kind):
    folder, state = pickled
    path = sorted((folder / kind).glob("*.bin"))[0]
    torch.save({"conv": torch.zeros(2), "evil": Evil()}, path)
    with pytest.raises(ValueError) as error:
        files.open_weights(folder / kind, DIFFUSION)
    one_line(error, path, "mkdir", "not among the names")
    assert not (folder / "marked").exists()
    torch.save([torch.zeros(2)], path)
    with pytest.raises(ValueError) as error:
        files.open_weights(folder / kind, DIFFUSION)
    one_line(error, path, "no weights by name")
    path.write_bytes(b"pickle")
    with pytest.raises(ValueError) as error:
        files.open_weights(folder / kind, DIFFUSION)
    one_line(error, path)


def test_an_index_that_promises_too_much(tmp_path):
    files.write_weights(tmp_path, STEM, tensors(), shard_size=60)
    index = tmp_path / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["more"] = content["weight_map"]["a"]
    index.write_text(json.dumps(content))
    with pytest.raises(ValueError) as error:
        files.open_weights(tmp_path, STEM)
    one_line(error, index, "more")


def test_new_file(tmp_path):
    path = tmp_path / "deep" / "file"
    with files.new_file(path) as temporary:
        temporary.write_text("one")
    assert path.read_text() == "one"
    with pytest.raises(RuntimeError), files.new_file(path) as temporary:
        temporary.write_text("two")
        raise RuntimeError
    assert path.read_text() == "one" and [entry.name for entry in path.parent.iterdir()] == ["file"]


def write(folder, text, **options):
    with files.new_folder(folder, "mark", ("mark", "part"), **options) as temporary:
        (temporary / "part").mkdir()
        (temporary / "part" / "weights").write_text(text)
        (temporary / "mark").write_text(text)


def test_new_folder_replaces_parts_and_keeps_the_rest(tmp_path):
    folder = tmp_path / "model"
    write(folder, "one")
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("mine too")
    (folder / "part" / "stale").write_text("of the old part")
    (folder / "link").symlink_to("nowhere")
    write(folder, "two")
    assert (folder / "part" / "weights").read_text() == "two" and not (folder / "part" / "stale").exists()
    assert (folder / "README.md").read_text() == "mine" and (folder / "notes" / "a.txt").read_text() == "mine too"
    assert (folder / "link").is_symlink() and [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_new_folder_without_the_exchange_of_linux(tmp_path, monkeypatch):
    monkeypatch.setattr(files.ctypes, "CDLL", lambda name: object())
    write(tmp_path / "model", "one")
    write(tmp_path / "model", "two")
    assert (tmp_path / "model" / "mark").read_text() == "two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_new_folder_follows_a_link(tmp_path):
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "mark").read_text() == "two"


def test_new_folder_changes_nothing_on_failure(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    write(folder, "one")
    with pytest.raises(KeyboardInterrupt), files.new_folder(folder, "mark") as temporary:
        (temporary / "mark").write_text("two")
        raise KeyboardInterrupt
    with pytest.raises(ValueError) as error, files.new_folder(folder, "mark"):
        raise OSError(28, "No space left on device")
    one_line(error, folder, "No space left")
    with pytest.raises(ValueError) as error:
        write(folder, "two", size=10**18)
    one_line(error, folder, "GB free")
    assert (folder / "mark").read_text() == "one" and [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_new_folder_does_not_replace_what_is_no_model(tmp_path):
    for name, content in [("photos", "a.png"), ("file", None)]:
        path = tmp_path / name
        if content:
            path.mkdir()
            (path / content).write_text("precious")
        else:
            path.write_text("precious")
        with pytest.raises(ValueError) as error:
            write(path, "two")
        one_line(error, path)
        assert (path / content if content else path).read_text() == "precious"
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "one")


SLOW_SAVE = """
import sys, time, pathlib
from sdjax.convert import files
with files.new_folder(sys.argv[1], "mark", ("mark",)) as temporary:
    for i in range(1000):
        (temporary / f"{i}").write_text("two" * 1000)
        if i == 20:
            print("writing", flush=True)
        time.sleep(0.001)
    (temporary / "mark").write_text("two")
"""


@pytest.mark.parametrize("wait", [0.0, 0.1])
def test_kill_while_saving_leaves_the_old_folder(tmp_path, wait):
    folder = tmp_path / "model"
    write(folder, "one")
    with subprocess.Popen([sys.executable, "-c", SLOW_SAVE, folder], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "writing\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
    assert (folder / "mark").read_text() == "one" and (folder / "part" / "weights").read_text() == "one"
    assert len(list(tmp_path.iterdir())) == 2  # the remains, which the next save removes
    write(folder, "three")
    assert (folder / "mark").read_text() == "three" and [entry.name for entry in tmp_path.iterdir()] == ["model"]


def test_tensors_of_other_types_are_refused():
    with pytest.raises(ValueError, match="int32"):
        Tensor((2,), "int32", None)


# ---- hub ---------------------------------------------------------------------------------------

HUB = {"unet/diffusion_pytorch_model.safetensors": b"weights", "model_index.json": b"{}", "big.ckpt": b"pickle"}
FETCH = """
import sys
from sdjax.convert import pipeline
try:
    print(pipeline.locate(sys.argv[1]))
except ValueError as error:
    print("error:", error)
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Returns (a function that fetches an id in another process, the paths that the hub was asked for)."""
    with serving({"someone/model": HUB}, tmp_path_factory.mktemp("hub")) as (env, asked):

        def fetch(source, **more):
            settings = {**os.environ, **env, **more}
            run = subprocess.run([sys.executable, "-c", FETCH, source], capture_output=True, text=True, env=settings)
            assert run.returncode == 0, run.stderr
            return run.stdout.strip()

        yield fetch, asked


def test_hub_ids_are_fetched_once_and_found_offline(hub):
    fetch, asked = hub
    folder = fetch("someone/model")
    assert pathlib.Path(folder, "unet", "diffusion_pytorch_model.safetensors").read_bytes() == b"weights"
    assert not os.path.exists(f"{folder}/big.ckpt") and not any("big.ckpt" in path for path in asked)
    asked.clear()
    assert fetch("someone/model", HF_HUB_OFFLINE="1") == folder and not asked


def test_hub_ids_that_nobody_has(hub):
    fetch, _ = hub
    message = fetch("someone/else")
    assert message.startswith("error: model 'someone/else': no such folder, and not from the hub:"), message
    assert "\n" not in message
    message = fetch("someone/else", HF_HUB_OFFLINE="1")
    assert message.startswith("error: model 'someone/else'") and "\n" not in message


def test_paths_never_go_to_the_hub(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # importing it would fail
    (tmp_path / "file").write_text("")
    for source in ["./none", "../none", "/none/such", "none", "a/b/c", "a b/c", str(tmp_path / "file"), "-a/b"]:
        with pytest.raises(ValueError) as error:
            files.locate(source, [["*"]], lambda folder: True)
        one_line(error, source)
