"""What the page stands on: sets of pictures, suggestions, tables of pictures, tools, what a run left, tokens."""

import io
import json
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from sdjax.formats import pipeline
from sdjax.formats.adapters.hypernetwork_file import HypernetworkFile
from sdjax.images import reading
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS
from sdjax.service import picture_sets, plots, recipes, suggest, taught, teaching, tools, uploads
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.service.plots import Axis
from sdjax.service.queue import Queue
from sdjax.service.tokens import Tokens
from sdjax.settings import SettingError
from sdjax.training.recipes import known
from tests.ui.files import write_lora

KEY, RUN = "a" * 32, "b" * 32


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path / "ui", "pocket", models=tmp_path).made()


@pytest.fixture
def library(place):
    return Library(place)


def png(size=(24, 16), colour=(200, 0, 0), mode="RGB"):
    Image.new(mode, size, colour).save(written := io.BytesIO(), "PNG")
    return written.getvalue()


# ---- sets -----------------------------------------------------------------------------------------------


def test_a_set_is_changed_picture_by_picture(place):
    given = [("a.png", png()), ("a.png", png(colour=(0, 0, 9))), ("a.txt", b"a red thing"), ("a.mask.png", png())]
    assert uploads.keep_set(place, KEY, given) == 2
    first, second = picture_sets.listed(place, KEY)
    assert (first.name, first.caption, first.masked, second.name) == ("a.png", "a red thing", True, "a-2.png")
    picture_sets.describe(place, KEY, "a-2.png", "  two\n words ")
    assert picture_sets.listed(place, KEY)[1].caption == "two words"
    picture_sets.turn(place, KEY, "a.png")
    assert reading.picture(picture_sets.picture(place, KEY, "a.png")).shape == (24, 16, 3)
    item = next(one for one in reading.find(place.set(KEY)) if one.path.name == "a.png")
    assert reading.mask(item.mask).shape == (24, 16) and item.caption == "a red thing"
    picture_sets.copied(place, KEY, RUN)
    picture_sets.clean(place, KEY, "a.png")
    picture_sets.remove(place, KEY, "a-2.png")
    assert [(one.name, one.masked) for one in picture_sets.listed(place, KEY)] == [("a.png", False)]
    assert len(picture_sets.listed(place, RUN)) == 2 and picture_sets.listed(place, "c" * 32) == []


def zipped(**files):
    with zipfile.ZipFile(written := io.BytesIO(), "w") as made:
        for name, data in files.items():
            made.writestr(name, data)
    return written.getvalue()


def test_pictures_keep_letters_of_any_script_and_never_replace_each_other(place):
    inside = {name: png(colour=(i, 0, 0)) for i, name in enumerate(("one/1.png", "two/1.png", "猫.png", "犬.png"))}
    given = [
        ("set.zip", zipped(**inside, **{"two/1.txt": b"second"})),
        ("e\u0301te\u0301.png", png()),
        ("Été.png", png()),
    ]
    assert uploads.keep_set(place, KEY, given) == 6
    assert uploads.keep_set(place, KEY, [("again.zip", zipped(**{"犬.png": png()}))]) == 7
    found = {one.name: one.caption for one in picture_sets.listed(place, KEY)}
    names = {"1.png", "1-2.png", "猫.png", "犬.png", "犬-2.png", "été.png", "Été-2.png"}
    assert set(found) == names and found["1-2.png"] == "second" and found["1.png"] == ""
    assert reading.picture(picture_sets.picture(place, KEY, "犬.png"))[0, 0, 0] == 3


def test_captions_and_masks_follow_their_picture_to_its_new_name(place):
    dark, light = png(colour=(0, 0, 0)), png(colour=(255, 255, 255))
    uploads.keep_set(place, KEY, [("dog.png", png()), ("dog.txt", b"old"), ("dog.mask.png", dark)])
    uploads.keep_set(place, KEY, [("dog.caption", b"new"), ("dog-masklabel.png", light), ("dog.png", png())])
    found = {one.path.name: (one.caption, reading.mask(one.mask).max()) for one in reading.find(place.set(KEY))}
    assert found == {"dog.png": ("old", 0), "dog-2.png": ("new", 255)}
    uploads.keep_set(place, KEY, [("dog.txt", b"written later")])  # alone: of the picture of that name
    assert [one.caption for one in picture_sets.listed(place, KEY)] == ["written later", "new"]


def test_a_refused_file_leaves_the_set_as_it_was(place):
    with pytest.raises(SettingError, match="files"):
        uploads.keep_set(place, KEY, [("a.png", png()), ("b.png", b"no picture")])
    assert not list(place.set(KEY).iterdir())


@pytest.mark.parametrize(
    "given, kept", [("con", "con_"), ("COM¹", "COM¹_"), ("a\u202eb", "a_b"), ("a\0b", "a_b"), ("..", "picture"),
                    ("🐱", "picture"), ("cafe\u0301", "café"), ("a／b", "a_b"), ("x" * 300, "x" * 80)],
)  # fmt: skip
def test_stems_are_valid_on_every_file_system(given, kept):
    assert uploads.safe(given) == kept
    assert len(uploads.safe("𠀀" * 300).encode()) <= 200


def test_a_picture_is_cut_and_masked(place):
    uploads.keep_set(place, KEY, [("a.png", png((40, 20)))])
    layer = np.zeros((20, 20, 4), np.uint8)
    layer[:10, :, 3] = 255
    Image.fromarray(layer).save(painted := io.BytesIO(), "PNG")
    picture_sets.redraw(place, KEY, "a.png", png((20, 20), (1, 2, 3, 255), "RGBA"), painted.getvalue())
    (item,) = reading.find(place.set(KEY))
    assert reading.picture(item.path).shape == (20, 20, 3)
    mask = reading.mask(item.mask)
    assert (mask[:10] == 255).all() and not mask[10:].any()
    picture_sets.redraw(place, KEY, "a.png", png((12, 16)), None)  # cut again: the mask was of another size
    assert not picture_sets.listed(place, KEY)[0].masked


def test_captions_of_any_ending_are_shown_and_removed(place):
    uploads.keep_set(place, KEY, [("a.png", png()), ("a.caption", b"a red cat")])
    assert [one.caption for one in picture_sets.listed(place, KEY)] == ["a red cat"]
    picture_sets.remove(place, KEY, "a.png")
    assert list(place.set(KEY).iterdir()) == []


@pytest.mark.parametrize("name", ["../queue.db", "a.txt", "", "a.png/../b.png", "nothing.png"])
def test_no_name_leads_out_of_a_set(place, name):
    uploads.keep_set(place, KEY, [("a.png", png()), ("a.txt", b"x")])
    for do in (picture_sets.turn, picture_sets.remove, picture_sets.clean):
        with pytest.raises(SettingError, match="picture"):
            do(place, KEY, name)


def test_a_painted_layer_is_a_mask_where_it_is_opaque(place):
    assert uploads.painted(place, png(colour=(255, 255, 255, 0), mode="RGBA")) is None
    name = uploads.painted(place, png(colour=(9, 9, 9, 255), mode="RGBA"))
    assert (reading.mask(place.upload(name)) == 255).all()


# ---- suggestions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind, count, recipe", [("person", 1, "pocket/tune"), ("person", 5, "pocket/tune"), ("pet", 5, "lora"),
                            ("thing", 5, "lora"), ("style", 1, "textual_inversion"), ("style", 8, "lora")],
)  # fmt: skip
def test_what_is_suggested_can_be_run(place, library, kind, count, recipe):
    found = suggest.suggest(library, Queue(place.queue), "", kind, count)
    assert found.recipe == recipe and found.seconds > 0 and found.memory > 0 and not found.known
    uploads.keep_set(place, KEY, [(f"{i}.png", png((16, 16))) for i in range(count)])
    order = {"recipe": recipe, "data": {"set": KEY}, "model": "pocket", "settings": dict(found.settings)}
    kept, steps = teaching.order_of(library, order | ({"init": "pocket"} if "tune" in recipe else {}))
    assert steps == found.settings.get("steps", 15) and kept["recipe"] == recipe


def test_a_run_like_it_tells_how_long_it_takes(place, library):
    queue = Queue(place.queue)
    job = queue.add("training", {"recipe": "pocket/tune", "model": "pocket", "settings": {}})
    queue.take(1, job.id)
    queue.finish(job.id, "done")
    assert suggest.suggest(library, queue, "pocket", "person", 1).known
    with pytest.raises(SettingError, match="kind"):
        suggest.suggest(library, queue, "pocket", "planet", 1)


def test_memory_of_an_accelerator_chooses_the_fit(place, library, monkeypatch):
    queue = Queue(place.queue)
    monkeypatch.setattr(suggest, "unet_bytes", lambda _: suggest.SD15)
    monkeypatch.setattr(suggest, "encoder", lambda _: "")
    for memory, fit in ((80e9, "24GB"), (17e9, "16GB"), (9e9, "8GB")):
        queue.options(device={"platform": "gpu", "memory": memory})
        assert suggest.suggest(library, queue, "pocket", "thing", 5).settings["fit"] == fit
    queue.options(device={"platform": "cpu", "memory": 9e9})
    assert "fit" not in suggest.suggest(library, queue, "pocket", "thing", 5).settings


# ---- recipes --------------------------------------------------------------------------------------------


def test_settings_of_recipes_say_what_they_mean():
    found = {one.name: one for one in recipes.declared("lora")}
    assert found["optim.lr"].value == 1e-4 and found["steps"].group == "" and found["data.flip"].help
    assert "min-SNR" in found["min_snr"].help and not {"model", "out", "data.path", "data.cache"} & found.keys()
    assert sum(bool(one.help) for one in found.values()) > 0.7 * len(found)
    for recipe in known():
        assert recipes.declared(recipe) and recipes.about(recipe)


# ---- tables and lists -----------------------------------------------------------------------------------

AXES = (
    ("steps", "1-5", [1, 2, 3, 4, 5]),
    ("steps", "10-30 (+10), 7", [10, 20, 30, 7]),
    ("steps", "5-1 (-2)", [5, 3, 1]),
    ("guidance", "0-1 [5]", [0, 0.25, 0.5, 0.75, 1]),
    ("guidance", "-1.5", [-1.5]),
    ("sampler", "Euler a, ddim", ["euler_a", "ddim"]),
    ("seed", "3, 5", [3, 5]),
    ("prompt", 'cat, "dog, big"', ["cat", "dog, big"]),
)
NONE = (("steps", "a"), ("steps", ""), ("steps", "1-5 (-1)"), ("sampler", "none"), ("steps", "0"), ("prompt", ""))


@pytest.mark.parametrize("name, text, values", AXES)
def test_values_of_an_axis(name, text, values):
    assert plots.points(fields(TASKS["text2img"])[name], text) == values


def test_too_many_values_are_refused_and_not_cut_off(library):
    with pytest.raises(SettingError, match="axes"):
        plots.plotted(library, "text2img", {"prompt": "a"}, [plots.Axis("guidance", "0-1 [500]")])


@pytest.mark.parametrize("name, text", NONE)
def test_values_that_are_none(name, text):
    with pytest.raises(SettingError, match=name):
        plots.points(fields(TASKS["text2img"])[name], text)


def test_a_table_is_every_combination_with_one_seed(library):
    axes = [Axis("steps", "5, 6"), Axis("prompt", "cat, dog, fox")]
    made = plots.plotted(library, "text2img", {"prompt": "a cat", "seed": -1}, axes)
    assert len(made) == 6 and len({one["settings"]["seed"] for one in made}) == 1
    assert [one["plot"]["at"] for one in made[:3]] == [[0, 0], [0, 1], [0, 2]]
    assert {one["settings"]["prompt"] for one in made} == {"a cat", "a dog", "a fox"}
    with pytest.raises(SettingError, match="occurs in the prompt"):
        plots.plotted(library, "text2img", {"prompt": "a cow"}, axes)
    with pytest.raises(SettingError, match="axes"):
        plots.plotted(library, "text2img", {"prompt": "a"}, [Axis("seed", "1-500")])
    with pytest.raises(SettingError, match="axis"):
        plots.plotted(library, "text2img", {"prompt": "a"}, [Axis("image", "x")])


def test_a_list_becomes_orders(library, tmp_path):
    rows = [
        {"prompt": "a cat", "seed": 7, "size": "64x96"},
        {"prompt": "b", "steps": [3, 4]},
        {"prompt": "c", "steps": 0},
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made, said = plots.listed(library, path, {"grammar": "a1111"})
    assert [one["settings"]["prompt"] for one in made] == ["a cat", "b", "b"] and len(said) == 1 and "row 3" in said[0]
    assert made[0]["settings"] == {"prompt": "a cat", "seed": 7, "size": "64x96", "grammar": "a1111"}


# ---- tools ----------------------------------------------------------------------------------------------


def test_tools_name_entries_and_no_places(place, library, tmp_path):
    place.named.mkdir()
    write_lora(place.named / "ink.safetensors")
    order = {"tool": "merge", "of": ["ink", "ink"], "strengths": [0.5, 1], "name": "both"}
    assert tools.order_of(library, order) == order
    line = tools.command(library, order)
    assert line[:2] == ["adapters", "merge"] and line[2] == f"{place.named / 'ink.safetensors'}:0.5"
    assert line[-1] == str(place.named / "both.safetensors")
    bad = [({"name": "../x"}, "name"), ({"name": "ink"}, "name"), ({"of": ["nothing"]}, "of"), ({"of": []}, "of"),
           ({"tool": "burn"}, "tool"), ({"strengths": [1]}, "strengths"), ({"format": "pickle"}, "format"),
           ({"tool": "resize", "of": ["ink"]}, "rank"), ({"path": "/etc"}, "path")]  # fmt: skip
    for change, said in bad:
        with pytest.raises(SettingError, match=said):
            tools.order_of(library, order | change)
    convert = tools.command(library, {"tool": "convert", "of": ["pocket"], "name": "one"})
    assert convert == ["convert", "pocket", str(tmp_path / "one.safetensors"), "--format", "single-file"]


def test_a_tool_that_cannot_do_its_work_has_failed(place):
    queue = Queue(place.queue)
    job = queue.add("tool", {"tool": "merge", "of": ["gone"], "name": "x"})
    tools.run(place, queue, queue.take(1, job.id))
    assert queue.get(job.id).state == "failed" and "gone" in queue.get(job.id).error


@pytest.mark.parametrize("asked, ended", [("", "waiting"), ("stop", "cancelled")])
def test_a_tool_ends_with_its_worker(place, monkeypatch, tmp_path, asked, ended):
    queue, program = Queue(place.queue), tmp_path / "program"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o700)
    monkeypatch.setattr(tools.sys, "executable", str(program))
    queue.add("tool", {"tool": "convert", "of": ["pocket"], "name": "one"})
    job = queue.take(1)
    if asked:
        queue.ask(job.id, asked)
    tools.run(place, queue, job, lambda: not asked)
    assert queue.get(job.id).state == ended


# ---- what a run left ------------------------------------------------------------------------------------


def test_how_what_a_run_left_is_used(place, library):
    queue = Queue(place.queue)
    job = queue.add("training", {"recipe": "lora", "name": "my cat", "model": "pocket"})
    folder = place.run(job.key)
    with pytest.raises(SettingError, match="a run with results"):
        taught.used(library, job)
    (folder / "export").mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"data": {"word": "sks cat", "templates": "object"}}))
    write_lora(folder / "export" / "x.safetensors")
    made = taught.used(library, job)
    assert made == taught.Used("a photo of sks cat <lora:my-cat:1>", "pocket")
    assert taught.used(library, job) == made and len(list(place.named.iterdir())) == 1
    (place.named / "my-cat.safetensors").write_bytes(b"another")
    assert "<lora:my-cat-2:1>" in taught.used(library, job).prompt


def test_a_hypernetwork_keeps_its_suffix_and_its_name_is_its_own(place, library):
    job = Queue(place.queue).add("training", {"recipe": "hypernetwork", "name": "ink"})
    export = place.run(job.key) / "export"
    export.mkdir(parents=True)
    trained, frozen = Hypernetwork().split(pipeline.load("random:tiny"), jax.random.key(0))
    HypernetworkFile().write(Hypernetwork().adapter(frozen, trained), export)
    (export / "hypernetwork.preview.png").write_bytes(png())
    place.named.mkdir()
    write_lora(place.named / "ink.safetensors")
    assert taught.used(library, job).prompt == "a photo of <hypernet:ink-2:1>"
    assert taught.used(library, job).prompt == "a photo of <hypernet:ink-2:1>"
    assert sorted(path.name for path in place.named.iterdir()) == ["ink-2.pt", "ink.safetensors"]


def test_a_controlnet_is_in_the_library_and_is_not_copied(place, library):
    job = Queue(place.queue).add("training", {"recipe": "controlnet"})
    export = place.run(job.key) / "export"
    export.mkdir(parents=True)
    (export / "config.json").write_text('{"_class_name": "ControlNetModel"}')
    names = {"controlnet_cond_embedding.conv_in.weight": np.zeros(1, np.float32)}
    save_file(names, export / "diffusion_pytorch_model.safetensors")
    name = f"run {job.key[:8]}"
    assert library.find("controlnet", name).source == str(export)
    with pytest.raises(SettingError, match=name):
        taught.used(library, job)
    with pytest.raises(SettingError, match="ControlNets"):
        teaching.keep(place, job.key, "edges")
    assert not list(place.named.glob("*"))


def test_how_a_model_that_a_run_left_is_used(place, library):
    job = Queue(place.queue).add("training", {"recipe": "pocket/tune"})
    folder, photos = place.run(job.key), place.set(KEY)
    uploads.keep_set(place, KEY, [("a.png", png((32, 32)))])
    (folder / "export" / "e4t").mkdir(parents=True)
    (folder / "export" / "model_index.json").write_text("{}")
    told = {"data": {"path": str(photos)}, "method": {"parts": [{"word": "*s"}, {}]}}
    (folder / "config.json").write_text(json.dumps(told))
    made = taught.used(library, job)
    assert made.prompt == "a photo of *s" and made.model == f"run {job.key[:8]}" and place.upload(made.image).is_file()
    (folder / "export" / "e4t" / "concept.png").write_bytes(b"x")
    assert taught.used(library, job).image == ""


def test_tokens_are_counted_without_the_model(library):
    tokens = Tokens(library)
    used, room = tokens.count("", "a photo of a face <lora:ink:0.5>")
    assert used == tokens.count("pocket", "a photo of a face ")[0] > 3 and room > used
    assert tokens.count("nothing", "a") is None
