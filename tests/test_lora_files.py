"""LoRA files that we write, loaded by diffusers, peft and LyCORIS; files that they write, saved again by us."""

import json

import lora_cases
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from adapter_files import assert_same, assert_same_picture, fresh, made

import sdjax
from sdjax.formats.adapters import kinds

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
# Of kohya's files diffusers leaves DoRA's magnitudes out and reads no LoHa, LoKr and OFT; LyCORIS reads all.
WRITTEN = [
    ("peft", "lora", "kohya", "diffusers"),
    ("peft", "lora", "diffusers", "diffusers"),
    ("peft", "lora", "peft", "peft"),
    ("peft", "dora", "kohya", "lycoris"),
    ("peft", "dora", "diffusers", "diffusers"),
    ("peft", "dora", "peft", "peft"),
    ("peft", "loha", "kohya", "lycoris"),
    ("peft", "loha", "peft", "peft"),
    ("lycoris", None, "kohya", "lycoris"),  # all kinds in one file
]
AGAIN = {"lora": "diffusers", "dora": "diffusers", "loha": "peft"}  # by whom a file was written, else LyCORIS


def written(library, name, kind, folder):
    """Returns (the method's joined model, the path that a kind writes); name=None: all of a library's methods."""
    case = lora_cases.case(library)
    method = case.method if name is None else lora_cases.METHODS[library][name]
    trained = case.joint if name is None else case.trained[name]
    adapter = method.adapter(case.frozen, trained)
    assert kinds.known()[kind].holds(adapter)
    return method.join(case.frozen, trained).fold(), kinds.known()[kind].write(adapter, folder)


def by_diffusers(theirs, path):
    theirs.load_lora_weights(path.parent, weight_name=path.name)


def by_peft(theirs, path):
    for part in lora_cases.PARTS:
        if (path.parents[1] / part).is_dir():
            model = peft.PeftModel.from_pretrained(getattr(theirs, part), path.parents[1] / part)
            setattr(theirs, part, model.merge_and_unload())


def by_lycoris(theirs, path):
    """LyCORIS' networks of a file's tensors, and of LoKr's by their factor.

    Of LoKr it guesses the factor from shapes, and takes the sides of a convolution's kernel for inputs: it loads no
    such layer of its own files either.
    """
    state, theirs.kept = safetensors.torch.load_file(path), []  # networks, which layers call
    guessed = lora_cases.network_of(theirs.unet, {"lokr": lora_cases.LYCORIS["lokr"]})
    lokr = {key.split(".")[0] for key in spelled(state, "unet") if ".lokr" in key} & dict(
        guessed.named_children()
    ).keys()
    own = {key: x for key, x in spelled(state, "unet").items() if key.split(".")[0] in lokr}
    if own:
        guessed.load_state_dict(own)
        apply(theirs, guessed)
    for part in lora_cases.PARTS:
        from lycoris import create_lycoris_from_weights

        rest = {key: x for key, x in spelled(state, part).items() if key not in own}
        if rest:
            network, _ = create_lycoris_from_weights(1.0, "", getattr(theirs, part), rest)
            assert len(network.loras) == len({key.split(".")[0] for key in rest})
            apply(theirs, network)


def spelled(state, part):
    """Returns a part's tensors with LyCORIS' names of modules."""
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_text_model_"}[part]
    return {key.replace(prefix, "lycoris_"): x for key, x in state.items() if key.startswith(prefix)}


def apply(theirs, network):
    network.apply_to()
    network.eval()
    theirs.kept.append(network)


LOADERS = {"diffusers": by_diffusers, "peft": by_peft, "lycoris": by_lycoris}


@pytest.mark.parametrize(("library", "name", "kind", "reader"), WRITTEN)
def test_other_libraries_load_what_we_write(library, name, kind, reader, tmp_path):
    """The same context, prediction and picture, by their layers and by our folded weights; and read again by us."""
    sd, path = written(library, name, kind, tmp_path)
    theirs, base = fresh("sd1"), made("sd1")[1]
    LOADERS[reader](theirs, path)
    assert_same(sd, theirs, moved=base)
    assert_same_picture(sd, theirs)
    folders = [path.parents[1] / part for part in lora_cases.PARTS] if kind == "peft" else [path]
    again = base
    for folder in folders:
        again = sdjax.attach(again, folder) if folder.exists() else again
    assert_same(again, theirs, moved=base)


@pytest.mark.parametrize("name", [*lora_cases.PEFT, None])
def test_files_of_other_libraries_are_saved_with_equal_tensors(name, tmp_path):
    path = lora_cases.case("peft").files[name] if name else lora_cases.case("lycoris").files["lora"]
    kind = kinds.known()[AGAIN.get(name, "kohya")]
    _, adapter = kinds.opened(path, made("sd1")[1])
    theirs = safetensors.torch.load_file(path)
    ours = safetensors.torch.load_file(kind.write(adapter, tmp_path))
    theirs = {key.replace("lycoris_", "lora_unet_"): x for key, x in theirs.items()}
    for old, new in (("lora.", "lora_"), ("lora_linear_layer.", "lora_")):  # diffusers mixes them, which it cannot load
        theirs = {key.replace(f"{old}down", f"{new}A").replace(f"{old}up", f"{new}B"): x for key, x in theirs.items()}
    # transformers before 5.6 has "text_model"; it loads no magnitudes of a text encoder as diffusers names them
    ours = {key.replace("text_model.", "").replace("vector.weight", "vector"): x for key, x in ours.items()}
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert tensor.shape == ours[key].shape and tensor.dtype == ours[key].dtype and torch.equal(tensor, ours[key])


def test_headers_tell_the_network(tmp_path):
    for library, name, wanted in [
        ("peft", "lora", {"module": "networks.lora", "dim": "4", "alpha": "6", "args": {}}),
        ("lycoris", "lokr", {"module": "lycoris.kohya", "dim": "2", "args": {"algo": "lokr", "dora_wd": "False"}}),
        ("peft", "dora", {"module": "lycoris.kohya", "dim": "4", "args": {"algo": "lora", "dora_wd": "True"}}),
    ]:
        adapter = lora_cases.METHODS[library][name].adapter(
            lora_cases.case(library).frozen, lora_cases.case(library).trained[name]
        )
        path = kinds.known()["kohya"].write(adapter, tmp_path)
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata()
        for key, value in wanted.items():
            held = header[f"ss_network_{key}"]
            assert (json.loads(held) if key == "args" else held) == value
    assert np.isfinite(float(header["ss_network_alpha"]))
