"""Lists of pictures made: one picture a row, nothing twice, bad rows named, the same pixels after interruptions."""

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import ExifTags, Image
from safetensors.numpy import save_file

from sdjax import load, text2img
from sdjax.images import resize
from sdjax.sampling import generate
from sdjax.service import batch, records

ROOT = Path(__file__).parents[1]
MODEL = "random:tiny"


def write(folder, rows):
    path = folder / "jobs.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return str(path)


def run(jobs, out, *more):
    return batch.main("", [jobs, "--out", str(out), "--model", MODEL, "--batch", "2", "--steps", "2", *more])


def pictures(out):
    return {path.name: np.asarray(Image.open(path)) for path in sorted(Path(out).glob("0*.png"))}


def test_rows_become_files_and_a_second_start_makes_nothing(tmp_path, capsys):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-2"}, {"prompt": "a cat"}])
    assert run(jobs, tmp_path / "out", "--plot", "prompt,seed") == 0
    first = pictures(tmp_path / "out")
    assert sorted(first) == [f"000001-0000{i}.png" for i in range(3)] + ["000002.png"]
    assert (tmp_path / "out" / "plot.png").is_file()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}
    assert run(jobs, tmp_path / "out") == 0
    assert "0 pictures made, 4 already existed" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0*")}


def test_what_is_missing_or_half_written_comes_back_the_same(tmp_path):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-4"}])
    out = tmp_path / "out"
    run(jobs, out)
    first = pictures(out)
    (out / "000001-00001.png").unlink()
    (out / "000001-00002.json").write_text('{"half')
    (out / "000001-00004.json").unlink()
    run(jobs, out)
    again = pictures(out)
    assert first.keys() == again.keys()
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_files_hold_the_settings_and_say_nothing_private_when_asked(tmp_path):
    given = {
        "prompt": "my secret",
        "negative_prompt": "a rival",
        "seed": 4,
        "sampler": "euler_a",
        "noise_source": "torch-cpu",
    }
    jobs = write(tmp_path, [given])
    assert run(jobs, tmp_path / "a") == 0 == run(jobs, tmp_path / "b", "--public", "--format", "webp")
    record = records.read(tmp_path / "a" / "000001.png")
    assert record == records.read(tmp_path / "a" / "000001.json")
    names = ("prompt", "seed", "noise_source", "model")
    assert [record[name] for name in names] == ["my secret", 4, "torch-cpu", MODEL]
    assert records.read(tmp_path / "b" / "000001.webp") == records.public(record)
    everything = b"".join(path.read_bytes() for path in (tmp_path / "b").iterdir())
    assert not any(word in everything for word in (b"secret", b"rival", b"tiny"))
    again = generate.drawn(load(MODEL), generate.Job((records.request(record),)))[0].astype(int)
    assert np.abs(again - pictures(tmp_path / "a")["000001.png"]).max() <= 1  # it was made in a batch of two


def test_other_settings_are_made_anew(tmp_path, capsys):
    run(write(tmp_path, [{"prompt": "a face"}]), tmp_path / "out")
    run(write(tmp_path, [{"prompt": "a cat"}]), tmp_path / "out")
    assert "1 pictures made, 0 already existed" in capsys.readouterr().out


def test_bad_rows_are_reported_and_the_others_made(tmp_path, capsys):
    rows = [
        {"prompt": "a face"}, "{broken", {"prompt": "a", "sampler": "fastest"}, {"prompt": "b", "image": "none.png"},
        {"prompt": "c", "image": "../outside.png"}, {"prompt": "a cat"},
    ]  # fmt: skip
    assert run(write(tmp_path, rows), tmp_path / "out") == 1
    assert sorted(pictures(tmp_path / "out")) == ["000001.png", "000006.png"]
    errors = [json.loads(line) for line in (tmp_path / "out" / "errors.jsonl").read_text().splitlines()]
    assert sorted(error["row"] for error in errors) == [2, 3, 4, 5]
    said = {error["row"]: error["error"] for error in errors}
    assert "sampler='fastest'" in said[3] and "none.png" in said[4] and "lies outside" in said[5]


def test_images_and_masks_of_the_lists_folder(tmp_path):
    sides = (32, 32)
    Image.fromarray(np.full((*sides, 3), 90, np.uint8)).save(tmp_path / "a.png")
    mask = np.zeros(sides, np.uint8)
    mask[:16] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    rows = [
        {"prompt": "a face", "image": "a.png", "strength": 0.5},
        {"prompt": "a face", "image": "a.png", "mask": "m.png"},
    ]
    assert run(write(tmp_path, rows), tmp_path / "out") == 0
    made = pictures(tmp_path / "out")
    assert len(made) == 2 and (made["000002.png"][24:] == 90).all()


def smooth(path, size=(32, 32), seed=0, **more):
    """Writes a picture of (height, width) pixels and returns it."""
    picture = resize.fit(tiny.pictures(1, seed=seed)[0], size, "stretch")
    Image.fromarray(picture).save(path, **more)
    return picture


def white_top(path, rows, size=(32, 32)):
    """Writes a mask whose upper rows are to be painted."""
    mask = np.zeros(size, np.uint8)
    mask[:rows] = 255
    Image.fromarray(mask).save(path)


def reasons(out):
    lines = (out / "errors.jsonl").read_text().splitlines()
    return {error["row"]: error["error"] for error in map(json.loads, lines)}


def test_broken_pictures_are_rows_of_their_own(tmp_path):
    smooth(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "broken.png").write_bytes(whole[:60] + b"????" + whole[64:])
    huge = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    header = struct.pack(">I", 13) + b"IHDR" + huge + struct.pack(">I", zlib.crc32(b"IHDR" + huge))
    (tmp_path / "huge.png").write_bytes(whole[:8] + header + whole[33:])
    rows = [{"prompt": "a", "image": f"{name}.png", "strength": 0.5} for name in ("a", "broken", "huge", "a\0")]
    assert run(write(tmp_path, [*rows, {"prompt": "a", "strength": 0.5}]), tmp_path / "out") == 1
    assert sorted(pictures(tmp_path / "out")) == ["000001.png"]
    said = reasons(tmp_path / "out")
    assert sorted(said) == [2, 3, 4, 5]
    assert "broken.png" in said[2] and "pixels" in said[3] and "strength=0.5: expected together with image" in said[5]


def test_rows_survive_full_memory_and_files_that_cannot_be_written(tmp_path, monkeypatch):
    drawn, save = generate.drawn, records.save

    def full(sd, job):
        if len(job.pictures) > 1 or "huge" in job.settings.prompt:
            raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")
        return drawn(sd, job)

    def refused(path, *arguments, **more):
        if path.stem == "refused":
            raise SystemError("")
        save(path, *arguments, **more)

    monkeypatch.setattr(generate, "drawn", full)
    monkeypatch.setattr(records, "save", refused)
    rows = [{"prompt": "a"}, {"prompt": "huge"}, {"prompt": "b", "name": "refused"}, {"prompt": "c"}]
    assert run(write(tmp_path, rows), tmp_path / "out") == 1
    assert sorted(pictures(tmp_path / "out")) == ["000001.png", "000004.png"]
    said = reasons(tmp_path / "out")
    assert said == {2: "RuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.", 3: "SystemError"}


def test_the_longest_names_fit(tmp_path):
    assert run(write(tmp_path, [{"prompt": "a", "name": "0" * 200, "seed": [1, 2]}]), tmp_path / "out") == 0
    assert len(pictures(tmp_path / "out")) == 2


def test_each_row_keeps_its_own_size_and_is_painted_around_its_own_mask(tmp_path):
    for name, size in (("a", (32, 32)), ("b", (32, 48))):
        smooth(tmp_path / f"{name}.png", size)
    rows = [{"prompt": "a face", "image": f"{name}.png", "strength": 0.5} for name in "ab"]
    white_top(tmp_path / "m.png", 6)
    white_top(tmp_path / "n.png", 20)
    rows += [{"prompt": "a face", "image": "a.png", "mask": f"{name}.png", "margin": 2, "seed": 1} for name in "mn"]
    rows += [{"prompt": "a face", "image": "b.png", "mask": "m.png"}]  # another size than its picture
    white_top(tmp_path / "o.png", 6, (64, 48))
    smooth(tmp_path / "c.png", (64, 48))
    rows += [{"prompt": "a face", "image": "c.png", "mask": "o.png", "margin": 2, "size": 32}]
    assert run(write(tmp_path, rows), tmp_path / "out") == 1
    made = pictures(tmp_path / "out")
    assert [picture.shape[:2] for picture in made.values()] == [(32, 32), (32, 48), (32, 32), (32, 32), (64, 48)]
    assert list(reasons(tmp_path / "out")) == [5]
    assert run(write(tmp_path, rows[3:4]), tmp_path / "alone") == 0
    assert np.abs(pictures(tmp_path / "alone")["000001.png"].astype(int) - made["000004.png"]).max() <= 1


def test_pictures_are_upright_over_white_and_masks_the_brightest_channel(tmp_path):
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    given = smooth(tmp_path / "a.png", (32, 48), exif=turned)
    clear = np.concatenate([np.zeros((32, 32, 3), np.uint8), np.full((32, 32, 1), 0, np.uint8)], -1)
    Image.fromarray(clear).save(tmp_path / "b.png")
    mask = np.zeros((48, 32, 3), np.uint8)
    mask[:8] = (0, 0, 255)
    Image.fromarray(mask).save(tmp_path / "m.png")
    Image.fromarray(mask[:32]).save(tmp_path / "n.png")
    rows = [{"prompt": "a", "image": "a.png", "mask": "m.png"}, {"prompt": "a", "image": "b.png", "mask": "n.png"}]
    assert run(write(tmp_path, rows), tmp_path / "out") == 0
    made = pictures(tmp_path / "out")
    assert np.array_equal(made["000001.png"][8:], np.rot90(given, -1)[8:])
    assert (made["000002.png"][8:] == 255).all() and not np.array_equal(
        made["000002.png"][:8], np.full((8, 32, 3), 255)
    )


@pytest.mark.parametrize("ink", [0, 255])
def test_strokes_on_clear_ground_and_opaque_pictures_are_masks(tmp_path, ink):
    given, mask = smooth(tmp_path / "a.png"), np.zeros((32, 32), np.uint8)
    mask[:8] = 255
    Image.fromarray(np.stack([np.full_like(mask, ink)] * 3 + [mask], -1)).save(tmp_path / "m.png")
    Image.fromarray(np.stack([mask] * 3 + [np.full_like(mask, 255)], -1)).save(tmp_path / "n.png")
    rows = [{"prompt": "a", "image": "a.png", "mask": f"{name}.png", "seed": 1} for name in "mn"]
    assert run(write(tmp_path, rows), tmp_path / "out") == 0
    strokes, opaque = pictures(tmp_path / "out").values()
    np.testing.assert_array_equal(strokes[8:], given[8:])
    np.testing.assert_array_equal(strokes, opaque)
    assert not np.array_equal(strokes[:8], given[:8])


def test_another_file_of_the_same_name_is_made_anew(tmp_path, capsys):
    smooth(tmp_path / "a.png")
    white_top(tmp_path / "m.png", 8)
    jobs = write(tmp_path, [{"prompt": "a face", "image": "a.png", "mask": "m.png"}])
    changes = (lambda: None, lambda: smooth(tmp_path / "a.png", seed=1), lambda: white_top(tmp_path / "m.png", 9))
    for change in changes:
        change()
        assert run(jobs, tmp_path / "out") == 0 == run(jobs, tmp_path / "out")
        said = capsys.readouterr().out.splitlines()
        assert "1 pictures made" in said[0] and "0 pictures made" in said[1]


@pytest.mark.slow
def test_each_row_has_its_own_variation(tmp_path):
    smooth(tmp_path / "a.png", (20, 36))
    kinds = {"text": {}, "image": {"image": "a.png", "noise_source": "philox"}}
    rows = [
        {"prompt": "a", "seed": 3, "variation_seed": [5, 6], "variation": [0, 0.3], **kind} for kind in kinds.values()
    ]
    assert run(write(tmp_path, rows), tmp_path / "out", "--batch", "4") == 0
    sd, made = load(MODEL), pictures(tmp_path / "out")
    found = [records.read(tmp_path / "out" / name) for name in made]
    assert [(one["variation_seed"], one["variation"]) for one in found] == [(0, 0), (5, 0.3), (0, 0), (6, 0.3)] * 2
    for i, variation in enumerate([(5, 0.0), (5, 0.3), (6, 0.0), (6, 0.3)]):
        settings = {"seeds": [3] * 4, "steps": 2, "variation_seed": variation[0], "variation": variation[1]}
        settings["grammar"] = "a1111"  # of the four the first has this variation
        alone = text2img(sd, ["a"] * 4, **settings)[0].astype(int)
        assert np.abs(alone - made[f"000001-{i:05d}.png"]).max() <= 1
        picture = np.asarray(Image.open(tmp_path / "a.png"))
        alone = generate.img2img(sd, ["a"] * 4, picture, noise_source="philox", **settings)[0].astype(int)
        assert np.abs(alone - made[f"000002-{i:05d}.png"]).max() <= 1


def test_any_field_has_a_default_on_the_command_line(tmp_path, capsys):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": 1}, {"prompt": "a cat", "clip_skip": 1}])
    assert (
        run(jobs, tmp_path / "out", "--grammar", "plain", "--set", "clip_skip=2", "--set", "noise_source=philox") == 0
    )
    found = [records.read(tmp_path / "out" / f"00000{i}.png") for i in (1, 2)]
    names = ("grammar", "clip_skip", "noise_source")
    assert [[record[name] for name in names] for record in found] == [["plain", 2, "philox"], ["plain", 1, "philox"]]
    for wrong, said in (
        ("clip_skip", "--set='clip_skip': expected FIELD=VALUE"),
        ("clip_skip=x", "--clip-skip='x': expected a whole number, 1 or more"),
    ):
        assert run(jobs, tmp_path / "out", "--set", wrong) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"error: {said}"


def test_rows_name_adapters_in_a_field(tmp_path):
    name, random = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", np.random.default_rng(0)
    width = (
        load(MODEL)
        .parts["unet"]["mid_block"]["attentions.0"]["transformer_blocks.0"]["attn1"]["to_q"]["kernel"]
        .shape[0]
    )
    shapes = {"lora_down.weight": (2, width), "lora_up.weight": (width, 2)}
    (tmp_path / "loras").mkdir()
    save_file(
        {f"{name}.{part}": random.standard_normal(shape, np.float32) for part, shape in shapes.items()},
        tmp_path / "loras" / "style.safetensors",
    )
    rows = [{"prompt": "a face", "seed": 1, "adapter": ["", "<lora:style:0.5>", "<lora:none>"]}]
    assert run(write(tmp_path, rows), tmp_path / "out", "--adapters", str(tmp_path / "loras")) == 1
    made = pictures(tmp_path / "out")
    assert sorted(made) == ["000001-00000.png", "000001-00001.png"]
    assert not np.array_equal(*made.values())
    record = records.read(tmp_path / "out" / "000001-00001.png")
    assert record["adapter"] == ("<lora:style:0.5>",) and "lora style" in record.hashes


def test_a_seed_of_minus_one_is_drawn_once(tmp_path, capsys):
    jobs = write(
        tmp_path, [{"prompt": "a face", "seed": [-1, -1], "guidance": [2, 3]}, {"prompt": "a cat", "seed": -1}]
    )
    seeds = {}
    for out in ("a", "b"):
        assert run(jobs, tmp_path / out) == 0 == run(jobs, tmp_path / out)
        said = capsys.readouterr().out.splitlines()
        assert "5 pictures made, 0 already existed" in said[0] and "0 pictures made, 5 already existed" in said[1]
        files = sorted((tmp_path / out).glob("0*.json"))
        seeds[out] = [records.read(path)["seed"] for path in files]
        assert seeds[out][0] == seeds[out][1] and seeds[out][2] == seeds[out][3] and len(set(seeds[out])) == 3
    assert not set(seeds["a"]) & set(seeds["b"])
    (tmp_path / "a" / "000002.png").unlink()
    (tmp_path / "a" / "000002.json").unlink()
    assert run(jobs, tmp_path / "a") == 0
    assert records.read(tmp_path / "a" / "000002.png")["seed"] == seeds["a"][4]


def test_files_of_others_stay(tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    smooth(out / "cat.png")
    (out / "dog.json").write_text('{"breed": "poodle"}')
    before = {path: path.read_bytes() for path in out.iterdir()}
    jobs = write(tmp_path, [{"prompt": "a", "name": name} for name in ("cat", "dog", "owl")])
    assert run(jobs, out) == 1
    assert all(path.read_bytes() == held for path, held in before.items()) and (out / "owl.png").exists()
    assert not (out / "cat.json").exists() and not (out / "dog.png").exists()
    said = reasons(out)
    assert list(said) == [1, 2] and "cat.png was not written by this program" in said[1] and "dog.json" in said[2]
    assert "1 pictures made, 0 already existed, 2 rows failed" in capsys.readouterr().out
    for kind in ("webp", "jpg"):  # what is ours is made anew, whatever its format and what it tells
        for steps in ("2", "3"):
            assert (
                run(write(tmp_path, [{"prompt": "a"}]), out, "--format", kind, "--public", "--set", f"steps={steps}")
                == 0
            )
            assert "1 pictures made" in capsys.readouterr().out


def test_embeddings_of_the_folder_are_known_by_name(tmp_path, capsys):
    (tmp_path / "known").mkdir()
    width = load(MODEL).parts["text_encoder"]["text_model"]["embeddings"]["token_embedding"]["embedding"].shape[1]
    rows = np.random.default_rng(0).standard_normal((2, width), np.float32)
    save_file({"emb_params": rows}, tmp_path / "known" / "zebra9.safetensors")
    jobs = write(tmp_path, [{"prompt": "a zebra9 face", "seed": 1, "grammar": ["a1111", "plain"]}])
    for folder in ("known", "none"):
        assert run(jobs, tmp_path / folder / "out", "--adapters", str(tmp_path / folder)) == 0
    with_it, without = (list(pictures(tmp_path / folder / "out").values()) for folder in ("known", "none"))
    assert not np.array_equal(with_it[0], without[0])
    names = [f"000001-0000{i}.png" for i in range(2)]
    hashes = [records.read(tmp_path / "known" / "out" / name).hashes for name in names]
    assert "embedding zebra9" in hashes[0] and "embedding zebra9" not in hashes[1]
    capsys.readouterr()
    save_file({"emb_params": -rows}, tmp_path / "known" / "zebra9.safetensors")
    assert run(jobs, tmp_path / "known" / "out", "--adapters", str(tmp_path / "known")) == 0
    assert capsys.readouterr().out.startswith("1 pictures made, 1 already existed")


def test_another_hypernetwork_of_the_same_name_is_made_anew(tmp_path, capsys):
    jobs, random = write(tmp_path, [{"prompt": "a face", "seed": 1}]), np.random.default_rng(0)
    path = tmp_path / "style.pt"

    def run_with(activation):
        weights = {f"linear.{i}.{name}": random.standard_normal(shape, np.float32) for i, name, shape in shapes}
        tensors = {name: torch.from_numpy(array) for name, array in weights.items()}
        torch.save({width: (tensors, tensors), "activation_func": activation, "activate_output": False}, path)
        assert run(jobs, tmp_path / "out", "--adapter", str(path)) == 0
        return capsys.readouterr().out, pictures(tmp_path / "out")["000001.png"]

    width = load(MODEL).networks["unet"].config.cross_attention_dim
    shapes = [(0, "weight", (2 * width, width)), (0, "bias", (2 * width,))]
    shapes += [(1, "weight", (width, 2 * width)), (1, "bias", (width,))]
    (first, one), (second, other) = run_with("linear"), run_with("linear")
    assert first.startswith("1 pictures made, 0 already existed") and second.startswith(
        "1 pictures made, 0 already existed"
    )
    assert not np.array_equal(one, other)
    assert run(jobs, tmp_path / "out", "--adapter", str(path)) == 0
    assert capsys.readouterr().out.startswith("0 pictures made, 1 already existed")


def test_a_batch_is_no_larger_than_of_use(tmp_path, monkeypatch):
    counts, drawn = [], generate.drawn

    def counted(sd, job):
        counts.append(len(job.pictures))
        return drawn(sd, job)

    monkeypatch.setattr(generate, "drawn", counted)
    rows = [{"prompt": "a", "seed": "0-1", "guidance": [2, 3, 4]}, {"prompt": "b", "guidance": 5}]
    assert run(write(tmp_path, rows), tmp_path / "out", "--batch", "8") == 0
    assert counts == [2, 2, 2, 2]


def test_parts_divide_the_list(tmp_path):
    jobs = write(tmp_path, [{"prompt": "a face", "seed": "0-4"}])
    for part in ("0/2", "1/2"):
        assert run(jobs, tmp_path / "out", "--part", part) == 0
        assert len(pictures(tmp_path / "out")) == (3 if part == "0/2" else 5)


@pytest.mark.parametrize("more", [["--part", "2/2"], ["--batch", "0"], ["--plot", "colour,seed"]])
def test_bad_flags_are_one_line(tmp_path, capsys, more):
    assert run(write(tmp_path, [{"prompt": "a face"}]), tmp_path / "out", *more) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {more[0]}=")


@pytest.mark.slow
def test_killed_five_times_makes_a_thousand_once_each(tmp_path):
    jobs = write(tmp_path, [{"prompt": ["a face", "a photo of a cat"], "seed": "0-499"}])
    command = [sys.executable, "sample/batch.py", jobs, "--model", "pocket", "--batch", "20", "--steps", "2"]
    chance = random.Random(0)
    for _ in range(5):
        child = subprocess.Popen([*command, "--out", tmp_path / "killed"], cwd=ROOT, stderr=subprocess.DEVNULL)
        before = len(list((tmp_path / "killed").glob("*.json"))) if (tmp_path / "killed").exists() else 0
        while child.poll() is None and len(list((tmp_path / "killed").glob("*.json"))) < before + 20:
            time.sleep(0.05)
        time.sleep(chance.uniform(0, 3))
        assert child.poll() is None, "the run ended before it was killed"
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    for out in ("killed", "undisturbed"):
        subprocess.run([*command, "--out", tmp_path / out], cwd=ROOT, check=True)
    killed, undisturbed = (pictures(tmp_path / out) for out in ("killed", "undisturbed"))
    assert len(undisturbed) == 1000 and killed.keys() == undisturbed.keys()
    assert len(list((tmp_path / "killed").glob("*.json"))) == 1000
    assert all(np.array_equal(killed[name], undisturbed[name]) for name in killed)


def test_rows_whose_latents_are_not_finite_fail_alone(tmp_path):
    rows = [{"prompt": text, "grammar": "a1111"} for text in ("a face", f"(a face:{'9' * 38})", "a cat")]
    assert run(write(tmp_path, rows), tmp_path / "out", "--batch", "3") == 1
    assert sorted(pictures(tmp_path / "out")) == ["000001.png", "000003.png"]
    assert not (tmp_path / "out" / "000002.json").exists()
    said = reasons(tmp_path / "out")
    assert list(said) == [2] and said[2].startswith("latents: not finite from step 1 of 2 on")
