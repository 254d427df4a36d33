"""The pictures of docs/page.md, from the page itself.

make page-figures          # docs/page_{pictures,teach,runs}.webp
"""

import io

from PIL import Image

from tests.programs import ROOT
from tests.serving import wait_for
from tests.ui.conftest import go
from tests.ui.test_pictures import prompt, shown, steps

PROMPTS = (
    "a photo of a face on the beach", "a watercolor painting of a face in the snow", "a photo of a cat in the forest",
    "a neon sign of a face in the city at night",
)  # fmt: skip


def keep(page, name):
    """Writes what the page shows as a figure."""
    page.wait_for_timeout(1500)
    seen = Image.open(io.BytesIO(page.screenshot()))
    seen.convert("RGB").save(ROOT / "docs" / f"page_{name}.webp", quality=80, method=6)


def test_figures(page, served, faces):
    page.set_viewport_size({"width": 1280, "height": 820})
    steps(page, 20)
    for text in PROMPTS:
        prompt(page, text)
        page.locator("#generate").click()
        shown(page, text)
    keep(page, "pictures")
    go(page, "Teach")
    with page.expect_file_chooser() as chooser:
        page.locator("#drop button").first.click()
    chooser.value.set_files([str(path) for path in faces])
    page.locator("#set .thumb").nth(4).wait_for()
    page.locator("#kind label", has_text="A person").click()
    page.locator("#sentence", has_text="one-photo encoder").wait_for()
    keep(page, "teach")
    page.locator("#start").click()
    page.locator("#learning .done [data-to=use]").click(timeout=170_000)
    wait_for(lambda: "*s" in page.locator("#set-prompt textarea").input_value(), 20)
    go(page, "Runs")
    page.locator("#jobs .job", has_text="person").first.click()
    page.locator("#detail .chart").first.wait_for()
    keep(page, "runs")
