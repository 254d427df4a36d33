"""The page without a browser: its form, its pieces of HTML, what its events do."""

import asyncio
import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("gradio")

import gradio as gr
import numpy as np
from markupsafe import Markup

from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS, TextToImage
from sdjax.service import orders, records
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.service.queue import Queue
from sdjax.settings import SettingError
from sdjax.web.page import charts, details, form, marks, plots, stage, units, whole, words
from sdjax.web.page.tabs import info, pictures
from sdjax.web.server import create_app, mount_page
from sdjax.web.services import Services
from tests.serving import ask
from tests.ui.files import PAYLOADS

BARE = ("prompt", "negative_prompt", "size", "model", "seed")  # controls outside folds
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """The page of a place of its own."""
    place = Place(tmp_path_factory.mktemp("page") / "ui", "pocket").made()
    made = []
    services = Services(place, Queue(place.queue), Library(place))

    async def build():  # within a loop, since Gradio leaves those open that it makes itself
        return whole.build(services, made.append)

    built = asyncio.run(build())
    return made[0], built


def test_every_setting_of_a_picture_is_in_the_page(desk):
    """Each setting that a browser may give has a control, which is visible where its task is chosen."""
    made = desk[0].places["pictures"]
    for task, kind in TASKS.items():
        usual = [1.0] * len(pictures.DIFFERS)
        shown = pictures._moded(made, task, "text2img", *usual)[1:]
        folds, rest = shown[5 : 5 + len(made.folds)], shown[5 + len(made.folds) :]
        visible = dict(zip(made.controls, (one["visible"] for one in rest), strict=True))
        opened = dict(zip(made.folds, (one["visible"] for one in folds), strict=True))
        for name, one in fields(kind).items():
            if name not in orders.NAMED and one.about.mine:
                continue  # who starts the server says it
            if name in made.controls:
                place = one.part.__name__
                assert visible[name] and (name in BARE or opened[place]), (task, name)
            elif name == "image":
                assert task == "inpaint" or shown[0]["visible"], task
            elif name == "mask":
                assert shown[2]["visible"] or task == "inpaint", task
            else:
                assert name in units.NAMES and shown[3]["visible"], (task, name)


def test_every_field_has_help(desk):
    components = [one for one in desk[1].blocks.values() if isinstance(one, gr.components.FormComponent)]
    bare = [one.label for one in components if one.visible is True and one.show_label and not one.info]
    assert set(bare) <= {"What is it?", "What to do"}


@pytest.mark.parametrize("task", TASKS)
def test_what_the_form_begins_with_is_what_is_usual(desk, task):
    """The values of untouched controls are an order's usual ones, but for what the page has of its own."""
    made = desk[0].places["pictures"]
    given = {name: control.value for name, control in made.controls.items()}
    found = form.values(task, given)
    known = fields(TASKS[task])
    other = {
        name for name, value in found.items() if value != known[name].usual and form.shown(known[name].usual) != value
    }
    assert other <= {*pictures.USUAL, *pictures.DIFFERS}


def test_values():
    given = {"prompt": "a", "steps": 20.0, "eta": "0.5", "size": "512x768", "variation": 0, "variation_seed": 3,
             "hires_strength": 0.4, "weighting": "", "model": "", "strength": 0.4}  # fmt: skip
    found = form.values("text2img", given)
    assert found["steps"] == 20 and type(found["steps"]) is int and found["eta"] == 0.5
    assert "hires_strength" not in found and "weighting" not in found and "strength" not in found
    with pytest.raises(SettingError, match="eta"):
        form.values("text2img", {"prompt": "a", "eta": "much"})


def test_what_is_filled_in_is_read_again(desk):
    """A record's settings come back from the controls that show them."""
    made = desk[0].places["pictures"]
    values = {"prompt": "a <b>", "steps": 33, "sampler": "dpmpp_2m", "schedule": "karras", "guidance": 4.5,
              "seed": 2**40, "size": "512x768", "eta": 0.25, "rescale": 0.5, "clip_skip": 2,
              "hires": 1.5, "hires_steps": 7}  # fmt: skip
    mode, chosen, _, _, *updates = made.fill("text2img", values)
    given = {name: one["value"] for name, one in zip(made.controls, updates, strict=True) if "value" in one}
    found = form.values(mode, given)
    assert chosen == []  # the prompt of a record holds its styles
    assert {name: str(found[name]) for name in values} == {name: str(value) for name, value in values.items()}


def test_picture_info_shows_a_seed_of_0(tmp_path):
    path = tmp_path / "a.png"
    records.save(path, np.zeros((8, 8, 3), np.uint8), records.of(TextToImage(prompt="a", seed=0), (8, 8)))
    told = str(info._told(str(path)))
    assert "<th>Seed</th><td>0</td>" in told and "None" not in told and "False" not in told


@pytest.mark.parametrize("text", PAYLOADS)
def test_texts_stay_texts(text):
    made = str(marks.tag("p", text, title=text, data={"name": text}))
    assert made.count("<") == 2 and made.startswith("<p ") and made.endswith("</p>")
    inside = made[made.index("<p ") + 3 : made.index(">")]
    assert inside.count('"') == 4
    assert str(marks.problem(text)).count("<") == 2 and str(marks.empty(text, text)).count("<") == 6


def test_a_chart_of_nothing_is_nothing():
    assert charts.chart("Loss", {}) == Markup("") == charts.chart("Loss", {"loss": [(1, float("nan"))]})
    drawn = charts.chart("Loss", {"loss": [(i, 1 / (i + 1)) for i in range(5000)]})
    assert drawn.count("polyline") == 2 and len(drawn) < 20_000


def test_durations():
    assert [words.duration(one) for one in (0.2, 40, 100, 8000)] == ["1 s", "40 s", "2 min", "2 h 13 min"]


def test_a_job_is_put_before_those_that_wait(desk):
    made, queue = desk[0].places["pictures"], desk[0].services.queue
    (desk[0].services.place.root / "styles.csv").write_text("name,prompt,negative_prompt\nink,ink of {prompt},grey\n")
    given = ["text2img", 2, ["ink"], None, None, None, *(one.value for one in made.units.inputs)]
    given += ["a cat" if name == "prompt" else one.value for name, one in made.controls.items()]
    pictures._putting(made, False)(*given)
    pictures._putting(made, True)(*given)
    second, first = queue.newest(2)[::-1]
    assert [one.id for one in queue.waiting()] == [first.id, second.id] and first.count == 2
    assert (
        first.request["settings"] | {"prompt": "ink of a cat", "negative_prompt": "grey"} == first.request["settings"]
    )
    assert pictures._styles(desk[0])["choices"] == ["ink"]
    queue.clear()


def test_cards_of_jobs_and_pictures(desk):
    queue = desk[0].services.queue
    job = queue.add("pictures", {"task": "text2img", "settings": {"prompt": PAYLOADS[1]}, "count": 1})
    for state in ("waiting", "running", "failed"):
        one = dataclasses.replace(job, state=state, error=PAYLOADS[0], phase="sampling", step=1, steps=4, started=1.0)
        assert "<img src=x" not in stage.card(queue, one)
    queue.clear()


@pytest.fixture(scope="module")
def mounted(tmp_path_factory):
    """The server with its page."""
    place = Place(tmp_path_factory.mktemp("mounted") / "ui", "pocket").made()
    app = create_app(place)

    async def mount():
        mount_page(app)

    asyncio.run(mount())
    return app, place


def test_the_page_is_served_with_a_policy_that_names_no_other_host(mounted):
    found = ask(mounted[0], "GET", "/")
    policy = found.headers["content-security-policy"]
    assert found.status == 200 and b"gradio" in found.body and "http" not in policy and "default-src 'self'" in policy
    assert b"fonts.googleapis" not in found.body and found.headers["x-frame-options"] == "SAMEORIGIN"
    assert ask(mounted[0], "GET", "/docs").headers["content-security-policy"].startswith("default-src 'none'")
    assert ask(mounted[0], "GET", "/", host="evil.invalid").status == 403


@pytest.mark.parametrize("name", ["queue.db", "library.json", "device.lock", "runs/x/config.json", "../secret.txt"])
def test_files_beside_the_pictures_are_not_served(mounted, name):
    app, place = mounted
    path = place.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    for where in (path, path.resolve(), f"{place.root}/pictures/../{name}"):
        assert ask(app, "GET", f"/gradio_api/file={where}").status in (403, 404)
    picture = place.root / "pictures" / f"{'0' * 32}-0.png"
    picture.write_bytes(b"x")
    assert ask(app, "GET", f"/gradio_api/file={picture}").status == 200
    here = Path(__file__).parents[1] / "README.md"
    assert ask(app, "GET", f"/gradio_api/file={here}").status in (403, 404)


def test_a_table_of_pictures(desk):
    """Cells lie where their axes say; a job that is not done says its state, and texts stay texts."""
    queue, key = desk[0].services.queue, "k"
    axes = [["steps", ["1", "2"]], ["prompt", [PAYLOADS[0], "b"]]]
    for i in range(2):
        for j in range(2):
            plot = {"key": key, "axes": axes, "at": [i, j]}
            queue.add("pictures", {"task": "text2img", "settings": {}, "count": 1, "plot": plot})
    one, make = plots.newest(desk[0])
    made = str(make())
    assert one[0] == key and made.count("<td") == 4 and made.count("Waiting") == 4 and "<script" not in made
    assert made.index("Steps: 1") < made.index("Steps: 2") < made.index("&lt;script&gt;") < made.index("<th>b</th>")
    queue.clear()


@pytest.mark.parametrize("state", ["waiting", "running", "done", "failed", "stopped"])
def test_what_runs_shows_of_a_job_is_text(desk, state):
    place, text = desk[0].services.place, PAYLOADS[2]
    for kind, request in (("pictures", {"task": "text2img"}), ("training", {"recipe": "lora", "name": text})):
        job = desk[0].services.queue.add(kind, {**request, "settings": {"prompt": text, text: text}})
        job = dataclasses.replace(
            job, state=state, error=text, source=text, result={"export": [text], "pictures": [text]}
        )
        folder = place.run(job.key)
        (folder / "samples").mkdir(parents=True)
        (folder / "log.txt").write_text(text)
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.5, f"loss.{text}": 1.0}))
        made = str(details._detail(job, desk[0].services.library))
        assert "<svg onload" not in made and "&lt;svg onload" in made
    desk[0].services.queue.clear()
