"""Adapters merged, resized, taken out of two models, and checked: their effects against numpy's SVD."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax import trees
from sdjax.__main__ import main
from sdjax.formats import pipeline
from sdjax.formats.adapters import attachable, lora_tools
from sdjax.formats.adapters.low_rank import Cut, shortened, split
from sdjax.formats.storage import headers
from sdjax.settings import SettingError

TO_Q = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.0.resnets.0.conv1"
LAYERS = {TO_Q: (32, 32), CONV: (32, 32, 3, 3)}
TEXT = "text_model.encoder.layers.0.self_attn.q_proj"


def noise(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def kohya(path, seed, rank, alpha, layers=LAYERS, metadata=None):
    """Writes a file of sd-scripts, factors of noise; returns {layer: a B A, float64 [out n]}."""
    tensors, changes = {}, {}
    for i, (layer, (out, *rest)) in enumerate({**layers, TEXT: (32, 32)}.items()):
        name = f"lora_{'te' if layer == TEXT else 'unet'}_{layer.replace('.', '_')}"
        up, down = noise(seed + i, out, rank, *[1] * (len(rest) - 1)), noise(seed + 50 + i, rank, *rest)
        held = {"lora_up.weight": up, "lora_down.weight": down, "alpha": np.float32(alpha)}
        tensors |= {f"{name}.{role}": np.asarray(x) for role, x in held.items()}
        product = np.float64(up.reshape(out, rank)) @ np.float64(down.reshape(rank, -1))
        changes[layer] = alpha / rank * product
    save_file(tensors, path, metadata)
    return changes


@pytest.fixture(scope="module")
def base():
    return pipeline.load("random:tiny")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def two(base, folder):
    """Returns (adapters, their changes) of ranks 3 and 5."""
    changes = [kohya(folder / "cat.safetensors", 1, 3, 2.0), kohya(folder / "ink.safetensors", 9, 5, 4.0)]
    return [attachable.read(folder / f"{name}.safetensors", base) for name in ("cat", "ink")], changes


def effects(adapter):
    """Returns {layer: D float64 [out n]} of an adapter's LoRA."""
    found = {}
    for edits in adapter.edits.values():
        for name, edit in edits.items():
            f = {key: np.asarray(x, np.float64) for key, x in edit.factors.items()}
            product = f["up"].reshape(len(f["up"]), -1) @ f["down"].reshape(len(f["down"]), -1)
            found[name.removesuffix(".kernel")] = f["scale"] * product
    return found


def nearest(change, rank):
    """Returns the product of this rank that is nearest to a change, by numpy in float64."""
    left, values, right = np.linalg.svd(change, full_matrices=False)
    return (left[:, :rank] * values[:rank]) @ right[:rank]


def assert_close(found, wanted):
    assert found.keys() == wanted.keys()
    for layer, change in wanted.items():
        assert np.abs(found[layer] - change).max() <= 1e-5 * np.abs(change).max(), layer


def ranks(adapter):
    return {len(edit.factors["down"]) for edits in adapter.edits.values() for edit in edits.values()}


def test_merging_sums_the_effects(two, base):
    adapters, (cat, ink) = two
    made = lora_tools.merged(list(zip(adapters, (0.8, -0.5), strict=True)), base)
    wanted = {layer: 0.8 * cat[layer] - 0.5 * ink[layer] for layer in cat}
    assert_close(effects(made), wanted)
    assert ranks(made) == {8}
    smaller = lora_tools.merged(list(zip(adapters, (0.8, -0.5), strict=True)), base, Cut(rank=4))
    assert_close(effects(smaller), {layer: nearest(change, 4) for layer, change in wanted.items()})
    assert ranks(smaller) == {4}


def test_the_mean_of_factors_would_be_another_thing(two, base):
    """So that the tests above can fail: factors that are averaged do not have the mean effect."""
    adapters, (cat, ink) = two
    ups, downs = (
        [np.float64(a.edits["unet"][f"{TO_Q}.kernel"].factors[name]) for a in adapters] for name in ("up", "down")
    )
    mean = (ups[0] + ups[1][:, :3]) @ (downs[0] + downs[1][:3]) / 4
    wanted = (cat[TO_Q] + ink[TO_Q]) / 2
    assert np.abs(mean - wanted).max() > 0.1 * np.abs(wanted).max()


@pytest.mark.parametrize("cut", [{"rank": 2}, {"energy": 0.6}, {"ratio": 1.5}, {"rank": 4, "energy": 0.9999}])
def test_resizing(cut, two, base):
    adapters, (_, ink) = two
    made = effects(lora_tools.resized(adapters[1], base, Cut(**cut)))
    for layer, change in ink.items():
        values = np.linalg.svd(change, compute_uv=False)[:5]
        held = np.cumsum(values**2) / np.sum(values**2)
        count = cut.get("rank", 5)
        count = min(count, int(np.argmax(held >= cut["energy"])) + 1) if "energy" in cut else count
        count = min(count, int((values >= values[0] / cut["ratio"]).sum())) if "ratio" in cut else count
        assert 1 <= count < 5
        assert_close({layer: made[layer]}, {layer: nearest(change, count)})


def test_thin_products_and_whole_matrices_agree():
    up, down = noise(0, 20, 6), noise(1, 6, 30)
    for cut in (Cut(rank=3), Cut(energy=0.8), Cut()):
        one, other = split(up @ down, cut), shortened(up, down, cut)
        np.testing.assert_allclose(one[0] @ one[1], other[0] @ other[1], atol=2e-5)
    balanced = shortened(up, down, Cut(rank=3))
    np.testing.assert_allclose(
        np.linalg.norm(balanced[0], axis=0), np.linalg.norm(balanced[1], axis=1), rtol=1e-5
    )  # both factors have the root of the singular value


def test_a_lora_comes_out_of_two_models(two, base, folder):
    adapters, (cat, _) = two
    tuned = sdjax.attach(base, folder / "cat.safetensors", keep=False)
    moved = {**trees.flatten(tuned.parts["unet"])}
    moved["conv_in.bias"] = moved["conv_in.bias"] + 1
    tuned = tuned.with_parts(unet=trees.unflatten(moved, base.parts["unet"]))
    made, others = lora_tools.extracted(base, tuned, Cut(rank=3))
    for layer, change in effects(made).items():
        assert np.abs(change - cat[layer]).max() <= 1e-5 * np.abs(cat[layer]).max() + 1e-6
    assert others == ["unet.conv_in.bias"] and set(effects(made)) == set(cat)
    small, _ = lora_tools.extracted(base, tuned, Cut(rank=2))
    for layer, change in effects(small).items():
        wanted = nearest(cat[layer], 2)
        assert np.abs(change - wanted).max() <= 1e-4 * np.abs(wanted).max()
    with pytest.raises(ValueError, match="the models do not differ"):
        lora_tools.extracted(base, base, Cut(rank=2))
    with pytest.raises(SettingError, match="rank=None: expected a rank, a share of energy"):
        lora_tools.extracted(base, tuned, Cut())
    with pytest.raises(ValueError, match="other shapes"):
        lora_tools.extracted(base, pipeline.load("pocket"), Cut(rank=2))


def test_what_is_no_lora_becomes_one_of_a_rank(base, folder, two):
    """LoHa beside LoRA, and DoRA, whose change needs the base's weights."""
    (cat, _), (changes, _) = two
    key = f"lora_unet_{TO_Q.replace('.', '_')}"
    names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    shapes = ((32, 2), (2, 32)) * 2
    parts = [noise(i, *shape) for i, shape in enumerate(shapes)]
    save_file({f"{key}.{name}": x for name, x in zip(names, parts, strict=True)}, folder / "loha.safetensors")
    loha = attachable.read(folder / "loha.safetensors", base)
    with pytest.raises(SettingError, match="rank=None: expected a number: the changes of .*to_q.kernel are no LoRA"):
        lora_tools.merged([(cat, 1.0), (loha, 0.3)], base)
    made = effects(lora_tools.merged([(cat, 1.0), (loha, 0.3)], base, Cut(rank=7)))
    one, other = (np.float64(a) @ np.float64(b) for a, b in (parts[:2], parts[2:]))
    assert_close({TO_Q: made[TO_Q]}, {TO_Q: nearest(changes[TO_Q] + 0.3 * one * other, 7)})
    assert lora_tools.merged([(loha, 1.0)], base).edits["unet"] == loha.edits["unet"]
    tensors = load_file(folder / "cat.safetensors")
    tensors[f"{key}.dora_scale"] = np.abs(noise(3, 32, 1))
    save_file(tensors, folder / "dora.safetensors")
    dora = attachable.read(folder / "dora.safetensors", base)
    shape = jax.eval_shape(lambda: base)
    with pytest.raises(SettingError, match="model=None: expected the base model"):
        lora_tools.resized(dora, shape, Cut(rank=2))
    weight = np.float64(trees.flatten(base.parts["unet"])[f"{TO_Q}.kernel"]).T
    total = weight + changes[TO_Q]
    wanted = total * tensors[f"{key}.dora_scale"] / np.linalg.norm(total, axis=1, keepdims=True) - weight
    found = effects(lora_tools.resized(dora, base, Cut(rank=4)))
    assert np.abs(found[TO_Q] - nearest(wanted, 4)).max() <= 1e-4 * np.abs(wanted).max()
    assert_close({CONV: found[CONV]}, {CONV: changes[CONV]})  # of rank 3 already


@pytest.mark.parametrize(
    ("cut", "said"),
    [
        ({"rank": 0}, "rank=0: expected a number from 1"),
        ({"energy": 1.5}, "energy=1.5: expected a share above 0, to 1"),
        ({"ratio": 0}, "ratio=0: expected a number above 0"),
    ],
)
def test_what_a_cut_accepts(cut, said):
    with pytest.raises(SettingError) as error:
        Cut(**cut)
    assert str(error.value) == said


TINY = ("--model", "random:tiny")


def test_the_program(two, folder, tmp_path, base, capsys):
    cat, ink, out = folder / "cat.safetensors", folder / "ink.safetensors", tmp_path / "both.safetensors"
    headers.tell(cat, {"modelspec.trigger_phrase": "sks cat", "ss_sd_model_name": "base"})
    line = ["adapters", "merge", f"{cat}:0.8", f"{ink}:0.5", "--out", str(out)]
    assert main([*line, *TINY]) == 0
    assert f"wrote {out}, weights: 2 of unet, 1 of text_encoder, rank 8" in capsys.readouterr().out
    said = headers.metadata(out)
    assert said["modelspec.trigger_phrase"] == "sks cat" and said["ss_network_dim"] == "8"
    assert said["modelspec.merged_from"].startswith("cat (") and ", ink (" in said["modelspec.merged_from"]
    assert json.loads(out.with_suffix(".json").read_text())["activation text"] == "sks cat"
    together = sdjax.attach(sdjax.attach(base, cat, 0.8), ink, 0.5)
    one, two_ = (trees.flatten(sd.parts["unet"]) for sd in (sdjax.attach(base, out), together))
    for layer in LAYERS:
        np.testing.assert_allclose(one[f"{layer}.kernel"], two_[f"{layer}.kernel"], atol=2e-5)
    assert main([*line, *TINY]) == 1 and "--out" in capsys.readouterr().err
    small, there = tmp_path / "small.safetensors", tmp_path / "diffusers"
    assert main(["adapters", "resize", str(out), "--rank", "2", "--dtype", "float16", "--out", str(small), *TINY]) == 0
    assert {x.dtype.name for name, x in load_file(small).items() if "alpha" not in name} == {"float16"}
    assert main(["adapters", "merge", str(small), "--format", "diffusers", "--out", str(there), *TINY]) == 0
    assert sdjax.attach(base, there) is not None
    assert main(["adapters", "merge", str(cat), "--out", str(tmp_path / "x"), "--format", "embedding", *TINY]) == 1
    assert "--format='embedding': expected one that holds it: " in capsys.readouterr().err


def test_two_models_and_the_program(folder, two, base, tmp_path):
    sdjax.save(base, tmp_path / "base")
    sdjax.save(sdjax.attach(base, folder / "cat.safetensors", keep=False), tmp_path / "tuned")
    out = tmp_path / "out.safetensors"
    line = ["adapters", "extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--rank", "3", "--out", str(out)]
    assert main(line) == 0
    once = jnp.asarray(trees.flatten(sdjax.attach(base, out).parts["unet"])[f"{TO_Q}.kernel"])
    wanted = trees.flatten(sdjax.attach(base, folder / "cat.safetensors").parts["unet"])[f"{TO_Q}.kernel"]
    np.testing.assert_allclose(once, wanted, atol=2e-5)


def test_checking(folder, two, tmp_path, capsys):
    cat = folder / "cat.safetensors"
    assert main(["adapters", "check", str(cat), *TINY]) == 0
    said = capsys.readouterr().out
    assert "cat.safetensors: lora" in said and "fits random:tiny" in said
    assert "weights: 2 of unet, 1 of text_encoder; rank 3" in said and "AutoV3" in said
    tensors = load_file(cat)
    tensors[f"lora_unet_{TO_Q.replace('.', '_')}.lora_up.weight"][0, 0] = np.nan
    save_file(tensors, tmp_path / "nan.safetensors", {"sshs_model_hash": "0" * 64})
    assert main(["adapters", "check", str(tmp_path / "nan.safetensors"), *TINY]) == 1
    said = capsys.readouterr().out
    assert "wrong: 1 tensors hold numbers that are not finite: lora_unet_down_blocks_0" in said
    assert "wrong: its header says AutoV3 000000000000" in said
    save_file({"lora_unet_other.lora_up.weight": np.ones((2, 2), np.float32)}, tmp_path / "odd.safetensors")
    assert main(["adapters", "check", str(cat), str(tmp_path / "odd.safetensors"), *TINY]) == 1
    assert "wrong: for random:tiny" in (said := capsys.readouterr().out) and "belong to no weight" in said
    assert main(["adapters", "check", str(tmp_path / "none.safetensors"), *TINY]) == 1
    assert "none.safetensors: no such file" in capsys.readouterr().err
    safetensors.numpy.save_file({"<toy>": noise(0, 2, 32)}, tmp_path / "toy.safetensors")
    assert main(["adapters", "check", str(tmp_path / "toy.safetensors"), *TINY]) == 0
    assert "word <toy>: 2 rows" in capsys.readouterr().out


@pytest.mark.slow
def test_shapes_of_published_models_are_found(tmp_path, capsys):
    layer = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    for width, name in ((768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2")):
        factors = {"lora_up.weight": noise(0, 320, 2), "lora_down.weight": noise(1, 2, width)}
        save_file({f"{layer}.{role}": x for role, x in factors.items()}, tmp_path / "x.safetensors")
        assert main(["adapters", "check", str(tmp_path / "x.safetensors")]) == 0
        assert f"fits {name}" in capsys.readouterr().out
