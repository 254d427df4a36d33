"""cloneofsimo's numbered LoRA, against the same change of PyTorch's modules in the order of their walk."""

import copy
import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from adapter_files import assert_same, fresh, made

import sdjax
from sdjax.formats.adapters import kinds
from sdjax.formats.storage import headers

WORD = "<s1>"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def walk(model, classes):
    """Yields the linear layers inside the modules of some classes, in PyTorch's order."""
    for ancestor in model.modules():
        if type(ancestor).__name__ in classes:
            yield from (layer for layer in ancestor.modules() if isinstance(layer, torch.nn.Linear))


def write(pipe, path, classes, rank=2):
    """Writes a file of noise and adds its product to the pipeline's weights, without any scale."""
    generator, tensors, told = torch.Generator().manual_seed(0), {}, {}
    for part, chosen in classes.items():
        told[part] = json.dumps(sorted(chosen))
        for i, layer in enumerate(walk(getattr(pipe, part), chosen)):
            up = 0.2 * torch.randn(layer.out_features, rank, generator=generator)
            down = 0.2 * torch.randn(rank, layer.in_features, generator=generator)
            layer.weight.data += up @ down
            tensors |= {f"{part}:{i}:up": up, f"{part}:{i}:down": down}
            told[f"{part}:{i}:rank"] = str(rank)
    safetensors.torch.save_file(tensors, path, told)
    return tensors, told


def old_order(pipe):
    """Declares the feed-forward of every block before the second attention, as diffusers did until 0.20."""
    for block in pipe.unet.modules():
        if type(block).__name__ == "BasicTransformerBlock":
            block._modules["attn2"] = block._modules.pop("attn2")
    return pipe


UNET, TEXT = {"CrossAttention", "Attention", "GEGLU"}, {"CLIPAttention"}
CASES = {
    "new": ("sd1", {"unet": UNET, "text_encoder": TEXT}, lambda pipe: pipe),
    "old": ("sd1", {"unet": UNET, "text_encoder": TEXT}, old_order),
    "attention": ("sd1", {"unet": {"Attention"}}, lambda pipe: pipe),
    "sd2": ("sd2", {"unet": UNET}, old_order),
}


@pytest.mark.parametrize("case", CASES)
def test_numbers_are_places_in_a_walk(case, tmp_path):
    kind, classes, declared = CASES[case]
    theirs = declared(fresh(kind))
    write(theirs, tmp_path / "x.safetensors", classes)
    sd = sdjax.attach(made(kind)[1], tmp_path / "x.safetensors")
    assert_same(sd, theirs, moved=made(kind)[1])
    assert kinds.opened(tmp_path / "x.safetensors", made(kind)[1])[0].name == "kohya"


def test_a_learned_token_lies_beside(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors, told = write(copy.deepcopy(made("sd1")[0]), path, {"text_encoder": TEXT})
    safetensors.torch.save_file({**tensors, WORD: torch.ones(32)}, path, {**told, WORD: "<embed>"})
    sd = sdjax.attach(made("sd1")[1], path)
    np.testing.assert_array_equal(sd.rows(WORD)["text_encoder"], jnp.ones((1, 32)))


def test_what_does_not_fit_is_refused(tmp_path):
    path, sd = tmp_path / "x.safetensors", made("sd1")[1]
    tensors, told = write(fresh("sd1"), path, {"unet": UNET})
    headers.tell(path, {**told, "unet": json.dumps(["ResnetBlock2D"])})
    with pytest.raises(ValueError, match="x.safetensors: LoRA by position: the metadata 'unet' lists ResnetBlock2D;"):
        sdjax.attach(sd, path)
    headers.tell(path, {**told, "unet": json.dumps(["GEGLU"])})
    with pytest.raises(ValueError, match=r"tensors of unet; expected 2 for each of \d+ layers"):
        sdjax.attach(sd, path)
    safetensors.torch.save_file({**tensors, "unet:0:up": torch.ones(7, 2)}, path, told)
    with pytest.raises(ValueError, match="made for another model; misshapen"):
        sdjax.attach(sd, path)
    safetensors.torch.save_file({"vae:0:up": torch.ones(2, 2), "vae:0:down": torch.ones(2, 2)}, path, told)
    with pytest.raises(ValueError, match="tensors vae:0:up"):
        sdjax.attach(sd, path)
