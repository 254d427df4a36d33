"""A server with the page, and a browser in front of it.  Run by `make test-ui`, not by `make test`."""

import shutil
import time

import numpy as np
import pytest
from PIL import Image

from sdjax.data import pocketland
from sdjax.service.queue import Queue
from tests.serving import Served

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "/usr/bin/chromium")
STEPS = 4  # of pictures, so that tests are fast
PERSON = 10_000_003  # an identity that was held out from training


@pytest.fixture(scope="session")
def served(tmp_path_factory):
    """The server, with the embedded model, for all tests."""
    models = tmp_path_factory.mktemp("models")
    one = Served(tmp_path_factory.mktemp("served") / "ui", "--models", models, model="pocket", page=True).start()
    one.models = models
    Queue(one.out / "queue.db").options(**{"page.defaults": {"steps": STEPS}})
    yield one
    one.stop()


@pytest.fixture(scope="session")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield made
        made.close()


class Watched:
    """What went wrong in a browser: errors of the console, failed answers, requests to other hosts; all requests."""

    def __init__(self, context, url):
        self.url, self.errors, self.foreign, self.requests = url, [], [], []
        context.on("page", self._page)

    def _page(self, page):
        page.on("console", lambda one: self.errors.append(one.text) if one.type == "error" else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("response", lambda one: self.errors.append(f"{one.status} {one.url}") if one.status >= 400 else None)
        page.on("dialog", lambda one: (self.errors.append(f"dialog {one.message}"), one.dismiss()))
        page.on("request", self._request)

    def _request(self, request):
        self.requests.append((time.monotonic(), request.url))
        if not request.url.startswith((self.url, "data:", "blob:")):
            self.foreign.append(request.url)

    def check(self):
        assert not self.errors and not self.foreign, (self.errors, self.foreign)


@pytest.fixture
def context(browser, served):
    made = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    made.set_default_timeout(60_000)
    made.watched = Watched(made, served.url)
    yield made
    made.watched.check()
    made.close()


@pytest.fixture
def page(context, served):
    """The page, opened."""
    return opened(context, served)


def opened(context, served):
    """Returns a new tab of the page."""
    page = context.new_page()
    page.goto(served.url)
    page.wait_for_selector("#generate")
    page.wait_for_function("window.sdjax_pictures === true")
    page.wait_for_timeout(300)
    return page


def go(page, tab):
    """Opens a tab of the page."""
    page.get_by_role("tab", name=tab, exact=True).first.click()


@pytest.fixture(scope="session")
def faces(tmp_path_factory):
    """Five photos of somebody whom the model has never seen."""
    folder, person, made = tmp_path_factory.mktemp("faces"), pocketland.identity(PERSON), []
    for i in range(5):
        place = pocketland.scene(100 + i, context="room", style="photo", accessory="none")
        made.append(folder / f"{i}.png")
        Image.fromarray(np.asarray(pocketland.draw(person, place))).resize((256, 256)).save(made[-1])
    return made
