"""Jobs that train, seen from the queue: how they end, and what is left of them."""

import json
import os
import signal

import numpy as np
import pytest
from PIL import Image

from sdjax.service import teaching
from sdjax.service.library import Library
from sdjax.service.place import Place
from sdjax.service.queue import DONE, FAILED, RUNNING, STOPPED, WAITING, Queue
from sdjax.settings import SettingError
from sdjax.training import recipes
from tests.serving import wait_for
from tests.ui.files import write_lora

KEY = "0" * 32


@pytest.fixture
def place(tmp_path):
    (tmp_path / "photos" / "cat").mkdir(parents=True)
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "photos" / "cat" / "a.png")
    return Place(tmp_path / "ui", "random:tiny", data=tmp_path / "photos").made()


@pytest.fixture
def job(place):
    """A training job that this process has."""
    queue = Queue(place.queue)
    queue.add("training", {"recipe": "textual_inversion"}, "test", 10)
    job = queue.take(os.getpid())
    place.run(job.key).mkdir()
    return job


def test_what_a_request_says_becomes_the_runs_settings(place):
    order = {"recipe": "textual_inversion", "data": {"folder": "cat"}, "model": "pocket", "name": "my cat",
             "settings": {"optim.lr": 1e-3, "data.batch": 1, "prompts": ["a [name]", "b"], "ema": 0.5}}  # fmt: skip
    library = Library(place)
    kept, steps = teaching.order_of(library, order)
    made = teaching._loaded(library, kept, KEY)
    assert made.optim.lr == 1e-3 and made.prompts == ("a [name]", "b") and steps == made.steps == 3000
    assert made.data.path == str(place.data / "cat") and made.out == str(place.run(KEY)) and made.model == "pocket"
    assert {"full", "pocket/tune", "lora"} <= set(recipes.known())


def test_the_page_may_ask_for_class_pictures(place):
    told = {"class_data.draw": True, "class_data.count": 20, "class_data.prompts": ["a photo of a cat"]}
    kept, _ = teaching.order_of(Library(place), {"recipe": "dreambooth", "settings": told})
    classes = teaching._loaded(Library(place), kept, KEY).class_data
    assert (classes.draw, classes.count, classes.prompts, classes.path) == (True, 20, ("a photo of a cat",), "")


@pytest.mark.parametrize(
    "order, said",
    [({"recipe": "none"}, "recipe"), ({"recipe": "full", "date": 1}, "date: unknown"), ({"recipe": 3}, "recipe"),
     ({"recipe": "full", "data": {}}, "data"), ({"recipe": "full", "data": {"folder": "cat", "set": KEY}}, "data"),
     ({"recipe": "full", "settings": {"data.index": "x"}}, "names no file"),
     ({"recipe": "full", "model": "x"}, "model"), ({"recipe": "full", "model": 3}, "model"),
     ({"recipe": "full", "settings": {"optim": 3}}, "optim"), ({"recipe": "full", "settings": []}, "settings"),
     ({"recipe": "controlnet", "settings": {"data.condition": "depth:model=gpt2"}}, "data.condition=.*expected depth"),
     ({"recipe": "controlnet", "settings": {"data.condition": "'depth:model=gpt2'"}}, "condition=.*expected depth"),
     ({"recipe": "full", "settings": {"data.validation": "'..'"}}, "not a path"),
     ({"recipe": "full", "settings": {"prompts": "('a', '~x')"}}, "not a path"),
     ({"recipe": "full", "settings": {"prompts_file": "x"}}, "names no file"),
     ({"recipe": "full", "settings": {"data.condition_folder": "x"}}, "names no file"),
     ({"recipe": "full", "name": "../x"}, "name"), ({"recipe": "full", "settings": {"seed": None}}, "seed")],
)  # fmt: skip
def test_what_cannot_be_run_is_said(place, order, said):
    with pytest.raises(ValueError, match=said):
        teaching.order_of(Library(place), order)


def test_a_run_is_told_to_stop_and_the_queue_how_far_it_is(place, job, monkeypatch):
    queue, folder, told = Queue(place.queue), place.run(job.key), []
    monkeypatch.setattr(teaching.os, "kill", lambda *given: told.append(given))
    monkeypatch.setattr(teaching, "EVERY", 0.01)
    with teaching._watched(queue, job, folder):
        wait_for(lambda: queue.get(job.id).phase == "preparing")
        (folder / "metrics.jsonl").write_text('{"step": 0, "event": "started"}\n{"step": 4, "loss": 0.5}\n{"ste')
        assert wait_for(lambda: queue.get(job.id).step) == 4 and queue.get(job.id).phase == "training"
        queue.ask(job.id, "stop")
        wait_for(lambda: told)
    assert told == [(os.getpid(), signal.SIGTERM)]


@pytest.mark.parametrize("asked, ended", [("stop", STOPPED), ("", WAITING)])
def test_a_stopped_run_is_stopped_or_waits_again(place, job, monkeypatch, asked, ended):
    queue = Queue(place.queue)
    monkeypatch.setattr(teaching, "_trained", lambda *_: (STOPPED, ""))
    if asked:
        queue.ask(job.id, asked)
        teaching.run(place, queue, job.id)
    else:  # somebody ends the process, the server for one: nothing more begins in it
        with pytest.raises(SystemExit):
            teaching.run(place, queue, job.id)
    assert queue.get(job.id).state == ended


def test_a_run_that_cannot_be_is_failed_and_its_log_stays(place, job):
    queue = Queue(place.queue)
    teaching.run(place, queue, job.id)
    ended = queue.get(job.id)
    assert ended.state == FAILED and "data.path" in ended.error and str(place.root) not in ended.error
    assert queue.resume(job.id).state == WAITING and queue.get(job.id).state not in (RUNNING, DONE)


def test_figures(tmp_path):
    lines = [json.dumps({"step": i, "loss": 1 / (i + 1)}) for i in range(5000)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(["no json", *lines, "[1]"]))
    found = teaching.figures(tmp_path, 100)
    assert len(found) <= 101 and found[-1]["step"] >= 4900 and found == sorted(found, key=lambda one: one["step"])
    assert teaching.last_figures(tmp_path)["step"] == 4999 and teaching.figures(tmp_path / "none") == []


def test_an_adapter_is_kept_under_a_name(place):
    export = place.run(KEY) / "export"
    export.mkdir(parents=True)
    with pytest.raises(SettingError, match="exported an adapter"):
        teaching.keep(place, KEY, "cat")
    write_lora(export / "lora.safetensors")
    assert teaching.keep(place, KEY, "cat") == ["cat.safetensors"]
    assert (place.named / "cat.safetensors").read_bytes() == (export / "lora.safetensors").read_bytes()
    for name in ("cat", "../cat", "", None, "a/b", "x" * 99):
        with pytest.raises(SettingError, match="name"):
            teaching.keep(place, KEY, name)
