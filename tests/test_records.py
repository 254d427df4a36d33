"""Records: A1111's text both ways, files whole or not at all, and what other programs read in them."""

import dataclasses
import hashlib
import json
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sdjax.formats import pipeline
from sdjax.formats.storage import hashes
from sdjax.sampling import generate
from sdjax.sampling.fields import Size, fields
from sdjax.sampling.hires_settings import AGAIN
from sdjax.sampling.settings import TASKS, ImageToImage, TextToImage
from sdjax.service import maker, provenance, records
from sdjax.service.records import Record, parse, public, read, save, text
from sdjax.service.request import Request

PICTURE = np.random.default_rng(0).integers(0, 256, (16, 24, 3), np.uint8)
FULL = records.of(
    TextToImage(
        prompt='a (cat:1.3), "quoted"\nsecond line: 1, 2', negative_prompt="ugly, [blurry]\nbad: hands", steps=28,
        sampler="dpmpp_2m", schedule="karras", guidance=6.5, seed=2**40 + 1, grammar="a1111", weighting="comfyui",
        noise_source="torch-cpu", clip_skip=2, rescale=0.7, eta=0.3, ensd=31337, variation_seed=99, variation=0.25,
        churn_high=float("inf"), hires=2.0, hires_strength=0.55, ema=True,
    ),
    (768, 512),
    {"model": "my, model: v1", "vae": "vae-ft-mse", "image": "me, too.png", "adapter": ("ink:0.5", "<lora:oil:1>")},
    hashes={"model": "6ce0161689", "vae": "f921fb3f29", "lora ink": "0123456789ab", "embedding <me>": "aabbccddee"},
    more={"Comment": "a, b: c", "Civitai resources": '[{"x": 1, "y": "z"}]'},
)  # fmt: skip


def a1111(task="text2img", hashes=(), more=(), **settings):
    """Returns the Record of a text of A1111 that says these settings; all others are as usual there."""
    usual = {"sampler": "euler", "schedule": "automatic", "guidance": 7.0, "grammar": "a1111", "noise_source": "philox"}
    made = records.of(TASKS[task](**usual), (512, 512))
    said = made.settings | {"model": ""} | settings
    return Record(task, said, dict(hashes), dict(more))


# As A1111 1.10 writes them, and what they stand for.
WRITTEN = {
    "a cat\nNegative prompt: dog\nSteps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 7, Seed: 1, "
    "Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned-emaonly, Denoising strength: 0.7, Clip skip: 2, "
    'ENSD: 31337, RNG: CPU, Hires upscale: 2, Hires upscaler: Latent, Lora hashes: "ink: 0123456789ab, b: 22", '
    'TI hashes: "bad-hands-5: aa7651be154c", Version: v1.10.1': a1111(
        prompt="a cat",
        negative_prompt="dog",
        sampler="dpmpp_2m",
        schedule="karras",
        guidance=7.0,
        seed=1,
        size=(768, 512),
        noise_source="torch-cpu",
        clip_skip=2,
        hires_strength=0.7,
        ensd=31337,
        model="v1-5-pruned-emaonly",
        hashes={
            "model": "6ce0161689",
            "lora ink": "0123456789ab",
            "lora b": "22",
            "embedding bad-hands-5": "aa7651be154c",
        },
        hires=2.0,
        hires_method="latent",
        **dict.fromkeys(f"hires_{name}" for name in AGAIN),
    ),
    "girl with an artist's beret, determined, ((eyeshadow)), intricate\nNegative prompt: ugly, fat, [blurry]\n"
    "Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x512, Model hash: 45dee52b": a1111(
        prompt="girl with an artist's beret, determined, ((eyeshadow)), intricate",
        negative_prompt="ugly, fat, [blurry]",
        sampler="euler_a",
        schedule="automatic",
        guidance=7.0,
        seed=965400086,
        hashes={"model": "45dee52b"},
    ),
    "Steps: 5, Sampler: DPM++ 2M SDE Karras, CFG scale: 3.5, Seed: 2, Variation seed: 7, Variation seed strength: 0.1, "
    "Size: 64x32, Hypernet: old, Hypernet strength: 0.5": a1111(
        prompt="<hypernet:old:0.5>",
        steps=5,
        sampler="dpmpp_2m_sde",
        schedule="karras",
        guidance=3.5,
        seed=2,
        size=(32, 64),
        variation_seed=7,
        variation=0.1,
    ),
    "one\ntwo\n\nNegative prompt: a\nb\nSteps: 30, Sampler: Restart, Schedule type: KL Optimal, Seed: 3": a1111(
        prompt="one\ntwo\n",
        negative_prompt="a\nb",
        steps=30,
        sampler="Restart",
        schedule="KL Optimal",
        guidance=7.0,
        seed=3,
    ),
}


@pytest.mark.parametrize("written", WRITTEN, ids=range(len(WRITTEN)))
def test_what_a1111_wrote_is_understood(written):
    assert parse(written) == WRITTEN[written]


def test_the_text_is_a1111s():
    made = TextToImage(
        prompt="a cat", negative_prompt="dog", sampler="dpmpp_2m", schedule="karras", guidance=7.0, seed=1,
        grammar="a1111", noise_source="torch-cpu", clip_skip=2, hires=2.0, hires_strength=0.5,
        seamless=True, hires_prompt="a, b", hires_sampler="euler", hires_guidance=3.0,
    )  # fmt: skip
    hashes = {"model": "6ce0161689", "lora ink": "012345"}
    head, version = text(records.of(made, (768, 512), {"model": "v1-5"}, hashes=hashes)).split(", Version: sdjax ")
    first, *words = head.replace('"ink: 012345"', "ink").split(", ")
    assert first == "a cat\nNegative prompt: dog\nSteps: 20" and version.count(".") == 2
    assert words[:5] == ["Sampler: DPM++ 2M", "Schedule type: Karras", "CFG scale: 7", "Seed: 1", "Size: 512x768"]
    assert words[5:8] == ["Tiling: True", "Model hash: 6ce0161689", "Model: v1-5"] and words[-1] == "Lora hashes: ink"
    more = {"Clip skip: 2", "RNG: CPU", "Denoising strength: 0.5", "Hires upscale: 2", "Hires upscaler: Latent"}
    more |= {'Hires prompt: "a', 'b"', "Hires sampler: Euler", "Hires CFG Scale: 3"}
    assert set(words[8:-1]) == more | {"Task: text2img"}
    assert records.request(parse(text(records.of(made)))) == dataclasses.replace(made, size=Size(512, 512))


@pytest.mark.parametrize("task", TASKS)
def test_every_setting_survives_the_text_and_the_record(task):
    """Those of each task, each with another value than the usual one."""
    made = TASKS[task](**{name: other(one) for name, one in fields(TASKS[task]).items() if name not in FITTED})
    record = records.of(made, (64, 32))
    assert parse(text(record)) == record == records.from_json(records.to_json(record))
    unusual = {name for name in record.settings if record[name] != fields(TASKS[task])[name].usual}
    assert unusual == record.settings.keys() - FITTED
    again = records.request(record, **{name: getattr(made, name) for name in ("tokenizer",)})
    assert again == dataclasses.replace(made, size=Size(64, 32))


FITTED = {"preset", "hires", "hires_strength", "hires_steps", "hires_method", "guidance_start", "noise_level"}
FITTED |= {"seamless", *(f"hires_{name}" for name in AGAIN)}  # not with tiles; with hires


def other(one):
    """Returns a value of a setting that is not the usual one."""
    if one.choices is not None and not one.several:
        return next(name for name in reversed(one.choices) if name not in (one.usual, one.unsaid))
    kinds = {bool: not one.usual, int: 7, float: 0.125, str: "a, b", Size: Size(64, 32)}
    if one.name == "preprocess":
        return ("canny:low=50,high=60",)
    if one.name == "control_mode":
        return ("prompt",)
    return ("a b" if one.kind is str else kinds[one.kind],) if one.several else kinds[one.kind]


def test_every_name_survives_the_text():
    assert parse(text(FULL)) == FULL
    for name, one in fields(TextToImage).items():
        for choice in one.choices or ():
            record = dataclasses.replace(FULL, settings=FULL.settings | {name: choice})
            assert parse(text(record)) == record == records.from_json(records.to_json(record))


def test_the_names_are_those_of_the_samplers_and_noises():
    from sdjax.diffusion import samplers, sigmas
    from sdjax.images import resize
    from sdjax.sampling import foreign_noise
    from sdjax.text import conditioning

    names = {name: set(one.choices) for name, one in fields(ImageToImage).items() if one.choices}
    assert names["sampler"] == set(samplers.known()) and names["schedule"] == {"automatic", *sigmas.SPACINGS}
    assert names["noise_source"] == set(foreign_noise.SOURCES) and names["resize"] == set(resize.MODES)
    assert names["grammar"] == set(conditioning.GRAMMARS) and names["weighting"] == set(conditioning.WEIGHTINGS)


AWKWARD = records.of(
    TextToImage(
        prompt="  Negative prompt: x\nSteps: 1, Sampler: Euler, Seed: 5",
        negative_prompt="日本語 \U0001f642\n",
        eta=1e-5,
    )
)


@pytest.mark.parametrize("record", [Record(), FULL, AWKWARD], ids=["least", "full", "awkward"])
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "b c.JPEG"])
def test_files_give_back_what_was_saved(tmp_path, name, record):
    """Exactly, in every format, where A1111's text alone could not; pixels too where the format keeps them."""
    path = tmp_path / name
    save(path, PICTURE, record, quality=100)
    assert read(path) == read(path.with_suffix(".json")) == record
    assert sorted(os.listdir(tmp_path)) == sorted([name, path.with_suffix(".json").name])
    pixels = np.asarray(Image.open(path))
    assert pixels.shape == PICTURE.shape
    if path.suffix in (".png", ".webp"):
        np.testing.assert_array_equal(pixels, PICTURE)


def png_chunks(data):
    """{keyword: text} of the tEXt and iTXt chunks, by the PNG specification."""
    at, found = 8, {}
    while at < len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        if kind == b"tEXt":
            word, _, value = body.partition(b"\0")
            found[word.decode()] = value.decode("latin-1")
        elif kind == b"iTXt":
            word, _, rest = body.partition(b"\0")
            found[word.decode()] = rest[2:].split(b"\0", 2)[2].decode("utf-8")
        at += 12 + length
    return found


@pytest.mark.parametrize("record", [FULL, AWKWARD])
def test_png_holds_the_text_under_a1111s_word(tmp_path, record):
    save(tmp_path / "a.png", PICTURE, record)
    chunks = png_chunks((tmp_path / "a.png").read_bytes())
    assert chunks["parameters"] == text(record) and json.loads(chunks["sdjax"])["settings"]["seed"] == record["seed"]


@pytest.mark.parametrize("name", ["a.jpg", "a.webp"])
def test_exif_holds_the_text_as_piexif_writes_it(tmp_path, name):
    """piexif's "unicode": eight bytes UNICODE, then UTF-16 with the high byte first."""
    save(tmp_path / name, PICTURE, FULL)
    assert b"UNICODE\0" + text(FULL).encode("utf-16-be") in (tmp_path / name).read_bytes()
    entry = struct.pack(">HHI", 0x9286, 7, 8 + 2 * len(text(FULL)))  # the tag, of type UNDEFINED
    assert entry in (tmp_path / name).read_bytes()
    with Image.open(tmp_path / name) as image:
        exif = image.getexif()
    assert exif.get_ifd(0x8769) == {0x9286: b"UNICODE\0" + text(FULL).encode("utf-16-be")} and len(exif) == 2


@pytest.mark.parametrize(
    "comment",
    [
        b"UNICODE\0" + "ä cat\nSteps: 3, Sampler: Euler, Seed: 4".encode("utf-16-be"),
        b"UNICODE\0" + "ä cat\nSteps: 3, Sampler: Euler, Seed: 4".encode("utf-16-le"),
        b"ASCII\0\0\0" + "ä cat\nSteps: 3, Sampler: Euler, Seed: 4".encode(),
    ],
)
def test_comments_of_other_programs(tmp_path, comment):
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = comment
    Image.fromarray(PICTURE).save(tmp_path / "a.jpg", exif=exif)
    record = read(tmp_path / "a.jpg")
    assert [record[name] for name in ("prompt", "steps", "sampler", "seed")] == ["ä cat", 3, "euler", 4]


def test_pictures_of_a1111(tmp_path):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    written = next(iter(WRITTEN))
    info.add_text("parameters", written)
    Image.fromarray(PICTURE).save(tmp_path / "a.png", pnginfo=info)
    assert read(tmp_path / "a.png") == WRITTEN[written]


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp"])
def test_private_things_are_left_out_everywhere(tmp_path, name):
    save(tmp_path / name, PICTURE, FULL, private=False)
    assert read(tmp_path / name) == public(FULL)
    assert [public(FULL)[name] for name in ("seed", "steps", "sampler", "hires")] == [2**40 + 1, 28, "dpmpp_2m", 2.0]
    everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    for word in ("cat", "ugly", "my, model", "6ce0161689", "0123456789ab", "ink", "vae-ft", "Civitai"):
        assert word.encode() not in everything and word.encode("utf-16-be") not in everything


def test_nothing_stands_half_written(tmp_path, monkeypatch):
    save(tmp_path / "a.png", PICTURE, FULL)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def fail(image, path, *args, **options):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "a.png", PICTURE, FULL)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path / "b.png", PICTURE, FULL, beside=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_picture_is_made_again_from_its_file(tmp_path):
    sd = pipeline.load("random:tiny")
    how = dict(
        steps=3, sampler="euler_a", guidance=4.0, negative_prompt="red", grammar="a1111", noise_source="torch-cpu",
        variation_seed=9, variation=0.2, model="random:tiny",
    )  # fmt: skip
    job = generate.job(TextToImage, ["a cat", "a (face:1.3) in the [snow:night:0.5]"], seeds=[3, 4], **how)
    pictures = generate.drawn(sd, job)
    for i in (0, 1):
        save(tmp_path / f"{i}.png", pictures[i], records.of(job.pictures[i], pictures[i].shape[:2]))
    record = read(tmp_path / "1.png")
    assert record == parse(text(record)) and (record["seed"], record["variation_seed"]) == (4, 10)
    again = generate.drawn(sd, generate.Job((records.request(record),)))
    assert np.abs(again[0].astype(int) - pictures[1]).max() <= 1 < np.abs(pictures[0].astype(int) - pictures[1]).max()


def refused(call, *words):
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


def test_what_is_no_record_is_refused_in_one_line(tmp_path):
    Image.fromarray(PICTURE).save(tmp_path / "bare.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "bare.png").read_bytes()[:30])
    (tmp_path / "text.png").write_text("a cat")
    (tmp_path / "list.json").write_text("[1]")
    (tmp_path / "deep.json").write_text("[" * 20000)
    (tmp_path / "other.json").write_text('{"class": "Path", "x": 1}')
    (tmp_path / "inner.json").write_text('{"class": "Record", "more": {"a": {"class": "Record"}}}')
    (tmp_path / "type.json").write_text('{"class": "Record", "steps": "many"}')
    for name, word in (
        ("none.png", "no such file"),
        ("bare.png", "no record"),
        ("broken.png", ""),
        ("text.png", "cannot identify"),
        ("list.json", "no record"),
        ("deep.json", "nested too deep"),
        ("other.json", "no record"),
        ("inner.json", "no record"),
        ("type.json", "steps='many'"),
    ):
        refused(lambda name=name: read(tmp_path / name), tmp_path / name, word)
    refused(lambda: save(tmp_path / "a.gif", PICTURE, FULL), "'.gif'", ".png, .jpg")
    refused(lambda: records.request(a1111(sampler="Restart", prompt="a")), "sampler='Restart'", "euler_a")
    refused(lambda: parse("only a prompt"), "no parameters in 'only a prompt'")
    refused(lambda: parse("x\nSteps: many, Sampler: Euler, Seed: 1"), "Steps: 'many'", "a whole number")
    refused(lambda: parse("x\nSteps: 2, Sampler: Euler, Size: big"), "Size: 'big'", "WIDTHxHEIGHT")
    dice = parse("x\nSteps: 2, Sampler: Euler, RNG: Dice")
    refused(lambda: records.request(dice), "noise_source='Dice'", "jax, torch-cpu, philox")


def test_text_made_to_take_long_does_not(tmp_path):
    for written in ("a" * 60000, " " * 60000 + "x", 'ab:",' * 12000, "a:" * 30000, "ab: " + "\\" * 60000):
        refused(lambda written=written: parse("x\n" + written), "no parameters")
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text("parameters", "x" * (records.MOST_TEXT + 1))
    Image.fromarray(PICTURE).save(tmp_path / "long.png", pnginfo=info)
    refused(lambda: read(tmp_path / "long.png"), "65537 characters", "at most 65536")


def test_hashes_are_a1111s_and_civitais(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32)}, path, {"format": "pt"})
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    assert provenance.model_hash(path) == hashes.autov2(path) == hashlib.sha256(data).hexdigest()[:10]
    assert hashes.autov3(path) == hashlib.sha256(data[8 + length :]).hexdigest()[:12]
    save_file({"a": np.arange(6, dtype=np.float32)}, path, {"format": "pt", "note": "another header"})
    assert hashes.autov3(path) == hashlib.sha256(data[8 + length :]).hexdigest()[:12]
    (tmp_path / "y.pt").write_bytes(b"123")
    assert hashes.autov3(tmp_path / "y.pt") == hashlib.sha256(b"123").hexdigest()[:12]


def test_a_folder_has_a_hash_of_its_weights(tmp_path):
    from safetensors.numpy import save_file

    for part in ("unet", "vae"):
        (tmp_path / part).mkdir()
        save_file({"a": np.zeros(3, np.float32)}, tmp_path / part / "w.safetensors")
    first = provenance.model_hash(tmp_path)
    (tmp_path / "README.md").write_text("words do not count")
    assert provenance.model_hash(tmp_path) == first and len(first) == 10
    save_file({"a": np.ones(3, np.float32)}, tmp_path / "vae" / "w.safetensors")
    os.utime(tmp_path / "vae" / "w.safetensors", ns=(1, 1))
    assert provenance.model_hash(tmp_path) != first
    refused(lambda: provenance.model_hash(tmp_path / "none"), "none", "no such file")


OLD = Path(__file__).parent / "data" / "records"  # pictures of commit 3498d3f, all of random:tiny


@pytest.mark.parametrize("name", ["words.png", "hires.png", "img2img.webp", "inpaint.jpg"])
def test_pictures_of_the_first_form_are_made_again(name, tmp_path):
    """sdjax 0.1 recorded settings under other names and some as words only; to the same pixels."""
    record = read(OLD / name)
    files = {"image": OLD / "given.png", "mask": OLD / "mask.png"}
    given = {flag: str(path) for flag, path in files.items() if flag in fields(TASKS[record.task])}
    given = {} if record.task == "text2img" else given
    made = records.request(record, **given)
    picture = maker.Maker(tmp_path).make([Request(made)])[0]
    records.save(tmp_path / name, picture, records.of(made))
    with Image.open(OLD / name) as old, Image.open(tmp_path / name) as new:
        assert np.abs(np.asarray(new).astype(int) - np.asarray(old)).max() <= 1  # compiled for another processor
    assert record["model"] == "random:tiny" and record["steps"] == 3
    if name == "words.png":
        assert read(OLD / "words.json") == record
        names = ("clip_skip", "variation_seed", "variation", "negative_prompt", "noise_source", "size", "ensd")
        assert [record[one] for one in names] == [2, 9, 0.2, "blue", "torch-cpu", (32, 48), 7]
    if name == "hires.png":
        assert [record[one] for one in ("hires", "hires_steps", "hires_strength")] == [1.5, 4, 0.6]


def test_an_old_key_that_is_not_known_is_named(tmp_path):
    held = json.loads((OLD / "words.json").read_text()) | {"mood": "blue"}
    (tmp_path / "a.json").write_text(json.dumps(held))
    refused(lambda: read(tmp_path / "a.json"), "mood='blue': unknown; expected a record of sdjax 0.1")
