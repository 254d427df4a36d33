"""The programs of sample/: what they write beside pictures, and pictures made again from their files alone."""

import adapter_files
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from programs import sample
from safetensors.numpy import load_file, save_file

import sdjax
from sdjax import trees
from sdjax.formats import pipeline
from sdjax.formats.models import single_file
from sdjax.runtime import compile_cache
from sdjax.sampling import generate, inpainting, upscaling
from sdjax.sampling.settings import ImageToImage, Interpolate, TextToImage
from sdjax.service import programs, records, remade

A1111 = (
    "a (cat:1.3) in [snow]\nNegative prompt: dog\nSteps: 2, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, "
    "Seed: 1, Size: 32x48, ENSD: 31337, RNG: CPU, Version: v1.10.1"
)


@pytest.fixture(scope="module")
def sd():
    return pipeline.load("random:tiny")


@pytest.fixture(autouse=True)
def programs_as_they_are(monkeypatch):
    monkeypatch.setattr(compile_cache, "keep", lambda **_: None)


def run(name, out, *arguments):
    """Returns the paths of what a program wrote, or None where it failed."""
    made = sample(name, out, *arguments)
    return made if isinstance(made, list) else None


def pixels(path):
    return np.asarray(Image.open(path))


@pytest.mark.parametrize(
    "names, number", [((), 0), (("00004.png", "00007-2.png", "notes.txt"), 8), (("99999.png", "100000.png"), 100001)]
)
def test_numbers_go_on_after_five_digits(tmp_path, names, number):
    for name in names:
        (tmp_path / name).touch()
    assert programs._next_number(tmp_path) == number


def test_a_picture_is_made_again_from_its_file_alone(tmp_path):
    settings = ["--steps", "3", "--sampler", "euler_a", "--guidance", "4", "--size", "48x32", "--seed", "5"]
    settings += ["--grammar", "a1111", "--noise-source", "torch-cpu", "--ensd", "7", "--rescale", "0.3"]
    settings += ["--negative-prompt", "red", "--variation", "0.2", "--variation-seed", "9", "--schedule", "karras"]
    (first,) = run("text2img", tmp_path / "a", "--model", "random:tiny", "--prompt", "a (face:1.2)", *settings)
    (again,) = run("text2img", tmp_path / "b", "--from-image", str(first))
    assert first.read_bytes() == again.read_bytes() and pixels(first).shape == (32, 48, 3)
    assert records.read(first) == records.read(first.with_suffix(".json"))
    (other,) = run("text2img", tmp_path / "c", "--from-image", str(first), "--seed", "6")
    assert records.read(other)["seed"] == 6 and records.read(other)["sampler"] == "euler_a"
    assert np.abs(pixels(other).astype(int) - pixels(first)).max() > 8


def test_a_picture_of_a1111_is_made_again(tmp_path, sd):
    info = PngInfo()
    info.add_text("parameters", A1111)
    Image.new("RGB", (32, 48)).save(tmp_path / "a.png", pnginfo=info)
    (made,) = run("text2img", tmp_path / "b", "--model", "random:tiny", "--from-image", str(tmp_path / "a.png"))
    wanted = sdjax.text2img(
        sd, ["a (cat:1.3) in [snow]"], negative_prompt=["dog"], steps=2, sampler="euler_a", schedule="karras",
        guidance=7.0, seeds=[1], size=(48, 32), grammar="a1111", noise_source="torch-cpu", ensd=31337,
    )  # fmt: skip
    np.testing.assert_array_equal(pixels(made), wanted[0])
    assert records.text(records.read(made)).startswith(A1111.partition(", ENSD")[0].rpartition(", Size")[0])


@pytest.fixture
def stubs(monkeypatch, sd):
    """Programs without sampling: every task gives grey pictures."""

    def grey(sd, job, *more):
        return np.full((len(job.pictures), 64, 64, 3), 127, np.uint8)

    functions = {generate: ("drawn", "redrawn"), inpainting: ("repainted",), upscaling: ("enlarged", "redone")}
    for module, names in functions.items():
        for name in names:
            monkeypatch.setattr(module, name, grey)
    monkeypatch.setattr(pipeline, "load", lambda *source, **given: sd)


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_private_things_are_left_out(tmp_path, stubs, ending, monkeypatch):
    words = ["--prompt", "my secret", "--negative-prompt", "a rival", "--model", "random:tiny"]
    kept, public = (
        run("text2img", tmp_path / f"{i}", *words, "--format", ending, "--steps", "7", *more)[0]
        for i, more in enumerate(([], ["--public"]))
    )
    assert kept.suffix == public.suffix == f".{ending}"
    assert [records.read(kept)[name] for name in ("prompt", "model")] == ["my secret", "random:tiny"]
    assert records.read(public) == records.public(records.read(kept)) and records.read(public)["steps"] == 7
    everything = b"".join(path.read_bytes() for path in public.parent.iterdir())
    for word in ("secret", "rival", "tiny"):
        assert word.encode() not in everything and word.encode("utf-16-be") not in everything


def test_every_program_says_what_it_did(tmp_path, stubs):
    given = tmp_path / "given.png"
    Image.new("RGB", (32, 32), "white").save(given)
    base = ["--model", "random:tiny", "--prompt", "a cat", "--image", str(given)]
    (img2img,) = run("img2img", tmp_path / "a", *base, "--strength", "0.4", "--resize", "fill")
    (inpaint,) = run("inpaint", tmp_path / "b", *base, "--mask", str(given), "--feather", "0")
    (upscale,) = run("upscale", tmp_path / "c", *base, "--noise-level", "30", "--tile", "16")
    control = [*base[:4], "--control", "random:tiny", "--control-image", str(given), "--weight", "0.5"]
    (controlnet,) = run("controlnet", tmp_path / "e", *control)
    read = {path.parent.name: records.read(path) for path in (img2img, inpaint, upscale, controlnet)}
    assert [read[name].task for name in "abce"] == ["img2img", "inpaint", "upscale", "controlnet"]
    assert (read["a"]["strength"], read["b"]["strength"]) == (0.4, 1.0) and "strength" not in read["e"].settings
    assert (read["a"]["resize"], read["a"]["image"], read["a"].more) == ("fill", "given.png", {})
    assert (read["b"]["mask"], read["b"]["feather"]) == ("given.png", 0)
    assert (read["c"]["noise_level"], read["c"]["tile"], read["c"]["size"]) == (30, 16, (32, 32))
    assert (read["e"]["weight"], read["e"]["control"]) == ((0.5,), ("random:tiny",))
    assert remade.values(img2img, "img2img")["strength"] == 0.4 and remade.values(inpaint, "inpaint")["feather"] == 0
    (again,) = run("upscale", tmp_path / "d", "--from-image", str(upscale), "--image", str(given))
    assert records.read(again) == read["c"]
    for path, record in zip((img2img, inpaint, upscale, controlnet), read.values(), strict=True):
        with Image.open(path) as image:
            assert records.parse(image.info["parameters"]) == record


def test_what_a_file_cannot_say_is_asked_for(tmp_path, stubs, capsys):
    """A record never names a file to open: other models, adapters and pictures are the command line's."""
    grey = np.full((8, 8, 3), 127, np.uint8)
    made = TextToImage(prompt="a", model="random:tiny")
    for name, record in {
        "model": records.of(made, (8, 8), {"model": "v1-5"}, hashes={"model": "6ce0161689"}),
        "img2img": records.of(ImageToImage(prompt="a", model="random:tiny", strength=0.5, image="x.png"), (8, 8)),
        "path": records.of(Interpolate(prompt="a", model="random:tiny"), (8, 8)),
    }.items():
        records.save(tmp_path / f"{name}.png", grey, record)
        assert run("text2img", tmp_path / "out", "--from-image", str(tmp_path / f"{name}.png")) is None
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3 and all(line.startswith("error: --from-image") for line in said)
    assert "--model" in said[0] and "sdjax img2img" in said[1] and "sdjax interpolate" in said[2]
    assert run("text2img", tmp_path / "out", "--from-image", str(tmp_path / "model.png"), "--model", "random:tiny")
    assert "was made with model 6ce0161689" in capsys.readouterr().err
    assert run("text2img", tmp_path / "out") is None
    assert capsys.readouterr().err == "error: --prompt: missing; expected a text\n"


def test_single_files_are_read_as_asked_for(tmp_path, capsys, monkeypatch):
    """Without the hub: vocabulary, averaged weights, what is predicted, and an autoencoder of its own."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    made = adapter_files.made("sd1")[1]
    folder, file = sdjax.save(made, tmp_path / "folder"), sdjax.save(made, tmp_path / "m.safetensors", "single-file")
    tensors = load_file(file)
    unet = single_file.UNET
    averages = {single_file.averaged(name): x + 0.1 for name, x in tensors.items() if name.startswith(unet)}
    save_file(tensors | averages, tmp_path / "both.safetensors")
    vae = {name.removeprefix(single_file.VAE): -x for name, x in tensors.items() if name.startswith(single_file.VAE)}
    save_file(vae, tmp_path / "vae-x.safetensors")
    words = ["--prompt", "a", "--steps", "3", "--size", "32", "--model", str(tmp_path / "both.safetensors")]
    assert run("text2img", tmp_path / "0", *words) is None
    assert "error: --tokenizer: " in capsys.readouterr().err
    words += ["--tokenizer", str(folder / "tokenizer")]
    given = {"a": [], "b": ["--ema"], "c": ["--prediction-type", "v_prediction"]}
    given["d"] = ["--vae", str(tmp_path / "vae-x.safetensors")]
    paths = {name: run("text2img", tmp_path / name, *words, *more)[0] for name, more in given.items()}
    shown = {name: pixels(path).astype(int) for name, path in paths.items()}
    whole = pipeline.load("random:tiny", vae=folder)
    assert (
        trees.digest(whole.parts["vae"]) == trees.digest(made.parts["vae"])
        and whole.networks["vae"] == made.networks["vae"]
    )
    differ = {name: int(np.abs(shown["a"] - shown[name]).max()) for name in "bcd"}
    assert min(differ.values()) > 2, differ
    record = records.read(paths["d"])
    assert record["vae"] == "vae-x" and len(record.hashes["vae"]) == 10
    assert records.parse(records.text(record)).hashes["vae"] == record.hashes["vae"]
    (again,) = run("text2img", tmp_path / "f", "--from-image", str(paths["b"]), *words[6:])
    np.testing.assert_array_equal(pixels(again), shown["b"])
    off = run("text2img", tmp_path / "g", "--from-image", str(paths["b"]), *words[6:], "--no-ema")
    np.testing.assert_array_equal(pixels(off[0]), shown["a"])
    capsys.readouterr()
    assert run("text2img", tmp_path / "0", "--prompt", "a", "--model", "random:tiny", "--ema") is None
    assert run("text2img", tmp_path / "0", *words[:6], "--model", str(file), "--ema") is None
    assert run("text2img", tmp_path / "0", *words, "--vae", str(tmp_path / "none")) is None
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: --ema=True: random:tiny is not one; expected a single file")
    assert said[1].startswith("error: --ema=True: ") and "holds no averaged" in said[1]
    assert "--vae=" in said[2] and len(said) == 3


def test_seeds_and_variations_count_as_in_a1111(tmp_path, stubs, capsys):
    words = ["--model", "random:tiny", "--prompt", "a"]
    one, two = run("text2img", tmp_path / "a", *words, "--count", "2", "--seed", "4", "--variation", "0.2")
    assert [records.read(path)["seed"] for path in (one, two)] == [4, 4]
    assert [records.read(path)["variation_seed"] for path in (one, two)] == [0, 1]
    plain = run("text2img", tmp_path / "b", *words, "--count", "2", "--seed", "4")
    assert [records.read(path)["seed"] for path in plain] == [4, 5]
    capsys.readouterr()
    drawn = [records.read(*run("text2img", tmp_path / out, *words, "--seed", "-1"))["seed"] for out in "cd"]
    assert drawn[0] != drawn[1] and min(drawn) >= 0 and f"--seed {drawn[0]}\n" in capsys.readouterr().out


def test_what_the_plain_grammar_does_not_read_is_said(tmp_path, stubs, capsys):
    words = ["--model", "random:tiny", "--grammar", "plain", "--prompt"]
    for prompt, said in (
        ("a <lora:x:1>", "<lora:x:1> is read as words"),
        ("a " * 200, "tokens; the model reads the first"),
    ):
        assert run("text2img", tmp_path / "a", *words, prompt, prompt)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
        assert len(lines) == 1 and said in lines[0] and "--grammar a1111" in lines[0]
    assert run("text2img", tmp_path / "a", *words, "a (cat)")
    assert "note:" not in capsys.readouterr().err


def test_a_learned_word_that_is_not_there_is_said(tmp_path, stubs, capsys):
    for prompt, word in (("a <new> face", "<new>"), ("a photo of *s", "*s")):
        assert run("text2img", tmp_path / "a", "--model", "random:tiny", "--prompt", prompt)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note:")]
        assert line.startswith(f"note: {word} is not a word that the model has learned; --adapter FILE")


def test_no_picture_is_overwritten(tmp_path, stubs):
    words, names = ["--model", "random:tiny", "--prompt", "a"], []
    for seed, ending in ((0, "png"), (0, "png"), (3, "jpg")):
        names += run("text2img", tmp_path, *words, "--seed", seed, "--format", ending)
    assert [path.name for path in names] == ["00000-0.png", "00001-0.png", "00002-3.jpg"]


def test_programs_read_prompts_as_a1111_does(tmp_path, stubs):
    words = ["--model", "random:tiny", "--prompt", "a (face:1.2)"]
    grammars = [
        records.read(*run("text2img", tmp_path, *words, *more))["grammar"] for more in ([], ["--grammar", "plain"])
    ]
    assert grammars == ["a1111", "plain"] and TextToImage().grammar == "plain"


def test_samplers_by_the_names_of_a1111(tmp_path, stubs):
    def used(*more):
        record = records.read(*run("text2img", tmp_path, "--model", "random:tiny", "--prompt", "a", *more))
        return record["sampler"], record["schedule"]

    assert used("--sampler", "Euler a") == ("euler_a", "normal")
    assert used("--sampler", "DPM++ 2M Karras") == ("dpmpp_2m", "karras")
    assert used("--sampler", "DPM++ 2M Karras", "--schedule", "Exponential") == ("dpmpp_2m", "exponential")


def test_errors_name_their_own_flag(tmp_path, stubs, capsys):
    folder, base = tmp_path / "folder", ["--model", "random:tiny", "--prompt", "a"]
    folder.mkdir()
    Image.new("RGB", (32, 32)).save(folder / "a.png")
    (tmp_path / "broken.png").write_text("no picture")
    given, none = str(folder / "a.png"), str(tmp_path / "nope.png")
    for task, flags, said in (
        ("img2img", ["--image", str(folder)], "is a folder; expected one picture"),
        ("img2img", ["--image", none], "no such file; expected a picture's file"),
        ("img2img", ["--image", str(tmp_path / "broken.png")], "expected a picture"),
        ("text2img", ["--image", str(folder)], "is a folder; expected one picture"),
        ("inpaint", ["--image", given, "--mask", none], "--mask="),
        ("controlnet", ["--control", "random:tiny", "--control-image", none], "--control-image="),
        ("text2img", ["--hires", "0"], "--hires='0': expected more than 0, to 64"),
        ("text2img", ["--hires", "-1"], "--hires='-1': expected more than 0, to 64"),
        ("text2img", ["--hires", "inf"], "--hires='inf': expected more than 0, to 64"),
        ("text2img", ["--hires", "nan"], "--hires='nan': expected more than 0, to 64"),
        ("text2img", ["--hires-steps", "3"], "--hires-steps=3: expected together with hires"),
        ("text2img", ["--clip-skip", "0"], "--clip-skip='0': expected a whole number, 1 or more"),
        ("text2img", ["--batch", "0"], "--batch=0: expected a whole number, 1 or more"),
    ):
        capsys.readouterr()
        assert run(task, tmp_path / "out", *base, *flags) is None
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert line.startswith(f"error: {flags[-2]}=") and said in line, line


def test_hires_fix_of_a1111(tmp_path, capsys):
    text = A1111.replace("RNG: CPU", "Denoising strength: 0.5, Hires {}, Emphasis: No norm, RNG: CPU")
    found = {}
    for name, said in {
        "plain": "upscale: 2, Hires upscaler: Latent",
        "other": "upscale: 1.5, Hires upscaler: Latent (bicubic antialiased)",
        "model": "resize: 64x96, Hires upscaler: R-ESRGAN 4x+",
        "wide": "resize: 96x96, Hires upscaler: Lanczos",
    }.items():
        info = PngInfo()
        info.add_text("parameters", text.format(said))
        Image.new("RGB", (8, 8)).save(tmp_path / f"{name}.png", pnginfo=info)
        if name != "wide":
            found[name] = remade.values(tmp_path / f"{name}.png", "text2img")
    assert found["plain"]["hires"] == 2 and found["model"]["hires"] == 2
    assert [one["hires_method"] for one in found.values()] == ["latent", "latent", "lanczos"]
    assert all(one["hires_strength"] == 0.5 and "strength" not in one for one in found.values())
    said = [line for line in capsys.readouterr().err.splitlines() if "Emphasis" not in line]
    assert len(said) == 2 and "Latent (bicubic antialiased), which sdjax does not have: latent" in said[0]
    assert "R-ESRGAN" in said[1]
    with pytest.raises(ValueError, match="Hires resize 96x96 of 32x48: expected"):
        remade.values(tmp_path / "wide.png", "text2img")


def test_a_picture_that_is_not_finite_is_not_written(tmp_path, capsys):
    asked = ["--model", "random:tiny", "--prompt", "a face", "--steps", "2", "--guidance"]
    assert run("text2img", tmp_path / "out", *asked, "3e38") is None
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: latents: not finite from step 1 of 2 on, in 1 of 1")
    )
    assert run("text2img", tmp_path / "out", *asked, "1e39") is None
    assert capsys.readouterr().err.startswith("error: --guidance='1e39': expected a finite number")
    assert not list(tmp_path.rglob("*.png"))
