"""Adapters together: sums, detaching, strengths, what is kept and what is compiled, pictures, the command line."""

import gc
import json
import os
import shutil
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import test_embeddings
import test_hypernetworks
import torch
from adapter_files import assert_same, assert_same_picture, fresh, made
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from PIL import Image
from test_hypernetworks import CASES, hang
from test_lora import ATTENTION, kohya

import sdjax
from sdjax import trees
from sdjax.formats.adapters import attach
from sdjax.formats.adapters.attach import attach_all, detach
from sdjax.methods import edits
from sdjax.models.reference import Reference
from sdjax.service import batch, programs, records

WORD = "<toy>"
ROWS = 0.3 * torch.randn(2, 32, generator=torch.Generator().manual_seed(2))

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """cat, dog and bird (LoRA of different ranks and layers), toy (an embedding), style (a hypernetwork)."""
    folder, pipe = tmp_path_factory.mktemp("adapters"), made("sd1")[0]
    write = safetensors.torch.save_file
    write(kohya(pipe, rank=3), folder / "cat.safetensors")
    write(kohya(pipe, ATTENTION, rank=5, alpha=1.0), folder / "dog.safetensors")
    write(kohya(pipe, ATTENTION, rank=5, alpha=4.0), folder / "bird.safetensors")
    write({WORD: ROWS}, folder / "toy.safetensors")
    test_hypernetworks.write(folder / "style.pt", CASES["relu"])
    return folder


def equal(one, other):
    """Asserts that two models are the same tree with the same bits, in whatever order their adapters came."""
    assert jax.tree.structure(one.bare) == jax.tree.structure(other.bare)
    assert trees.digest(one) == trees.digest(other)
    assert one.tokenizers == other.tokenizers


def weights(sd):
    return {name: np.asarray(leaf, np.float64) for name, leaf in trees.flatten(sd.parts["unet"]).items()}


def test_stacked_adapters_add_up_in_any_order(folder):
    base = made("sd1")[1]
    cat, dog = (sdjax.attach(base, folder / f"{name}.safetensors") for name in ("cat", "dog"))
    both = sdjax.attach(sdjax.attach(base, folder / "cat.safetensors", 0.5), folder / "dog.safetensors", -1.5)
    start, one, other, sums = map(weights, (base, cat, dog, both))
    for name, weight in start.items():
        wanted = weight + 0.5 * (one[name] - weight) - 1.5 * (other[name] - weight)
        np.testing.assert_allclose(sums[name], wanted, atol=2e-6 * np.abs(wanted).max(), err_msg=name)
    turned = sdjax.attach(sdjax.attach(base, folder / "dog.safetensors", -1.5), folder / "cat.safetensors", 0.5)
    equal(both, turned)


def test_detaching_all_gives_the_model_from_before_bit_for_bit(folder):
    base, sd = made("sd1")[1], made("sd1")[1]
    for name in ("cat.safetensors", "toy.safetensors", "style.pt", "dog.safetensors"):
        sd = sdjax.attach(sd, folder / name)
    assert trees.digest(sd.parts["unet"]) != trees.digest(base.parts["unet"]) and sd.hooks and WORD in sd.words
    equal(detach(sd), base)


def test_detaching_one_leaves_the_others(folder):
    base = made("sd1")[1]
    names = ("cat.safetensors", "toy.safetensors", "style.pt", "dog.safetensors")
    for left_out in names:
        sd, others = base, base
        for name in names:
            sd = sdjax.attach(sd, folder / name)
            others = others if name == left_out else sdjax.attach(others, folder / name)
        equal(detach(sd, folder / left_out), others)
    with pytest.raises(ValueError, match="cat.safetensors: not attached; attached: none"):
        detach(base, folder / "cat.safetensors")
    with pytest.raises(ValueError, match="all: not attached"):
        detach(base)


def test_attaching_again_sets_the_strength(folder):
    base = made("sd1")[1]
    again = sdjax.attach(sdjax.attach(base, folder / "cat.safetensors", 0.3), folder / "cat.safetensors", 0.9)
    equal(again, sdjax.attach(base, folder / "cat.safetensors", 0.9))
    off = sdjax.attach(base, folder / "cat.safetensors", 0.0)
    assert trees.digest(off.parts["unet"]) == trees.digest(base.parts["unet"])


def test_what_else_changed_stays(folder):
    """Compute types, hooks and conditioners that came before and after."""
    base = made("sd1")[1].add(hooks=Nothing("first"))
    sd = sdjax.attach(base, folder / "style.pt").add(hooks=Nothing("last")).with_dtype("bfloat16")
    sd = sdjax.attach(sd, folder / "cat.safetensors")
    assert [getattr(hook, "name", "style") for hook in sd.hooks] == ["first", "style", "last"]
    sd = detach(sd, folder / "style.pt")
    assert [hook.name for hook in sd.hooks] == ["first", "last"] and sd.networks["unet"].dtype == jnp.bfloat16
    assert detach(sd).networks == base.with_dtype("bfloat16").networks


@jax.tree_util.register_static
class Nothing:
    """A hook that leaves layers as they are."""

    def __init__(self, name):
        self.name = name

    def intercept(self, part, layer, args, kwargs, at, cond):
        return layer(*args, **kwargs)


def test_sums_are_not_rounded_for_networks_of_float32(folder):
    base = made("sd1")[1]
    half = base.with_parts(unet=trees.cast(base.parts["unet"], jnp.bfloat16))
    start = base.with_parts(unet=trees.cast(half.parts["unet"], jnp.float32))
    names = [(folder / "bird.safetensors", 0.7), (folder / "dog.safetensors", 0.4)]
    for path, strength in names:
        half, start = sdjax.attach(half, path, strength), sdjax.attach(start, path, strength)
    changed = {name: x for name, x in trees.flatten(half.parts["unet"]).items() if x.dtype == jnp.float32}
    assert len(changed) > 10
    for name, x in changed.items():
        np.testing.assert_array_equal(x, trees.flatten(start.parts["unet"])[name])


def test_the_process_keeps_nothing_of_what_was_attached(folder):
    """Neither merged weights nor what a file holds; what is kept belongs to a Maker and its room."""
    base = made("sd1")[1]
    sd = sdjax.attach(base, folder / "cat.safetensors", 0.8)
    kernel = "down_blocks.0.resnets.0.conv1.kernel"
    merged, (item,) = trees.flatten(sd.parts["unet"])[kernel], sd.reference.attached.stack.items
    assert merged is not trees.flatten(base.parts["unet"])[kernel]
    seen = [weakref.ref(merged), weakref.ref(item.adapter)]
    del sd, merged, item
    gc.collect()
    assert [one() for one in seen] == [None, None]


def test_models_with_the_same_adapters_are_equal(folder, tmp_path):
    """So that a function of a whole model compiles once for them."""
    base, path = made("sd1")[1], tmp_path / "x.safetensors"
    path.write_bytes((folder / "cat.safetensors").read_bytes())
    one, same, other = (sdjax.attach(base, path, strength) for strength in (0.8, 0.8, 0.7))
    path.write_bytes((folder / "dog.safetensors").read_bytes())
    changed = sdjax.attach(base, path, 0.8)
    kinds = [jax.tree.structure(sd) for sd in (one, same, other, changed)]
    assert kinds[0] == kinds[1] and hash(kinds[0]) == hash(kinds[1]) and kinds[0] not in kinds[2:]


def test_weights_are_summed_once_for_all_adapters_of_a_call(folder, monkeypatch):
    summed, merge = [], edits.merge
    monkeypatch.setattr(edits, "merge", lambda *given: summed.append(len(given[1])) or merge(*given))
    attach_all(
        made("sd1")[1], [str(folder / name) for name in ("cat.safetensors", "toy.safetensors", "dog.safetensors")]
    )
    assert len(summed) == 2  # of the UNet and of the text encoder
    attach.attach(made("sd1")[1], {folder / "cat.safetensors": 0.5, folder / "dog.safetensors": -1.5})
    assert len(summed) == 4


def test_a_changed_file_is_read_again(folder, tmp_path):
    path, base = tmp_path / "x.safetensors", made("sd1")[1]
    path.write_bytes((folder / "cat.safetensors").read_bytes())
    first = sdjax.attach(base, path)
    path.write_bytes((folder / "dog.safetensors").read_bytes())
    os.utime(path, ns=(1, 1))
    assert trees.digest(sdjax.attach(base, path).parts["unet"]) != trees.digest(first.parts["unet"])


def test_strengths_and_other_files_compile_nothing_new(folder):
    """What is compiled for a model depends on its bare tree alone, so that a small program tells."""
    base, ids = made("sd1")[1], np.zeros((1, 2), np.int32)
    embed = jax.jit(lambda sd, ids: sd.embed("text_encoder", ids))

    def programs(*sds):
        for sd in sds:
            embed(sd.bare, ids)
        return embed._cache_size()

    cat, dog, style = folder / "cat.safetensors", folder / "dog.safetensors", folder / "style.pt"
    before = programs(base, sdjax.attach(base, cat), sdjax.attach(base, style, keep=False))
    one, two = sdjax.attach(base, cat, 0.2), sdjax.attach(sdjax.attach(base, dog, 3), cat)
    plain = [detach(one), sdjax.attach(base, cat, keep=False), sdjax.attach(base, style, 0.1, keep=False)]
    assert programs(one, two, *plain) == before == 2


def test_letting_go_of_the_weights_before(folder):
    base = made("sd1")[1]
    sd = sdjax.attach(base, folder / "cat.safetensors", keep=False)
    assert sd.reference == Reference() and jax.tree.structure(sd) == jax.tree.structure(base)
    with pytest.raises(ValueError, match="cat.safetensors: not attached"):
        detach(sd, folder / "cat.safetensors")


@pytest.mark.parametrize("kind", ["lora", "embedding", "hypernetwork"])
def test_pictures(kind, folder):
    theirs, base = fresh("sd1"), made("sd1")[1]
    if kind == "lora":
        theirs.load_lora_weights(folder / "cat.safetensors", adapter_name="cat")
        theirs.set_adapters(["cat"], [0.5])
        sd, text = sdjax.attach(base, folder / "cat.safetensors", 0.5), "a photo of a woman"
    elif kind == "embedding":
        theirs.load_textual_inversion({WORD: ROWS}, token=WORD)
        sd, text = sdjax.attach(base, folder / "toy.safetensors"), f"a sketch of {WORD}"
    else:
        hang(theirs.unet, test_hypernetworks.write(folder / "again.pt", CASES["relu"]), 0.5)
        sd, text = sdjax.attach(base, folder / "style.pt", 0.5), "a photo of a man"
    assert_same_picture(sd, theirs, text)


@pytest.mark.parametrize("safe", [True, False])
def test_custom_diffusion(safe, tmp_path):
    """Keys and values of cross-attention, queries and outputs too, in place of the model's."""
    theirs, processors = fresh("sd1"), {}
    torch.manual_seed(0)
    for name in theirs.unet.attn_processors:
        query, own = theirs.unet.get_submodule(name.removesuffix(".processor")).to_q.weight, "attn2" in name
        sizes = {"hidden_size": len(query), "cross_attention_dim": 32} if own else {}
        processors[name] = CustomDiffusionAttnProcessor(train_kv=own, train_q_out=own, **sizes)
    theirs.unet.set_attn_processor(processors)
    theirs.unet.save_attn_procs(tmp_path, safe_serialization=safe)
    (file,) = tmp_path.iterdir()
    sd = sdjax.attach(made("sd1")[1], file)
    assert_same(sd, theirs, moved=made("sd1")[1])


def test_files_of_a_command_line(folder):
    base = made("sd1")[1]
    cat, dog = folder / "cat.safetensors", folder / "dog.safetensors"
    ours = attach_all(base, [f"{cat}:0.5", str(dog)])
    wanted = sdjax.attach(sdjax.attach(base, cat, 0.5), dog)
    assert trees.digest(ours.parts["unet"]) == trees.digest(wanted.parts["unet"]) and ours.reference == Reference()
    for text, message in {
        "no.pt": "no.pt: no such file",
        "no.pt:1": "no.pt: no such file",
        "no.pt:x": "adapter 'no.pt:x': no such file; expected FILE, FILE:STRENGTH or WORD=FILE",
    }.items():
        with pytest.raises(ValueError, match=message):
            attach_all(base, [text])
    with pytest.raises(
        ValueError, match="without .*pytorch_lora_weights.safetensors, adapter_model.safetensors, learned"
    ):
        sdjax.attach(base, folder)


def test_damaged_files_are_one_line(folder, tmp_path):
    whole = (folder / "cat.safetensors").read_bytes()
    for name, data in {"cut.safetensors": whole[:5000], "empty.pt": b"", "text.pt": b"hello, world"}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=rf"{name}: (not|cannot be) ") as error:
            sdjax.attach(made("sd1")[1], tmp_path / name)
        assert "\n" not in str(error.value)


def test_text2img_takes_adapters(folder, tmp_path, capsys):
    sdjax.save(made("sd1")[1], tmp_path / "model")
    begin = ["--model", str(tmp_path / "model"), "--prompt", f"a {WORD}", "--steps", "1", "--size", "16"]
    begin += ["--out", str(tmp_path / "out"), "--adapter"]

    def run(*adapters):
        return programs.main("text2img", "", [*begin, *adapters])

    assert run(f"{folder / 'cat.safetensors'}:0.5", str(folder / "toy.safetensors")) == 0
    assert run(str(folder / "cat.safetensors"), "nothing.pt") == 1
    assert "nothing.pt: no such file" in capsys.readouterr().err


def test_prompts_name_adapters_of_a_folder(folder, tmp_path, capsys):
    sdjax.save(made("sd1")[1], tmp_path / "model")
    begin = ["--model", str(tmp_path / "model"), "--steps", "1", "--size", "16", "--grammar", "a1111"]

    def run(out, prompt, *more):
        arguments = [*begin, "--out", str(tmp_path / out), "--prompt", prompt, *more]
        return programs.main("text2img", "", arguments)

    def picture(path):
        return np.asarray(Image.open(tmp_path / path))

    here = ["--adapters", str(folder)]
    assert run("plain", "a cat") == run("named", "a <lora:cat:0.5>cat", *here) == 0
    assert run("given", "a cat", "--adapter", f"{folder / 'cat.safetensors'}:0.5") == 0
    named, given, plain = (picture(f"{out}/00000-0.png") for out in ("named", "given", "plain"))
    assert np.array_equal(named, given) and not np.array_equal(named, plain)
    assert records.read(tmp_path / "named/00000-0.png")["prompt"] == "a <lora:cat:0.5>cat"
    assert run("bad", "a <lora:cat/../../x:1>cat", *here) == run("bad", "a <hypernet:cat:1>cat", *here) == 1
    said = capsys.readouterr().err
    assert "0 files of this name" in said and "of the kind lora" in said

    rows = [{"prompt": text, "grammar": "a1111", "seed": 0} for text in ("a cat", "a <lora:cat:0.5>cat", "a <lora:x>")]
    (tmp_path / "jobs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [*begin[:6], *here, "--batch", "1", "--out", str(tmp_path / "many")]
    assert batch.main("", [str(tmp_path / "jobs.jsonl"), *options]) == 1
    assert np.array_equal(picture("many/000001.png"), plain) and np.array_equal(picture("many/000002.png"), named)
    assert "adapter 'x': 0 files" in (tmp_path / "many/errors.jsonl").read_text()


def test_what_prompts_name_is_found_and_recorded(folder, tmp_path, monkeypatch, capsys):
    """A folder by its name, embeddings by theirs, pictures among them; previews and other words are passed over."""
    sdjax.save(made("sd1")[1], tmp_path / "model")
    here = tmp_path / "adapters"
    (here / "ink").mkdir(parents=True)
    shutil.copy(folder / "cat.safetensors", here / "ink" / "pytorch_lora_weights.safetensors")
    shutil.copy(folder / "style.pt", here / "style.pt")
    Image.new("RGB", (8, 8)).save(here / "style.png")
    Image.new("RGB", (8, 8)).save(here / "cat.png")
    test_embeddings.picture(ROWS, here / "inky-1.png")
    begin = ["--model", str(tmp_path / "model"), "--steps", "1", "--size", "16", "--adapters", str(here)]

    def run(out, prompt, *more):
        arguments = [*begin, "--out", str(tmp_path / out), "--prompt", prompt, *more]
        assert programs.main("text2img", "", arguments) == 0
        path = tmp_path / out / "00000-0.png"
        return np.asarray(Image.open(path)), records.read(path)

    a1111 = ["--grammar", "a1111"]
    named, record = run("a", "a <lora:ink:0.5><hypernet:style:0.5>cat (Inky-1:1.2)", *a1111)
    ink = here / "ink"
    given = [f"{ink}:0.5", f"{here / 'style.pt'}:0.5", str(here / "inky-1.png")]
    same, other = run("b", "a cat (Inky-1:1.2)", *a1111, "--adapter", *given)
    assert np.array_equal(named, same) and record.hashes == other.hashes
    assert set(record.hashes) == {"model", "lora ink", "hypernet style", "embedding inky-1"}
    assert records.parse(records.text(record)).hashes == record.hashes
    assert record["adapter"] == () and other["adapter"] == ("ink:0.5", "style:0.5", "inky-1:1")
    comfy, record = run("c", "a cat", "--grammar", "comfyui", "--negative-prompt", "embedding:inky-1, red")
    assert set(record.hashes) == {"model", "embedding inky-1"}
    assert run("d", "a inky-1 cat", "--grammar", "comfyui")[1].hashes.keys() == {"model"}
    shutil.copy(here / "inky-1.png", here / "ink" / "inky-1.png")
    with pytest.raises(ValueError, match="embedding 'inky-1': .* have this name"):
        attach.find_embeddings(made("sd1")[1], ["inky-1"], attach.Folder(here), "a1111")


def test_the_unet_has_a_strength_of_its_own(folder):
    base, cat = made("sd1")[1], folder / "cat.safetensors"
    apart = sdjax.attach(base, cat, 0.25, unet=0.5)
    assert trees.digest(apart.parts["unet"]) == trees.digest(sdjax.attach(base, cat, 0.5).parts["unet"])
    assert trees.digest(apart.parts["text_encoder"]) == trees.digest(
        sdjax.attach(base, cat, 0.25).parts["text_encoder"]
    )
    assert trees.digest(apart.parts["text_encoder"]) != trees.digest(base.parts["text_encoder"])


def test_what_comes_back_from_a_compiled_function_is_its_own(folder):
    """Two models of one kind, which differ in a word and an adapter alone, through one function."""
    sd = made("sd1")[1]
    one, other = (sd.add_word(word) for word in ("<one>", "<other>"))
    assert trees.copy(one).tokenizers == one.tokenizers
    assert trees.copy(other).tokenizers == other.tokenizers
    for strength in (0.5, 0.7):
        back = trees.copy(sdjax.attach(sd, folder / "cat.safetensors", strength))
        (item,) = back.reference.attached.stack.items
        assert item.strength == strength
