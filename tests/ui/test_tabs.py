"""Teach, Library, Picture info and Settings in a browser."""

import io
import time
import zipfile

from PIL import Image, PngImagePlugin

from tests.serving import wait_for
from tests.ui.conftest import go, opened
from tests.ui.files import PAYLOADS, write_lora
from tests.ui.test_pictures import prompt, shown


def test_teach_from_five_pictures_and_use_it(context, served, faces):
    """Three clicks teach, two more make the first picture."""
    page, begin = opened(context, served), time.monotonic()
    go(page, "Teach")
    with page.expect_file_chooser() as chooser:  # 1: choose the pictures
        page.locator("#drop button").first.click()
    chooser.value.set_files([str(path) for path in faces])
    page.locator("#set .thumb").nth(4).wait_for()
    page.locator("#kind label", has_text="A person").click()  # 2: say what it is
    page.locator("#sentence", has_text="one-photo encoder").wait_for()
    page.locator("#start").click()  # 3: start
    page.locator("#learning .now").wait_for()
    page.reload()  # loses nothing
    go(page, "Teach")
    assert page.locator("#set .thumb").count() == 5 or page.locator("#set .thumb").nth(4).wait_for() is None
    page.locator("#learning .done [data-to=use]").click(timeout=170_000)  # 4
    wait_for(lambda: "*s" in page.locator("#set-prompt textarea").input_value(), 20)
    page.locator("#generate").click()  # 5
    shown(page, "a photo of *s")
    print(f"taught and shown in {time.monotonic() - begin:.0f} s, 5 clicks")
    go(page, "Runs")
    page.locator("#jobs .job", has_text="person").first.click()
    page.locator("#detail .chart").first.wait_for()
    assert page.locator("#detail .strip img").count() >= 1


def test_library_search_and_package(page, served):
    make_lora(served)
    go(page, "Library")
    page.locator("#shelf .book", has_text="ink").wait_for()
    page.locator("#search textarea, #search input").first.fill("nothing like this")
    page.locator("#shelf .empty").wait_for()
    page.locator("#search textarea, #search input").first.fill("ink")
    page.locator("#shelf .book").click()
    page.locator("#notes textarea").fill("<b>my</b> notes")
    page.locator("#tags textarea, #tags input").first.fill("drawing, <i>line</i>")
    page.locator("#keep-notes").click()
    page.locator("#shelf .chip", has_text="drawing").wait_for()
    with page.expect_download() as got:
        page.locator("#book a", has_text="Package").click()
    assert "README.md" in zipfile.ZipFile(got.value.path()).namelist()
    page.locator("#book [data-to=use]").click()
    wait_for(lambda: "<lora:ink:1>" in page.locator("#set-prompt textarea").input_value(), 10)


def make_lora(served):
    """Puts a small LoRA for the embedded model among those that prompts name."""
    write_lora(served.out / "adapters" / "ink.safetensors")


def test_picture_info_round_trip(page, served, tmp_path):
    prompt(page, "a face to be found again")
    page.locator("#generate").click()
    data = shown(page, "a face to be found again")
    path = tmp_path / "made.png"
    path.write_bytes(data)
    go(page, "Picture info")
    page.locator("#info-file input[type=file]").set_input_files(str(path))
    page.locator("#told .prompt", has_text="a face to be found again").wait_for()
    go(page, "Pictures")
    prompt(page, "")
    go(page, "Picture info")
    page.locator("#told [data-to=reuse]").click()
    wait_for(lambda: page.locator("#set-prompt textarea").input_value() == "a face to be found again", 10)
    before = page.locator("#gallery .small").count()
    page.locator("#generate").click()
    wait_for(lambda: page.locator("#gallery .small").count() == before + 1, 240)
    again = shown(page, "a face to be found again")
    assert pixels(again) == pixels(data)


def pixels(data):
    return Image.open(io.BytesIO(data)).convert("RGB").tobytes()


def test_what_a_file_says_is_text(page, tmp_path):
    go(page, "Picture info")
    for text in PAYLOADS[:6]:
        about = PngImagePlugin.PngInfo()
        about.add_itxt(
            "parameters", f"{text}\nNegative prompt: {text}\nSteps: 20, Sampler: Euler, Seed: 1, Model: m{text}"
        )
        Image.new("RGB", (32, 32)).save(tmp_path / "x.png", pnginfo=about)
        page.locator("#info-file input[type=file]").set_input_files(str(tmp_path / "x.png"))
        page.locator("#told .prompt.big", has_text=text[:60].strip()).wait_for()
        assert page.locator("#told script, #told iframe, #told svg, #told [onerror], #told a").count() == 0
        page.locator("#info-file [aria-label*=lear], #info-file [aria-label*=emove]").first.click()
        page.locator("#told .empty").wait_for()


def test_settings_are_kept_on_the_server(context, served):
    page = opened(context, served)
    go(page, "Settings")
    page.locator("#begin-steps input[type=number]").fill("7")
    page.locator("#begin-steps input[type=number]").press("Tab")
    page.locator("#keep-defaults").click()
    page.locator("#kept .said").wait_for()
    page.locator("#theme label", has_text="Dark").click()
    wait_for(lambda: page.evaluate("document.body.classList.contains('dark')"), 10)
    page.evaluate("localStorage.clear()")
    page.close()
    page = opened(context, served)
    page.locator("#part-Sampling > button").click()
    wait_for(lambda: page.locator("#set-steps input[type=number]").input_value() == "7", 10)
    wait_for(lambda: page.evaluate("document.body.classList.contains('dark')"), 10)
    go(page, "Settings")
    page.locator("#usual-defaults").click()
    page.locator("#theme label", has_text="system").click()
    wait_for(lambda: not page.evaluate("document.body.classList.contains('dark')"), 10)
