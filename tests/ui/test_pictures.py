"""The Pictures tab in a browser: generate, queue, mask, stop; nothing typed or queued is lost."""

import io
import urllib.request

import numpy as np
from PIL import Image

from sdjax.service import records
from tests.serving import wait_for
from tests.ui.conftest import opened


def prompt(page, text):
    page.locator("#set-prompt textarea").fill(text)


def steps(page, count):
    page.locator("#part-Sampling > button").click()
    page.locator("#set-steps input[type=number]").fill(str(count))
    page.locator("#set-steps input[type=number]").press("Tab")


def shown(page, text, seconds=60):
    """Waits until the large picture is that of a prompt; returns its bytes."""
    page.locator("#gallery .large .prompt", has_text=text).wait_for(timeout=1000 * seconds)
    return fetched(page, page.locator("#gallery .large img").get_attribute("src"))


def fetched(page, path):
    with urllib.request.urlopen(page.url.rstrip("/").split("?")[0] + path) as answer:
        return answer.read()


def test_generate(page, tmp_path):
    prompt(page, "a photo of a face on the beach")
    steps(page, 4)
    page.locator("#set-prompt textarea").press("Control+Enter")
    data = shown(page, "a photo of a face on the beach", 120)
    (tmp_path / "made.png").write_bytes(data)
    record = records.read(tmp_path / "made.png")
    assert record["steps"] == 4 and record["prompt"] == "a photo of a face on the beach"
    assert np.asarray(Image.open(io.BytesIO(data))).std() > 10


def test_two_in_the_queue_survive_a_reload_and_a_closed_tab(context, served):
    page = opened(context, served)
    prompt(page, "first of two faces")
    page.locator("#enqueue").click()
    prompt(page, "second of two faces")
    wait_for(lambda: len(served.client().get("/api/jobs")["jobs"]) >= 1)
    page.reload()
    page.wait_for_function("window.sdjax_pictures === true")
    wait_for(lambda: page.locator("#set-prompt textarea").input_value() == "second of two faces", 10)
    page.locator("#enqueue").click()
    wait_for(
        lambda: sum("of two faces" in str(one["settings"]) for one in served.client().get("/api/jobs")["jobs"]) == 2
    )
    page.close()
    jobs = [one for one in served.client().get("/api/jobs")["jobs"] if "of two faces" in str(one["settings"])]
    wait_for(lambda: all(served.client().job(one["id"])["state"] == "done" for one in jobs), 90)
    page = opened(context, served)
    shown(page, "second of two faces")
    assert page.locator("#gallery .small img[alt='first of two faces']").count() == 1
