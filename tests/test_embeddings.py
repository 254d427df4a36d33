"""Textual inversions in every layout, as torch.save and safetensors write them, against diffusers with them loaded."""

import base64
import dataclasses
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from adapter_files import assert_same, fresh, made
from PIL import Image, PngImagePlugin
from test_folder import TEXTS

import sdjax
from sdjax import trees
from sdjax.formats.adapters import embedding_pixels, embeddings
from sdjax.formats.adapters.attach import Folder, attach_all, attach_found, detach, find_embeddings, split
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.sampling.settings import TextToImage
from sdjax.service import provenance
from sdjax.service.maker import Maker
from sdjax.service.request import Request
from sdjax.stable_diffusion import TOKENS
from sdjax.text.conditioning import condition
from sdjax.training import run_folder

WORD = "<toy>"
PROMPTS = [f"a photo of a {WORD} on the beach", TEXTS[1]]
ROWS = 0.3 * torch.randn(3, 32, generator=torch.Generator().manual_seed(2))
A1111 = {"string_to_token": {"*": 265}, "step": 99, "sd_checkpoint": None, "sd_checkpoint_name": None}


def original(rows):
    """Returns what the original code saves: parameters in a ParameterDict, tokens as tensors."""
    held = torch.nn.ParameterDict({"*": torch.nn.Parameter(rows)})
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": held}


def picture(rows, path):
    """Writes a picture as A1111 does, the embedding in its text."""
    values = {**A1111, "name": "toy", "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}}
    info = PngImagePlugin.PngInfo()
    info.add_text("sd-ti-embedding", base64.b64encode(json.dumps(values).encode()).decode())
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def pixels(rows, path):
    """Writes a picture as A1111 does, but without a text: the embedding is in the columns on both sides."""
    data = zlib.compress(json.dumps({**A1111, "string_to_param": {"*": {"TORCHTENSOR": rows.tolist()}}}).encode())
    height, state = 64, 0
    size = 3 * height * (len(data) // (3 * height) + 1)
    data = np.resize(np.frombuffer(data, np.uint8), size)  # again from the start where it is too short
    numbers = np.zeros(size, np.uint8)
    for i in range(size):
        state = (1664525 * state + 1013904223) % 2**32
        numbers[i] = state % 255 & 15
    style = np.random.default_rng(0).integers(0, 16, (2, size), np.uint8) << 4  # any drawing in the high bits
    halves = zip((data & 15, data >> 4), style, strict=True)
    sides = [((half ^ numbers) | one).reshape(height, -1, 3) for half, one in halves]
    black = np.zeros((height, 1, 3), np.uint8)
    middle = np.full((height, 20, 3), (200, 17, 9), np.uint8)
    middle[:, 5] = 16  # a column of the picture that looks black, too
    Image.fromarray(np.concatenate([sides[0], black, middle, black, sides[1]], 1)).save(path)


save = safetensors.torch.save_file
LAYOUTS = {
    "A1111": (f"{WORD}.pt", lambda rows, path: torch.save({**A1111, "string_to_param": {"*": rows}}, path)),
    "original": (f"{WORD}.pt", lambda rows, path: torch.save(original(rows), path)),
    "picture": (f"{WORD}.png", picture),
    "pixels": (f"{WORD}.png", pixels),
    "diffusers": ("learned_embeds.safetensors", lambda rows, path: save({WORD: rows}, path)),
    "diffusers, pickled": ("learned_embeds.bin", lambda rows, path: torch.save({WORD: rows}, path)),
    "bare": (f"{WORD}.bin", torch.save),
    "sd-scripts": (f"{WORD}.safetensors", lambda rows, path: save({"emb_params": rows}, path)),
    "OneTrainer": (f"{WORD}.safetensors", lambda rows, path: save({"emp_params": rows}, path)),
    "text encoder's name": (f"{WORD}.safetensors", lambda rows, path: save({"clip_l": rows}, path)),
    "half precision": ("any.safetensors", lambda rows, path: save({WORD: rows.half()}, path)),
}


@pytest.fixture(scope="module", params=["sd1", "sd2"])
def learned(request):
    """diffusers' pipeline that knows the word, by number of rows and type, and our model that does not."""
    pipes = {}

    def pipe(count, half=False):
        if (count, half) not in pipes:
            pipes[count, half] = fresh(request.param)
            rows = ROWS[:count].half().float() if half else ROWS[:count]
            pipes[count, half].load_textual_inversion({WORD: rows}, token=WORD)
        return pipes[count, half]

    return pipe, made(request.param)[1]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(learned, layout, tmp_path):
    name, write = LAYOUTS[layout]
    write(ROWS.clone(), tmp_path / name)
    pipe, base = learned
    sd = sdjax.attach(base, tmp_path / name)
    assert_same(sd, pipe(3, layout == "half precision"), texts=PROMPTS)
    assert len(sd.tokenizers["text_encoder"].words[WORD]) == 3


def test_one_row_without_an_axis_and_a_folder(learned, tmp_path):
    torch.save({WORD: ROWS[0].clone()}, tmp_path / "learned_embeds.bin")
    pipe, base = learned
    assert_same(sdjax.attach(base, tmp_path), pipe(1), texts=PROMPTS)


def test_a_word_of_ones_own(tmp_path):
    save({"<cat>": ROWS}, tmp_path / "cat.safetensors")
    base = made("sd1")[1]
    sd = sdjax.attach(base, tmp_path / "cat.safetensors", word="<dog>")
    assert list(sd.tokenizers["text_encoder"].words) == ["<dog>"]
    np.testing.assert_array_equal(sd.rows("<dog>")["text_encoder"], ROWS)
    size = base.tokenizers["text_encoder"].size
    np.testing.assert_array_equal(sd.table("text_encoder")[:size], base.table("text_encoder")[:size])


@pytest.mark.parametrize("word", ["photo", "a", "on the"])
def test_words_that_are_tokens_take_their_place(word, tmp_path):
    """The context of a prompt with the word is that with a word of one's own, in every grammar where it is named."""
    base = made("sd1")[1]
    tables = {name: tmp_path / f"{name}.safetensors" for name in (word, WORD)}
    for path in tables.values():
        save({"emb_params": ROWS}, path)
    ours, other = (sdjax.attach(base, path) for path in tables.values())
    text = "a photo of a dog on the beach, photographs on theatre, a  Photo ON the"
    theirs = re.sub(rf"\b{word}\b", WORD, text, flags=re.IGNORECASE)
    assert theirs != text

    def contexts(sd, text, grammar):
        return condition(sd, [text], grammar=grammar)[1].unet.context

    for grammar in ("plain", "a1111"):
        np.testing.assert_array_equal(contexts(ours, text, grammar), contexts(other, theirs, grammar))
    named, plain = f"a (embedding:{word}:1.2) photo", f"a (embedding:{WORD}:1.2) photo"
    np.testing.assert_array_equal(contexts(ours, named, "comfyui"), contexts(other, plain, "comfyui"))
    np.testing.assert_array_equal(contexts(ours, text, "comfyui"), contexts(base, text, "comfyui"))
    assert detach(ours).tokenizers["text_encoder"].words == {}


def test_another_word_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({"emb_params": ROWS}, "photo.safetensors")
    torch.save({"<dog>": ROWS}, "a=b.pt")
    sd = attach_all(made("sd1")[1], ["<cat>=photo.safetensors", "a=b.pt"])
    assert list(sd.tokenizers["text_encoder"].words) == ["<cat>", "<dog>"]
    assert split("<cat>=photo.safetensors") == ("photo.safetensors", 1.0, "<cat>")
    assert split("<cat>=photo.safetensors:0.5") == ("photo.safetensors", 0.5, "<cat>")
    assert split("a=b.pt:0.5") == ("a=b.pt", 0.5, None)
    assert split("cat.pt:0.5") == ("cat.pt", 0.5, None)
    with pytest.raises(ValueError, match="no.pt: no such file"):
        attach_all(made("sd1")[1], ["<cat>=no.pt"])
    names, hashes = provenance.of(
        made("sd1")[1], TextToImage(model="random:tiny", adapter=("<cat>=photo.safetensors",))
    )
    assert list(hashes) == ["embedding <cat>"] and names["adapter"] == ("<cat>:1",)


UNREAD = {
    "an embedding for SDXL": lambda path: save({"clip_l": ROWS, "clip_g": torch.zeros(3, 64)}, path),
    "not a whole safetensors file": lambda path: path.write_bytes(safetensors.torch.save({"emb_params": ROWS})[:-20]),
    "cannot be read: ": lambda path: path.write_text("<!DOCTYPE html><html>Please log in</html>"),
    "is not among the names that a file of weights may use": lambda path: torch.save({"x": Path}, path),
    "numbers of type F8_E8M0": lambda path: save({"emb_params": ROWS.to(torch.float8_e8m0fnu)}, path),
    "rows of width 48; this model's text_encoder takes 32": lambda path: save({"emb_params": torch.ones(2, 48)}, path),
}


@pytest.mark.parametrize("reason", UNREAD)
@pytest.mark.parametrize("grammar, text", [("a1111", "a (Toy face:1.2)"), ("comfyui", "a (embedding:toy:1.2)")])
def test_one_that_cannot_be_read_is_told_with_its_reason(reason, grammar, text, tmp_path):
    UNREAD[reason](tmp_path / "toy.safetensors")
    base = made("sd1")[1]
    found, unread = find_embeddings(base, [text], Folder(tmp_path), grammar)
    assert found == {} and attach_found(base, found) is base and list(unread) == ["toy"]
    line = unread["toy"]
    assert line.startswith(f"{tmp_path / 'toy.safetensors'}: ") and reason in line and "\n" not in line
    assert find_embeddings(base, ["a dog", "toys", "atoy"], Folder(tmp_path), grammar) == ({}, {})


def test_a_maker_notes_an_embedding_that_cannot_be_read_once_and_draws_its_word(tmp_path, capsys):
    (tmp_path / "toy.safetensors").write_text("no embedding")
    made_by, request = Maker(tmp_path), Request(TextToImage(prompt="a toy", model="random:tiny", grammar="a1111"))
    for _ in range(2):
        assert made_by.model([request]).words == {}
    note, *more = capsys.readouterr().err.splitlines()
    assert note.startswith(f"note: 'toy' is read as a plain word: {tmp_path / 'toy.safetensors'}: ") and more == []


def test_float8_rows_are_exact(tmp_path):
    save({WORD: ROWS.to(torch.float8_e4m3fn)}, tmp_path / "eight.safetensors")
    sd = sdjax.attach(made("sd1")[1], tmp_path / "eight.safetensors")
    rows = sd.rows(WORD)["text_encoder"]
    np.testing.assert_array_equal(rows, ROWS.to(torch.float8_e4m3fn).float())


def test_a_folder_with_words_of_every_prompt(tmp_path):
    """Files called "a" and "bad hands", a LoRA and a preview called "photo": every prompt is made."""
    for name in ("a", "bad hands"):
        save({"emb_params": ROWS}, tmp_path / f"{name}.safetensors")
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    save({f"{name}.lora_down.weight": torch.ones(2, 48)}, tmp_path / "photo.safetensors")
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    base = made("sd1")[1]
    found, unread = find_embeddings(base, ["a photo", "BAD  hands, blurry"], Folder(tmp_path), "a1111")
    sd = attach_found(base, found)
    assert list(sd.tokenizers["text_encoder"].words) == ["a", "bad hands"] and unread == {}
    _, cond, negative = condition(sd, ["a photo"], ["BAD  hands, blurry"])
    known = sd.tokenizers["text_encoder"].words
    assert cond.words["text_encoder"]["ids"][0, 1:4].tolist() == list(known["a"])
    assert negative.words["text_encoder"]["ids"][0, 1:4].tolist() == list(known["bad hands"])


def test_tables_grow_in_blocks(tmp_path):
    """Embeddings of 27 and of 30 rows leave the same shapes, so that one program serves both."""
    save({"<cat>": ROWS.repeat(9, 1)}, tmp_path / "cat.safetensors")
    save({"<dog>": ROWS.repeat(10, 1)}, tmp_path / "dog.safetensors")
    both = [sdjax.attach(made("sd1")[1], tmp_path / f"{name}.safetensors", keep=False) for name in ("cat", "dog")]
    sizes = {trees.flatten(sd.parts["text_encoder"])[TOKENS].shape for sd in both}
    assert sizes == {(576, 32)} and both[0].networks == both[1].networks


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"emb_params": torch.zeros(2, 48)}, "rows of width 48; this model's text_encoder takes 32"),
        ({"clip_l": torch.zeros(2, 32), "clip_g": torch.zeros(2, 64)}, "an embedding for SDXL"),
        ({"emp_params": torch.zeros(2, 32), "emp_params_out": torch.zeros(2, 32)}, "emp_params_out"),
        ({"<a>": torch.zeros(2, 32), "<b>": torch.zeros(2, 32)}, "an embedding file holds one tensor, not 2"),
        ({"emb_params": torch.zeros(2, 2, 32)}, r"a tensor \[2, 2, 32\]; an embedding has rows"),
    ],
)
def test_what_is_no_embedding_for_this_model(state, message, tmp_path):
    save(state, tmp_path / "<x>.safetensors")
    with pytest.raises(ValueError, match=message):
        sdjax.attach(made("sd1")[1], tmp_path / "<x>.safetensors")


def test_a_pictures_pixels(tmp_path):
    """The sequence is that of A1111's own test; pictures that hold nothing, and a stream that is too long."""
    assert embedding_pixels.sequence(12).tolist() == [253, 242, 127, 44, 157, 27, 239, 133, 38, 79, 167, 4]
    path = tmp_path / "x.png"
    pixels(ROWS, path)
    whole = np.array(Image.open(path))
    black = np.zeros((40, 40, 3), np.uint8)
    for other in (black, np.full_like(black, 255), np.where(np.arange(40)[:, None] % 9, 90, black), whole[:, ::-1]):
        Image.fromarray(other.astype(np.uint8)).save(path)
        assert embeddings.from_picture(path) is None
    Image.fromarray(whole).save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(embedding_pixels, "MOST", 100)
        with pytest.raises(ValueError, match="x.png: its pixels cannot be read: .* more than 100 bytes"):
            embeddings.from_picture(path)


def test_words_that_are_there_and_strengths(tmp_path):
    for name in ("one", "two"):
        save({WORD: ROWS}, tmp_path / f"{name}.safetensors")
    sd = sdjax.attach(made("sd1")[1], tmp_path / "one.safetensors")
    with pytest.raises(ValueError, match="word='<toy>': the model knows it already"):
        sdjax.attach(sd, tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="strength=0.5: an embedding has none"):
        sdjax.attach(sd, tmp_path / "two.safetensors", 0.5)
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    with pytest.raises(ValueError, match="plain.png: of no known kind; expected one of .*embedding"):
        sdjax.attach(sd, tmp_path / "plain.png")
    several = {**A1111, "string_to_param": {"*": ROWS, "+": ROWS}}
    torch.save(several, tmp_path / "several.pt")
    with pytest.raises(ValueError, match="string_to_param: one word's rows are expected"):
        sdjax.attach(sd, tmp_path / "several.pt")


def test_embeddings_bundled_with_lora(tmp_path):
    """Layouts of A1111 and OneTrainer; the word is part of the tensor's name."""
    name = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    factors = {f"{name}.lora_down.weight": torch.randn(2, 32), f"{name}.lora_up.weight": torch.randn(32, 2)}
    bundle = {"bundle_emb.<one>.string_to_param.*": ROWS, "bundle_emb.<two>.clip_l": ROWS[:1].clone()}
    save({**factors, **bundle}, tmp_path / "both.safetensors")
    base = made("sd1")[1]
    sd = sdjax.attach(base, tmp_path / "both.safetensors", 0.5)
    assert sorted(sd.tokenizers["text_encoder"].words) == ["<one>", "<two>"]
    np.testing.assert_array_equal(sd.rows("<one>")["text_encoder"], ROWS)
    changed = trees.flatten(sd.parts["text_encoder"])["text_model.encoder.layers.0.self_attn.q_proj.kernel"]
    wanted = 0.5 * (factors[f"{name}.lora_up.weight"] @ factors[f"{name}.lora_down.weight"]).numpy().T
    start = trees.flatten(base.parts["text_encoder"])["text_model.encoder.layers.0.self_attn.q_proj.kernel"]
    np.testing.assert_allclose(changed - start, wanted, atol=1e-5)


def test_what_we_write_names_the_method_and_its_settings(tmp_path):
    method = TextualInversion("<cat>", "cat", 2)
    path = run_folder.export(
        method, made("sd1")[1], {"rows": {"text_encoder": np.ones((2, 32), np.float32)}}, tmp_path
    )[0]
    with safetensors.safe_open(path, "numpy") as file:
        about, rows = file.metadata(), file.get_tensor("<cat>")
    assert about["format"] == "pt" and about["method"] == "TextualInversion"
    assert json.loads(about["settings"]) == dataclasses.asdict(method)
    np.testing.assert_array_equal(rows, np.ones((2, 32)))
