"""What few need, in a browser: ControlNets, tables, lists of jobs, merging; and every tab at three sizes."""

import json

import pytest
from PIL import Image, ImageDraw

from tests.serving import wait_for
from tests.ui.conftest import STEPS, go
from tests.ui.files import write_changed, write_controlnet, write_lora
from tests.ui.test_pictures import fetched, prompt, shown

SIZES = {"phone": (390, 844), "laptop": (1280, 800), "4K": (3840, 2160)}
TABS = ("pictures", "teach", "runs", "library", "info", "settings")


def choose(page, where, text):
    """Picks an entry of a drop-down list."""
    page.locator(f"{where} input").first.click()
    page.locator("[id$=-options]").get_by_role("option", name=text).first.click()


def jobs(served, text):
    return [one for one in served.client().get("/api/jobs")["jobs"] if text in str(one["settings"])]


def entries(served, kind):
    """Returns the names of a kind in the library."""
    return {one["name"] for one in served.client().get(f"/api/library?kind={kind}")}


def test_a_controlnet_follows_what_is_made_of_a_picture(page, served, tmp_path):
    write_controlnet(served.models / "follow")
    wait_for(lambda: "follow" in entries(served, "controlnet"), 30)
    page.reload()
    page.wait_for_function("window.sdjax_pictures === true")
    drawn = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(drawn).ellipse((16, 16, 48, 48), outline="black", width=3)
    drawn.save(tmp_path / "circle.png")
    page.locator("#mode label", has_text="Follow").click()
    page.locator("#units").wait_for()
    choose(page, "#set-control-1", "follow")
    choose(page, "#set-preprocess-1", "canny")
    page.locator("#set-control_image-1 input[type=file]").set_input_files(str(tmp_path / "circle.png"))
    page.locator("#set-control_image-1 img").wait_for()
    page.locator("#units button", has_text="Preview").first.click()
    seen = page.locator("#seen-1 img")
    seen.wait_for()
    prompt(page, "a face inside a circle")
    page.locator("#generate").click()
    shown(page, "a face inside a circle")
    (job,) = jobs(served, "inside a circle")
    assert job["task"] == "controlnet" and job["settings"]["preprocess"] == ["canny"]


def test_a_table_of_settings(page, served):
    prompt(page, "a face of a table")
    page.locator("#plot > button").click()
    choose(page, "#axis-X", "Guidance")
    page.locator("#values-X textarea, #values-X input").first.fill("1, 3")
    choose(page, "#axis-Y", "Seed")
    page.locator("#values-Y textarea, #values-Y input").first.fill("5-6")
    page.locator("#make-plot").click()
    page.locator("#table img").nth(3).wait_for(timeout=240_000)
    made = [fetched(page, one.get_attribute("src")) for one in page.locator("#table img").all()]
    assert len(made) == len(set(made)) == 4


def test_a_list_of_jobs_is_put_into_the_queue(page, served, tmp_path):
    rows = [{"prompt": f"row {i} of a list", "steps": STEPS, "seed": i} for i in range(2)] + [
        {"prompt": "x", "stepz": 1}
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page.locator("#list > button").click()
    page.locator("#list input[type=file]").set_input_files(str(tmp_path / "rows.jsonl"))
    page.get_by_text("rows.jsonl").first.wait_for()
    page.locator("#add-list").click()
    page.locator("#list", has_text="2 jobs added").wait_for()
    page.locator("#list .problem", has_text="stepz").wait_for()
    wait_for(lambda: [one["state"] for one in jobs(served, "of a list")] == ["done"] * 2, 240)


def test_two_adapters_are_merged(page, served):
    for name in ("dots", "lines"):
        write_lora(served.out / "adapters" / f"{name}.safetensors", name)
    wait_for(lambda: {"dots", "lines"} <= entries(served, "lora"), 30)
    go(page, "Library")
    page.locator("#work > button").click()
    for name in ("dots", "lines"):
        choose(page, "#work-of", name)
    page.locator("#work-name textarea, #work-name input").first.fill("dots and lines")
    page.locator("#work-go").click()
    page.locator("#work", has_text="to the queue").wait_for()
    page.locator("#shelf .book", has_text="dots and lines").wait_for(timeout=60_000)


def test_files_are_resized_extracted_and_converted(page, served):
    write_lora(served.out / "adapters" / "waves.safetensors", "waves")
    write_changed(served.models / "changed")
    wait_for(lambda: "waves" in entries(served, "lora") and "changed" in entries(served, "model"), 30)
    go(page, "Library")
    page.locator("#work > button").click()
    for tool, of, rank, form, name in (
        ("Change the rank", ["waves"], 1, "", "thin waves"),
        ("Extract a LoRA", ["pocket", "changed"], 2, "diffusers", "the change"),
        ("Convert a model", ["changed"], None, "single-file", "changed in one"),
    ):
        page.locator("#work label", has_text=tool).click()
        page.locator("#work-of .token").wait_for(state="detached")
        for one in of:
            choose(page, "#work-of", one)
        if rank:
            page.locator("#work-rank input").fill(str(rank))
        if form:
            choose(page, "#work-format", form)
        page.locator("#work-name textarea, #work-name input").first.fill(name)
        page.locator("#work-go").click()
        wait_for(lambda name=name: name in str(served.client().get("/api/jobs")), 30)
    for name in ("thin waves", "the change", "changed in one"):
        page.locator("#shelf .book", has_text=name).wait_for(timeout=90_000)


@pytest.mark.parametrize("size", SIZES)
def test_every_tab_fits(context, served, size):
    page = context.new_page()
    width, height = SIZES[size]
    page.set_viewport_size({"width": width, "height": height})
    page.goto(served.url)
    page.wait_for_selector("#generate")
    for tab in TABS:
        page.evaluate(f"document.querySelector('#tab-{tab}-button').click()")
        page.locator(f"#tab-{tab}").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
