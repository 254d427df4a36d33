"""LoRA files in every layout, as diffusers, peft and torch.save write them, against diffusers with that file loaded."""

import json
import re
from collections import Counter

import diffusers
import numpy as np
import peft
import pytest
import safetensors.torch
import torch
from adapter_files import assert_same, fresh, made
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_state_dict_to_diffusers
from flax.core import FrozenDict
from peft.utils import get_peft_model_state_dict

import sdjax
from sdjax import trees
from sdjax.families.sd import Sd
from sdjax.formats.adapters import lora_names
from sdjax.formats.models import presets
from sdjax.formats.storage import hashes
from sdjax.models.clip import TextConfig, TextEncoder
from sdjax.models.unet import UNet, UNetConfig
from sdjax.service import provenance

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
WIDE = (
    *ATTENTION,
    "proj_in",
    "proj_out",
    "ff.net.0.proj",
    "ff.net.2",
    "conv1",
    "conv2",
    "conv_shortcut",
    "time_emb_proj",
)
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
FEW = ["to_k", "proj_in", "ff.net.2", "conv2"]
KEY = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # [32 32]
CONV = "down_blocks.0.resnets.0.conv1"  # [32 32 3 3]
WIDER = "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj"  # [256 32]

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def modules(model, targets):
    """Returns {name: layer} of the linear layers and convolutions whose name ends as one of the targets."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if name.endswith(targets) and isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)
    }


def factors(layer, rank, generator):
    """Returns (down, up) of noise in kohya's shapes."""
    weight = layer.weight
    down = torch.randn((rank, *weight.shape[1:]), generator=generator) * 0.1
    up = torch.randn((weight.shape[0], rank, *[1] * (weight.ndim - 2)), generator=generator)
    return down, up


def kohya(pipe, targets=WIDE, rank=3, alpha=2.0, flat=lambda name: name.replace(".", "_")):
    """Returns a file of sd-scripts for UNet and text encoder: {name: tensor}."""
    generator, made = torch.Generator().manual_seed(0), {}
    layers = {f"lora_unet_{flat(name)}": layer for name, layer in modules(pipe.unet, targets).items()}
    for name, layer in modules(pipe.text_encoder, (*TEXT, "fc1", "fc2")).items():
        layers[f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"] = layer
    for name, layer in layers.items():
        made[f"{name}.lora_down.weight"], made[f"{name}.lora_up.weight"] = factors(layer, rank, generator)
        if alpha is not None:
            made[f"{name}.alpha"] = torch.tensor(alpha)
    return made


def save(tensors, path, metadata=None):
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    safetensors.torch.save_file(tensors, path, metadata or {"format": "pt"})
    return path


def noised(model, seed=0):
    """Fills the factors of a model of peft's with noise, those that start as zero included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            size = 0.1 if "lora_B" in name else 0.4 if "hada_" in name or "lokr_" in name else 0
            weight.add_(size * torch.randn(weight.shape, generator=generator))
            if "magnitude" in name:
                weight.mul_(1 + 0.3 * torch.randn(weight.shape, generator=generator))
    return model


def by_diffusers(pipe, folder, metadata=True, targets=WIDE, **settings):
    """Adds LoRA to both parts and writes them as diffusers' training scripts do."""
    pipe.unet.add_adapter(peft.LoraConfig(r=4, target_modules=list(targets), **settings))
    pipe.text_encoder.add_adapter(peft.LoraConfig(r=2, target_modules=list(TEXT), **settings))
    noised(pipe.unet), noised(pipe.text_encoder)
    layers = {
        f"{part}_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(getattr(pipe, part)))
        for part in ("unet", "text_encoder")
    }
    more = _collate_lora_metadata({"unet": pipe.unet, "text_encoder": pipe.text_encoder}) if metadata else {}
    diffusers.StableDiffusionPipeline.save_lora_weights(folder, **layers, **more)
    return pipe


@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_diffusers_files_with_their_settings(kind, tmp_path):
    """Convolutions, linear layers and the text encoder; alpha stands in the metadata only."""
    theirs, base = by_diffusers(fresh(kind), tmp_path, lora_alpha=6), made(kind)[1]
    assert_same(sdjax.attach(base, tmp_path), theirs, moved=base)
    theirs.set_adapters(["default"], [0.5])
    sd = sdjax.attach(base, tmp_path / "pytorch_lora_weights.safetensors", 0.5)
    assert_same(sd, theirs, moved=base)


def test_diffusers_files_without_settings_have_scale_one(tmp_path):
    by_diffusers(fresh("sd1"), tmp_path, metadata=False, targets=ATTENTION, lora_alpha=6)
    theirs, base = fresh("sd1"), made("sd1")[1]
    theirs.load_lora_weights(tmp_path)
    assert_same(sdjax.attach(base, tmp_path), theirs, moved=base)


def test_dora_of_diffusers(tmp_path):
    theirs, base = by_diffusers(fresh("sd1"), tmp_path, lora_alpha=3, use_dora=True), made("sd1")[1]
    sd = sdjax.attach(base, tmp_path)
    assert_same(sd, theirs, moved=base)


@pytest.mark.parametrize("kind, alpha", [("sd1", 2.0), ("sd2", 2.0), ("sd1", None), ("sd1", 0.0)])
def test_kohya(kind, alpha, tmp_path):
    theirs, base = fresh(kind), made(kind)[1]
    path = save(kohya(theirs, alpha=alpha), tmp_path / "cat.safetensors")
    if alpha == 0:  # sd-scripts takes 0 for the rank; diffusers does not
        save(kohya(theirs, alpha=None), tmp_path / "for_diffusers.safetensors")
        theirs.load_lora_weights(tmp_path / "for_diffusers.safetensors")
    else:
        theirs.load_lora_weights(path)
    sd = sdjax.attach(base, path)
    assert_same(sd, theirs, moved=base)


def test_kohya_from_a_pickle_in_half_precision(tmp_path):
    theirs, base = fresh("sd1"), made("sd1")[1]
    tensors = {name: tensor.half() for name, tensor in kohya(theirs, ATTENTION).items()}
    torch.save(tensors, tmp_path / "cat.pt")
    theirs.load_lora_weights({name: tensor.float() for name, tensor in tensors.items()})
    assert_same(sdjax.attach(base, tmp_path / "cat.pt"), theirs, moved=base)


# The blocks of the small UNet (two levels, one layer each) by their names in the original code.
LDM = {
    "down_blocks.0.resnets.0.": "input_blocks.1.0.",
    "down_blocks.0.attentions.0.": "input_blocks.1.1.",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0.": "input_blocks.3.0.",
    "mid_block.resnets.0.": "middle_block.0.",
    "mid_block.attentions.0.": "middle_block.1.",
    "mid_block.resnets.1.": "middle_block.2.",
    "up_blocks.0.resnets.0.": "output_blocks.0.0.",
    "up_blocks.0.resnets.1.": "output_blocks.1.0.",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0.": "output_blocks.2.0.",
    "up_blocks.1.attentions.0.": "output_blocks.2.1.",
    "up_blocks.1.resnets.1.": "output_blocks.3.0.",
    "up_blocks.1.attentions.1.": "output_blocks.3.1.",
    "time_embedding.linear_1": "time_embed.0",
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def original(name):
    for new, old in LDM.items():
        name = name.replace(new, old)
    return name


@pytest.mark.parametrize("layout", ["lora_unet_", "diffusion_model."])
def test_names_of_the_original_code(layout, tmp_path):
    """sd-scripts' variant with underscores, ComfyUI's with dots; the same numbers under diffusers' names there."""
    theirs, base = fresh("sd1"), made("sd1")[1]
    targets = (*WIDE, "conv", "conv_in", "conv_out", "time_embedding.linear_1")
    plain = kohya(theirs, targets)
    flat = (lambda name: original(name).replace(".", "_")) if layout == "lora_unet_" else original
    renamed = kohya(theirs, targets, flat=flat)
    assert plain.keys() != renamed.keys() and len(plain) == len(renamed)
    theirs.load_lora_weights(save(plain, tmp_path / "plain.safetensors"))
    renamed = {name.replace("lora_unet_", layout): tensor for name, tensor in renamed.items()}
    sd = sdjax.attach(base, save(renamed, tmp_path / "renamed.safetensors"))
    assert_same(sd, theirs, moved=base)


@pytest.mark.parametrize("prefix, pickled", [("unet.", False), ("", True)])
def test_diffusers_before_0_20(prefix, pickled, tmp_path):
    """`.processor.to_q_lora.down.weight`, the first files without the part's name and pickled."""
    theirs, base, generator = fresh("sd1"), made("sd1")[1], torch.Generator().manual_seed(5)
    state = {}
    for name, layer in modules(theirs.unet, ATTENTION).items():
        block, _, projection = name.removesuffix(".0").rpartition(".")
        stem = f"unet.{block}.processor.{projection}_lora"
        state[f"{stem}.down.weight"], state[f"{stem}.up.weight"] = factors(layer, 4, generator)
    for name, layer in modules(theirs.text_encoder, TEXT).items() if prefix else ():
        block, _, projection = name.removesuffix("_proj").rpartition(".")
        stem = f"text_encoder.text_model.{block.removeprefix('text_model.')}.to_{projection}_lora"
        state[f"{stem}.down.weight"], state[f"{stem}.up.weight"] = factors(layer, 4, generator)
    theirs.load_lora_weights(state.copy())
    written = {name.removeprefix("unet.") if not prefix else name: tensor for name, tensor in state.items()}
    path = tmp_path / "pytorch_lora_weights.bin"
    if pickled:
        torch.save(written, path)
    else:
        path = save(written, tmp_path / "old.safetensors")
    assert_same(sdjax.attach(base, path), theirs, moved=base)


PEFT = {
    "plain": peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(WIDE)),
    "rslora": peft.LoraConfig(r=4, lora_alpha=3, use_rslora=True, target_modules=list(ATTENTION)),
    "patterns": peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=list(ATTENTION),
        alpha_pattern={"attn1.to_k": 2, f"^{KEY}": 5},
        rank_pattern={"to_q": 2},
    ),
    "dora": peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=FEW),
    "loha": peft.LoHaConfig(r=4, alpha=3, target_modules=FEW),
    "loha, convolutions": peft.LoHaConfig(r=4, alpha=3, use_effective_conv2d=True, target_modules=["conv2"]),
    "lokr": peft.LoKrConfig(r=2, alpha=3, target_modules=FEW),
    "lokr, convolutions": peft.LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, decompose_both=True, target_modules=["conv1", "to_q"]
    ),
}


@pytest.mark.parametrize("name", PEFT)
def test_peft(name, tmp_path):
    theirs, base = fresh("sd1"), made("sd1")[1]
    model = noised(peft.get_peft_model(theirs.unet, PEFT[name]))
    model.save_pretrained(tmp_path)
    sd = sdjax.attach(base, tmp_path)
    theirs.unet = model.base_model.model
    assert_same(sd, theirs, moved=base)


def test_settings_of_peft_are_part_of_the_hash(tmp_path):
    """A file with another alpha acts otherwise, though its tensors are the same."""
    theirs = fresh("sd1")
    noised(peft.get_peft_model(theirs.unet, peft.LoraConfig(r=4, target_modules=FEW))).save_pretrained(tmp_path)
    config, path = tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"
    found = [provenance.digest(tmp_path)]
    for changed in ({"lora_alpha": 2}, {"use_rslora": True}, {"peft_version": "another"}):
        config.write_text(json.dumps({**json.loads(config.read_text()), **changed}))
        found.append(provenance.digest(path))
    assert len(set(found)) == 3 and found[2] == found[3] and all(len(one) == 12 for one in found)
    save({"lora_unet_conv_in.alpha": torch.ones(1)}, tmp_path / "x.safetensors", {"ss_network_dim": "4"})
    assert provenance.digest(tmp_path / "x.safetensors") == hashes.autov3(tmp_path / "x.safetensors")


BY_UNET = {
    "alpha": {"lora_alpha": 16},
    "rslora": {"lora_alpha": 3, "use_rslora": True},
    "patterns": {"lora_alpha": 8, "alpha_pattern": {"attn1.to_k": 2, f"^{KEY}": 5}, "rank_pattern": {"to_q": 2}},
    "pissa": {"lora_alpha": 8, "init_lora_weights": "pissa"},
}


@pytest.mark.parametrize("name", BY_UNET)
@pytest.mark.parametrize("plain", [False, True])
def test_settings_without_the_name_of_a_part(name, plain, tmp_path):
    """What `unet.save_lora_adapter` writes; `plain`: the same settings as keys of the header themselves."""
    theirs, base = fresh("sd1"), made("sd1")[1]
    theirs.unet.add_adapter(peft.LoraConfig(r=4, target_modules=list(ATTENTION), **BY_UNET[name]))
    noised(theirs.unet).save_lora_adapter(tmp_path)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        settings = json.loads(file.metadata()["lora_adapter_metadata"])
    assert settings["lora_alpha"] == BY_UNET[name]["lora_alpha"] and "unet.r" not in settings
    if plain:
        header = {key: json.dumps(value) for key, value in settings.items()}
        save(safetensors.torch.load_file(path), path, {"format": "pt", **header})
    assert_same(sdjax.attach(base, tmp_path), theirs, moved=base)


BEGUN = {
    "pissa": {"init_lora_weights": "pissa", "lora_alpha": 8},
    "pissa, rslora": {"init_lora_weights": "pissa", "lora_alpha": 3, "use_rslora": True},
    "pissa, dora": {"init_lora_weights": "pissa", "lora_alpha": 8, "use_dora": True},
    "olora": {"init_lora_weights": "olora", "lora_alpha": 8},
    "orthogonal": {"init_lora_weights": "orthogonal", "lora_alpha": 8},
    "eva": {"init_lora_weights": "eva", "lora_alpha": 8},
}


@pytest.mark.parametrize("name", BEGUN)
def test_what_training_took_out_of_the_base(name, tmp_path):
    """What peft makes of the pretrained model when it loads the file: it takes B0 A0 out of the base again."""
    config = peft.LoraConfig(r=4, target_modules=list(ATTENTION), **BEGUN[name])
    noised(peft.get_peft_model(fresh("sd1").unet, config)).save_pretrained(tmp_path)
    theirs, base = fresh("sd1"), made("sd1")[1]
    theirs.unet = peft.PeftModel.from_pretrained(theirs.unet, tmp_path).merge_and_unload()
    assert_same(sdjax.attach(base, tmp_path), theirs, moved=base)
    off = sdjax.attach(base, tmp_path, 0.0)
    assert trees.digest(off.parts["unet"]) == trees.digest(base.parts["unet"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4': not supported"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda': not supported"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': not supported"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights='lora_ga': not supported"),
        ({"use_qalora": True}, "use_qalora=True: a setting of PEFT's that is not supported"),
        ({"of_tomorrow": 3}, "of_tomorrow=3: a setting of PEFT's that is not supported"),
        ({"peft_type": "OFT"}, "peft_type='OFT': not supported; LORA"),
        ({"lora_alpha": float("nan")}, "lora_alpha=nan: expected a number"),
        ({"lora_alpha": "8"}, "lora_alpha='8': expected a number"),
        ({"alpha_pattern": ["to_k"]}, r"alpha_pattern=\['to_k'\]: expected a number for each name"),
        ({"use_rslora": "maybe"}, "use_rslora='maybe': expected true or false"),
        ({"use_dora": True}, "to_k: use_dora=True, and the file holds no magnitude"),
    ],
)
def test_settings_that_are_refused_by_name(settings, message, tmp_path):
    peft.get_peft_model(fresh("sd1").unet, peft.LoraConfig(r=4, target_modules=["to_k"])).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ValueError, match=rf"adapter_model.safetensors: .*{message}") as error:
        sdjax.attach(made("sd1")[1], tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["default", "my_cat-2"])
@pytest.mark.parametrize("kind", ["plain", "dora", "loha", "lokr"])
def test_names_with_that_of_the_adapter(kind, name, tmp_path):
    """PEFT's own state dicts, "lora_A.NAME.weight": the same numbers as without it."""
    base, model = made("sd1")[1], noised(peft.get_peft_model(fresh("sd1").unet, PEFT[kind]))
    model.save_pretrained(tmp_path)
    wanted = sdjax.attach(base, tmp_path)
    own = {key: tensor for key, tensor in model.state_dict().items() if ".default" in key}
    assert len(own) == len(safetensors.torch.load_file(tmp_path / "adapter_model.safetensors"))
    own = {key.replace(".default", f".{name}"): tensor for key, tensor in own.items()}
    save(own, tmp_path / "adapter_model.safetensors")
    assert (
        trees.digest(sdjax.attach(base, tmp_path).parts["unet"])
        == trees.digest(wanted.parts["unet"])
        != trees.digest(base.parts["unet"])
    )


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_names_of_lycoris_wrapper(part, tmp_path):
    base, prefix = made("sd1")[1], {"unet": "lora_unet_", "text_encoder": "lora_te_"}[part]
    plain = {name: tensor for name, tensor in kohya(made("sd1")[0]).items() if name.startswith(prefix)}
    renamed = {name.replace(prefix, "lycoris_"): tensor for name, tensor in plain.items()}
    wanted = sdjax.attach(base, save(plain, tmp_path / "plain.safetensors"))
    sd = sdjax.attach(base, save(renamed, tmp_path / "lycoris.safetensors"))
    assert trees.digest(sd.parts[part]) == trees.digest(wanted.parts[part]) != trees.digest(base.parts[part])


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_exact(kind, ending, tmp_path):
    """The same weights as those of the float32 file with the same values."""
    base = made("sd1")[1]
    eight = {name: tensor.to(getattr(torch, kind)) for name, tensor in kohya(made("sd1")[0], ATTENTION).items()}
    wanted = save({name: tensor.float() for name, tensor in eight.items()}, tmp_path / "whole.safetensors")
    path = tmp_path / f"eight.{ending}"
    save(eight, path) if ending == "safetensors" else torch.save(eight, path)
    sd = sdjax.attach(base, path)
    assert (
        trees.digest(sd.parts["unet"])
        == trees.digest(sdjax.attach(base, wanted).parts["unet"])
        != trees.digest(base.parts["unet"])
    )


@pytest.mark.parametrize("ending", ["safetensors", "pt"])
def test_exponents_alone_are_refused_by_name(ending, tmp_path):
    path = tmp_path / f"eight.{ending}"
    eight = {f"unet.{KEY}.lora_A.weight": torch.ones(4, 32).to(torch.float8_e8m0fnu)}
    save(eight, path) if ending == "safetensors" else torch.save(eight, path)
    with pytest.raises(ValueError, match=r"eight\..*(F8_E8M0|float8_e8m0fnu)'?; expected one of"):
        sdjax.attach(made("sd1")[1], path)


def test_peft_needs_its_settings(tmp_path):
    model = peft.get_peft_model(fresh("sd1").text_encoder, peft.LoraConfig(r=4, target_modules=list(TEXT)))
    model.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json: no such file"):
        sdjax.attach(made("sd1")[1], tmp_path)


def test_patterns_that_are_no_names(tmp_path):
    config = peft.LoraConfig(r=4, target_modules=["to_k"], alpha_pattern={"attn[12].to_k": 2})
    peft.get_peft_model(fresh("sd1").unet, config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"alpha_pattern: 'attn\[12\].to_k': expected a module's name or its end"):
        sdjax.attach(made("sd1")[1], tmp_path)


@pytest.mark.parametrize("shape", ["sd15", "sd21"])
def test_names_at_full_size(shape):
    """192 layers in the transformers and 86 around them, 72 of SD 1's text encoder; no two share a name."""
    sizes = presets.SHAPES[shape]
    unet = UNet(UNetConfig(**sizes["unet"]))
    text_encoder = TextEncoder(TextConfig(**sizes["text_encoder"]))
    found = lora_names.spellings(Sd(), FrozenDict(unet=unet, text_encoder=text_encoder))
    kohya = [name for name in found if name.startswith(("lora_unet_down", "lora_unet_mid_", "lora_unet_up"))]
    inside = [name for name in kohya if "_attentions_" in name]
    assert (len(inside), len(kohya) - len(inside)) == (192, 86)
    text = [name for name in found if name.startswith("lora_te_text_model_encoder_layers_")]
    assert len(text) == {"sd15": 72, "sd21": 138}[shape]
    assert "lora_unet_output_blocks_5_2_conv" in found and "lora_unet_input_blocks_4_1_proj_in" in found
    counts = Counter(found.values())
    assert {number for (part, _), number in counts.items() if part == "unet"} == {7, 11}  # attention has more
    assert {number for (part, _), number in counts.items() if part == "text_encoder"} == {14, 16}


# ---- kinds that diffusers and peft do not read: formulas in float64 -----------------------------


def noise(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


def merged(module, tensors, path, strength=1.0):
    """Returns (weight before, after) as float64 in a file's layout, of a module whose tensors a file holds."""
    flat = module.replace(".", "_")
    tensors = {f"lora_unet_{flat}.{name}": torch.tensor(value).float() for name, value in tensors.items()}
    save(tensors, path / "x.safetensors")
    base = made("sd1")[1]
    sd = sdjax.attach(base, path / "x.safetensors", strength)
    weights = (np.asarray(trees.flatten(one.parts["unet"])[f"{module}.kernel"], np.float64) for one in (base, sd))
    return [weight.transpose((1, 0) if weight.ndim == 2 else (3, 2, 0, 1)) for weight in weights]


def close(ours, formula):
    np.testing.assert_allclose(ours, formula, atol=1e-5 * np.abs(formula).max())


@pytest.mark.parametrize("module", [WIDER, CONV])
@pytest.mark.parametrize("outputs", [False, True])
def test_dora_scale_counts_inputs_or_outputs(module, outputs, tmp_path):
    """Norms over all axes but the inputs', with wd_on_output all but the outputs'; strength scales W' - W."""
    shape = {WIDER: (256, 32), CONV: (32, 32, 3, 3)}[module]
    down, up = 0.2 * noise(4, *shape[1:]), noise(shape[0], 4, *[1] * (len(shape) - 2))
    size = [1] * len(shape)
    size[0 if outputs else 1] = shape[0 if outputs else 1]
    scale = 1 + 0.3 * noise(*size)
    tensors = {"lora_down.weight": down, "lora_up.weight": up, "alpha": 2.0, "dora_scale": scale}
    before, after = merged(module, tensors, tmp_path, 0.6)
    whole = before + 2 / 4 * (up.reshape(shape[0], 4) @ down.reshape(4, -1)).reshape(shape)
    others = tuple(axis for axis in range(len(shape)) if axis != (0 if outputs else 1))
    wanted = scale * whole / np.sqrt((whole**2).sum(others, keepdims=True))
    close(after, before + 0.6 * (wanted - before))


def test_lora_with_a_middle(tmp_path):
    """LyCORIS' convolutions as three: 1x1 down, 3x3 in the middle, 1x1 up."""
    down, mid, up = noise(4, 32, 1, 1), 0.1 * noise(4, 4, 3, 3), noise(32, 4, 1, 1)
    tensors = {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up, "alpha": 1.0}
    before, after = merged(CONV, tensors, tmp_path)
    close(after, before + np.einsum("or,rshw,si->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0]) / 4)


def test_full_differences_of_weights_and_biases(tmp_path):
    tensors = {"diff": noise(32, 32, 3, 3), "diff_b": noise(32)}
    before, after = merged(CONV, tensors, tmp_path, -0.5)
    close(after, before - 0.5 * tensors["diff"])
    base = made("sd1")[1]
    sd = sdjax.attach(base, tmp_path / "x.safetensors", 2.0)
    bias = trees.flatten(base.parts["unet"])[f"{CONV}.bias"]
    close(trees.flatten(sd.parts["unet"])[f"{CONV}.bias"], bias + 2 * tensors["diff_b"])


@pytest.mark.parametrize("alpha", [1.0, None])
def test_lokr_of_two_whole_factors_has_scale_one(alpha, tmp_path):
    tensors = {"lokr_w1": noise(4, 2), "lokr_w2": noise(64, 16)} | ({} if alpha is None else {"alpha": alpha})
    before, after = merged(WIDER, tensors, tmp_path)
    close(after, before + np.kron(tensors["lokr_w1"], tensors["lokr_w2"]))


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({f"lora_unet_{KEY}.lora_down.weight": (4, 32)}, "belong to no weight of this model: lora_unet_down_blocks.0"),
        ({"lora_te2_text_model_x.lora_up.weight": (4, 32)}, "belong to no weight of this model: lora_te2_text_model_x"),
        ({f"unet.{KEY}.lora_A.weight": (4, 32)}, f"{KEY}: holds down; these make no LoRA"),
        ({f"unet.{KEY}.lora_A.weight": (4, 32), f"{KEY}.lora_A.weight": (4, 32)}, "belong to no weight"),
        (
            {f"unet.{KEY}.lora_A.weight": (4, 48), f"unet.{KEY}.lora_B.weight": (32, 4)},
            rf"made for another model; misshapen: {KEY}.kernel \(down \[4, 48\], up \[32, 4\]\)",
        ),
        ({f"unet.{KEY}.lora_A.weight": (4, 64), f"unet.{KEY}.lora_B.weight": (16, 4)}, "made for another model"),
        ({f"unet.{KEY}.diff": (64, 16)}, "made for another model"),
        ({f"unet.{KEY}.diff_b": (32,)}, "a difference for .*to_k.bias, which this model has not"),
        ({f"unet.{KEY}.oft_R.weight": (4, 28)}, "BOFT and PEFT's OFT: not supported; LoRA, DoRA, LoHa"),
        ({f"unet.{KEY}.on_input": (1,), f"unet.{KEY}.weight": (32,)}, "IA3: not supported"),
        ({"unet:0:up": (4, 32), "unet:0:down": (32, 4)}, "LoRA by position: the metadata 'unet' has no list; expected"),
        ({"conv_in.weight": (32, 4, 3, 3), "conv_in.bias": (32,)}, "an embedding file holds one tensor, not 2"),
        ({f"unet.{KEY}.lora_A.weight": (0, 32), f"unet.{KEY}.lora_B.weight": (32, 0)}, "a rank is at least 1"),
        ({f"unet.{KEY}.lora_A.weight": (4,), f"unet.{KEY}.lora_B.weight": (32, 4)}, r"down \[4\]: expected a matrix"),
        (
            {f"unet.{KEY}.lora_A.cat.weight": (4, 32), f"unet.{KEY}.lora_B.dog.weight": (32, 4)},
            "holds several adapters, cat, dog; expected one",
        ),
        (
            {f"unet.{KEY}.lora_A.cat.weight": (4, 32), f"unet.{KEY}.lora_A.weight": (4, 32)},
            "the adapter's name cat and the same without",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(tensors, message, tmp_path):
    path = save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        sdjax.attach(made("sd1")[1], path)
    assert "\n" not in str(error.value) and re.search(r"x\.safetensors", str(error.value))


@pytest.mark.parametrize("alpha", [[np.nan], [np.inf], [1.0, 2.0]])
def test_an_alpha_that_is_no_number_is_one_line(alpha, tmp_path):
    factors = {f"unet.{KEY}.lora_A.weight": torch.ones(4, 32), f"unet.{KEY}.lora_B.weight": torch.ones(32, 4)}
    path = save({**factors, f"unet.{KEY}.alpha": torch.tensor(alpha)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match=r"x.safetensors: .*to_k: alpha \[.*\]: expected one finite number") as error:
        sdjax.attach(made("sd1")[1], path)
    assert "\n" not in str(error.value)
