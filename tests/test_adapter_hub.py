"""An adapter from the hub by its id, which only a user's own line may name."""

import pathlib

import pytest
import safetensors.torch
import torch
from adapter_files import made
from hub_server import asking
from test_lora import ATTENTION, kohya

import sdjax
from sdjax import trees
from sdjax.formats.adapters import attach
from sdjax.sampling.settings import TextToImage
from sdjax.service import maker, provenance
from sdjax.service.request import Request
from sdjax.training import begin

LORA, WORDS, EMPTY = "someone/ink", "sd-concepts-library/toy", "someone/none"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a LoRA, an embedding, and a repository with neither; yields (paths asked for, the LoRA's file)."""
    file, words = tmp_path / "ink.safetensors", tmp_path / "words.bin"
    safetensors.torch.save_file(kohya(made("sd1")[0], ATTENTION, rank=4), file)
    torch.save({"<toy>": torch.ones(1, 32)}, words)
    held = {
        LORA: {"pytorch_lora_weights.safetensors": file.read_bytes(), "model.safetensors": b"gigabytes"},
        WORDS: {"learned_embeds.bin": words.read_bytes()},
        EMPTY: {"README.md": b""},
    }
    monkeypatch.chdir(tmp_path)
    with asking(held, tmp_path / "home", monkeypatch) as asked:
        yield asked, file


def test_a_hub_id_is_its_file(hub):
    asked, file = hub
    base = made("sd1")[1]
    ours, wanted = sdjax.attach(base, LORA, 0.5), sdjax.attach(base, file, 0.5)
    assert trees.digest(ours.parts["unet"]) == trees.digest(wanted.parts["unet"]) != trees.digest(base.parts["unet"])
    assert trees.digest(attach.detach(ours, LORA).parts["unet"]) == trees.digest(base.parts["unet"])
    line = attach.attach_all(base, [f"{LORA}:0.5", WORDS])
    assert trees.digest(line.parts["unet"]) == trees.digest(wanted.parts["unet"]) and line.knows("<toy>")
    assert not any(path.endswith("/model.safetensors") for path in asked)
    assert begin._place(LORA).name == "pytorch_lora_weights.safetensors"  # init=
    with pytest.raises(ValueError, match="someone/none: no such file, and the hub's repository has no adapter"):
        sdjax.attach(base, EMPTY)


def test_a_record_names_the_repository(hub):
    made_ = TextToImage(prompt="a", model="random:tiny", adapter=(f"{LORA}:0.5",))
    names, hashes = provenance.of(made("sd1")[1], made_, {})
    assert names["adapter"] == ("ink:0.5",) and "lora ink" in hashes


def test_only_the_users_own_line_asks_the_hub(hub, tmp_path):
    """Neither a path, nor a file's name that does not exist, nor a prompt."""
    asked, base = hub[0], made("sd1")[1]
    for source in (pathlib.Path(LORA), "someone/ink.safetensors"):
        with pytest.raises(ValueError, match="no such file"):
            sdjax.attach(base, source)
    said = TextToImage(prompt=f"a <lora:{LORA}:1>", model="random:tiny", grammar="a1111", steps=1)
    with pytest.raises(ValueError, match="0 files of this name"):
        maker.Maker(tmp_path / "adapters").make([Request(said)])
    assert not asked
