"""What a run's previews show: prompts without being asked, A1111's grammar, pictures of the run's data."""

import dataclasses

import jax
import numpy as np
import pytest
from programs import photo

import sdjax
from sdjax import tasks
from sdjax.data import batches
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats import pipeline
from sdjax.images import reading
from sdjax.methods.controlnet import ControlNet
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.methods.seen import seen_by
from sdjax.settings import SettingError
from sdjax.stable_diffusion import to_pictures
from sdjax.training import checks, preview, previewed
from sdjax.training.settings import Train

DRAWN = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=4))
RUN = Train(model="random:tiny", method=Full(("unet",)), data=DRAWN)


@pytest.fixture(scope="module")
def plain():
    return pipeline.load("random:tiny")


def made_for(plain, name):
    """Returns (the model ready for a task, a run's batches of pixels)."""
    sd = tasks.of(plain, name).prepare(plain, jax.random.key(0))
    return sd, batches.build(dataclasses.replace(DRAWN, encode=False), sd, 0)


def folder(place, *captions):
    place.mkdir()
    for i, text in enumerate(captions):
        photo(place / f"{i}.png")
        (place / f"{i}.txt").write_text(text)
    return str(place)


@pytest.mark.parametrize(
    ("captions", "changes", "wanted"),
    [
        (("a cat", "a cat", "a dog", "a cow"), {}, ("a cat", "a dog")),
        (("a [name] on a sofa",), {"word": "sks"}, ("a sks on a sofa",)),
        (("a cat",), {"templates": "none"}, ("",)),
        (("", ""), {"word": "a cat", "templates": "object"}, ("a photo of a cat",)),
        (("", ""), {"word": "ink", "templates": "style"}, ("a painting in the style of ink",)),
        (("on a sofa", ""), {"word": "sks dog", "templates": "trigger"}, ("sks dog, on a sofa", "a photo of sks dog")),
    ],
)
def test_without_prompts_a_run_shows_its_first_captions(plain, tmp_path, captions, changes, wanted):
    data = Data(path=folder(tmp_path / "photos", *captions), size=32, batch=1, dropout=0.5, **changes)
    run = dataclasses.replace(RUN, method=Lora(rank=2), data=data)
    made = batches.build(data, plain, 0)
    assert previewed.prompts(run, made) == wanted
    asked = dataclasses.replace(run, prompts=("[name] here",))
    assert previewed.prompts(asked, made) == (f"{data.word} here",)


def test_captions_make_a_small_sheet_as_the_training_reads_them(plain, tmp_path, monkeypatch):
    seen = []

    def text2img(sd, prompts, seeds, grammar, **how):
        seen.extend((prompt, seed, grammar) for prompt, seed in zip(prompts, seeds, strict=True))
        return np.zeros((len(prompts), 8, 8, 3), np.uint8)

    monkeypatch.setattr(preview.generate, "text2img", text2img)
    data = Data(path=folder(tmp_path / "photos", "miku (idol)", "a dog"), size=32, batch=1)
    made = batches.build(data, plain, 0)
    preview.sheet(Full(), plain, made, dataclasses.replace(RUN, data=data))
    assert seen == [(text, 0, "plain") for text in ("miku (idol)", "a dog")]
    seen.clear()
    preview.sheet(Full(), plain, made, dataclasses.replace(RUN, data=data, prompts=("(a cat:1.2)",)))
    assert seen == [("(a cat:1.2)", seed, "a1111") for seed in range(4)]


def test_lines_have_weights_and_any_length(plain, tmp_path):
    """As kohya reads its sample prompts; A1111's grammar itself is tested in test_grammar.py."""
    text, place = "a (red:1.5) cat, " + ", ".join(["a long text"] * 9), tmp_path / "prompts.txt"
    place.write_text(f"{text} --S 1 --D 3\n")
    run = dataclasses.replace(RUN, prompts_file=str(place))
    ((made, _),) = preview.lines(tmp_path, 1, plain, batches.build(DRAWN, plain, 0), run).values()
    np.testing.assert_array_equal(made, sdjax.text2img(plain, [text], seeds=[3], steps=1, grammar="a1111")[0])
    assert (made != sdjax.text2img(plain, [text], seeds=[3], steps=1)[0]).any()


def test_inpainting_fills_a_hole_in_pictures_of_the_run(plain):
    sd, data = made_for(plain, "inpainting")
    given = to_pictures(data[0]["pixels"])
    found = previewed.starts(sd, data, RUN)
    assert len(found) == 2 and all(one.caption for one in found)
    for one, picture in zip(found, given, strict=True):
        (made,) = one.draw([one.caption], seeds=[0], steps=1)
        same = (made == picture).all(-1)
        assert same[:8].all() and same[:, :8].all() and not same[8:-8, 8:-8].all()
    page = preview.sheet(Full(), sd, data, RUN)
    assert page is not None and page.sheet.shape[0] > 2 * 32


def test_an_upscaler_enlarges_pictures_of_the_run(plain, tmp_path):
    sd, data = made_for(plain, "upscaling")
    (one, _) = previewed.starts(sd, data, RUN)
    assert one.shown["given"].shape == one.shown["picture"].shape == (32, 32, 3)
    assert (one.shown["given"] != one.shown["picture"]).any()
    place = tmp_path / "prompts.txt"
    place.write_text("a face --s 1 --w 64 --h 32\n")
    made = preview.lines(tmp_path, 1, sd, data, dataclasses.replace(RUN, prompts_file=str(place)))
    assert [picture.shape for picture, _ in made.values()] == [(32, 64, 3)]


def test_lines_give_a_controlnet_its_conditions_and_e4t_its_subjects(plain, tmp_path, capsys, monkeypatch):
    place, seen = tmp_path / "prompts.txt", []
    place.write_text("a *s --s 1\n" * 2)

    def text2img(sd, prompts, control=None, **how):
        seen.append(seen_by(sd).concept if control is None else control.picture)
        return np.zeros((1, 32, 32, 3), np.uint8)

    monkeypatch.setattr(preview.generate, "text2img", text2img)
    for method, more in ((ControlNet(), {"condition": "canny"}), (E4T("*s", "face"), {"concept": "same"})):
        told = dataclasses.replace(DRAWN, **more)
        trained, frozen = method.split(plain, jax.random.key(1))
        run = dataclasses.replace(RUN, method=method, data=told, prompts_file=str(place))
        sd, data = method.join(frozen, trained), batches.build(told, frozen, 0)
        assert list(preview.lines(tmp_path, 1, sd, data, run)) == ["00", "01"]
        given = data[0]["concept"] if "concept" in more else 255 * data[0]["control"]["hint"]
        np.testing.assert_allclose(seen[-2:], given, atol=0.01)
        assert (seen[-2] != seen[-1]).any()
    assert "preview: no" not in capsys.readouterr().out


def test_a_line_names_a_condition_as_in_kohyas_files(plain, tmp_path, monkeypatch):
    edges, place, seen = tmp_path / "my edges.png", tmp_path / "prompts.txt", []
    photo(edges)
    place.write_text(f"a face --cn {edges} --s 1\n")
    told = dataclasses.replace(DRAWN, condition="canny")
    run = dataclasses.replace(RUN, method=ControlNet(), data=told, prompts_file=str(place))
    checks.alone(run)
    trained, frozen = ControlNet().split(plain, jax.random.key(1))
    made = np.zeros((1, 32, 32, 3), np.uint8)
    monkeypatch.setattr(preview.generate, "text2img", lambda sd, *_, control, **how: (seen.append(control), made)[1])
    preview.lines(tmp_path, 1, ControlNet().join(frozen, trained), batches.build(told, frozen, 0), run)
    np.testing.assert_array_equal(seen[0].picture, reading.picture(edges))
    with pytest.raises(SettingError, match="expected lines without --cn: Full reads no condition"):
        checks.alone(dataclasses.replace(RUN, prompts_file=str(place)))
    place.write_text("a face --cn none.png\n")
    with pytest.raises(ValueError, match="prompts.txt, line 1: none.png: no such file"):
        checks.alone(run)
