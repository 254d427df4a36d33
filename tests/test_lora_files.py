"""LoRA files that we write, loaded by diffusers, peft and LyCORIS; files that they write, saved again by us."""

import json

import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from adapter_files import assert_same, assert_same_picture, fresh, made
from test_lora_method import METHODS, case

import sdjax
from sdjax.formats.adapters import format as kinds

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
# LyCORIS guesses a LoKr's factor from its shapes, wrongly where conv_in's sizes split unevenly, in its own files too.
LOADED = ("lycoris lora", "lycoris loha", "lycoris lokr, factor", "lycoris oft")
WRITTEN = [("lora", "kohya"), ("lora", "diffusers"), ("lora", "peft")]  # diffusers leaves DoRA's magnitudes out
WRITTEN += [("dora", "peft"), ("loha", "peft"), *((name, "kohya") for name in METHODS if name in LOADED)]
AGAIN = {"lora": "diffusers", "dora": "diffusers", "loha": "peft"}  # by whom a file was written, else LyCORIS


def written(name, kind, folder):
    """Returns (the method's joined model, the path that a kind writes)."""
    _, _, method, trained, frozen, _ = case(name)
    adapter = method.adapter(frozen, trained)
    assert kinds.known()[kind].holds(adapter)
    return method.join(frozen, trained).fold(), kinds.known()[kind].write(adapter, folder)


def loaded(name, kind, path):
    """Returns a fresh pipeline of diffusers with a file, as the library of its kind loads it."""
    theirs = fresh("sd1")
    if name.startswith("lycoris"):
        from lycoris import create_lycoris_from_weights

        state = safetensors.torch.load_file(path)
        state = {key.replace("lora_unet_", "lycoris_"): x for key, x in state.items()}
        network, _ = create_lycoris_from_weights(1.0, "", theirs.unet, state)
        assert len(network.loras) == len({key.split(".")[0] for key in state})
        network.apply_to()
        network.eval()
        theirs.kept = network  # its layers call it
    elif kind == "peft":
        for part in ("unet", "text_encoder"):
            if (path.parents[1] / part).is_dir():
                model = peft.PeftModel.from_pretrained(getattr(theirs, part), path.parents[1] / part)
                setattr(theirs, part, model.merge_and_unload())
    else:
        theirs.load_lora_weights(path.parent, weight_name=path.name)
    return theirs


@pytest.mark.parametrize(("name", "kind"), WRITTEN)
def test_other_libraries_load_what_we_write(name, kind, tmp_path):
    """The same context, prediction and picture, by their layers and by our folded weights; and read again by us."""
    sd, path = written(name, kind, tmp_path)
    theirs, base = loaded(name, kind, path), made("sd1")[1]
    assert_same(sd, theirs, moved=base)
    assert_same_picture(sd, theirs)
    folders = [path.parents[1] / part for part in ("unet", "text_encoder")] if kind == "peft" else [path]
    again = base
    for folder in folders:
        again = sdjax.attach(again, folder) if folder.exists() else again
    assert_same(again, theirs, moved=base)


@pytest.mark.parametrize("name", METHODS)
def test_files_of_other_libraries_are_saved_with_equal_tensors(name, tmp_path):
    path, kind = case(name)[-1], kinds.known()[AGAIN.get(name, "kohya")]
    _, adapter = kinds.opened(path, made("sd1")[1])
    theirs = safetensors.torch.load_file(path)
    ours = safetensors.torch.load_file(kind.write(adapter, tmp_path))
    theirs = {key.replace("lycoris_", "lora_unet_"): x for key, x in theirs.items()}
    for old, new in (("lora.", "lora_"), ("lora_linear_layer.", "lora_")):  # diffusers mixes them, which it cannot load
        theirs = {key.replace(f"{old}down", f"{new}A").replace(f"{old}up", f"{new}B"): x for key, x in theirs.items()}
    ours = {key.replace("text_model.", ""): x for key, x in ours.items()}  # transformers before 5.6 has it
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.shape == ours[key].shape and tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key])


def test_headers_tell_the_network(tmp_path):
    for name, wanted in {
        "lora": {"module": "networks.lora", "dim": "4", "alpha": "6", "args": {}},
        "lycoris lokr": {"module": "lycoris.kohya", "dim": "2", "args": {"algo": "lokr", "dora_wd": "False"}},
        "dora": {"module": "lycoris.kohya", "dim": "4", "args": {"algo": "lora", "dora_wd": "True"}},
    }.items():
        _, path = written(name, "kohya", tmp_path)
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata()
        for key, value in wanted.items():
            held = header[f"ss_network_{key}"]
            assert (json.loads(held) if key == "args" else held) == value
    assert np.isfinite(float(header["ss_network_alpha"]))
