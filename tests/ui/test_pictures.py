"""The Pictures tab in a browser: generate, queue, mask, stop; nothing typed or queued is lost."""

import io
import urllib.request

import numpy as np
from PIL import Image

from sdjax.service import records
from tests.serving import wait_for
from tests.ui.conftest import STEPS, go, opened
from tests.ui.files import PAYLOADS


def prompt(page, text):
    page.locator("#set-prompt textarea").fill(text)


def steps(page, count):
    page.locator("#part-Sampling > button").click()
    page.locator("#set-steps input[type=number]").fill(str(count))
    page.locator("#set-steps input[type=number]").press("Tab")


def shown(page, text, seconds=240):
    """Waits until the large picture is that of a prompt; returns its bytes."""
    page.locator("#gallery .large .prompt", has_text=text).wait_for(timeout=1000 * seconds)
    return fetched(page, page.locator("#gallery .large img").get_attribute("src"))


def fetched(page, path):
    with urllib.request.urlopen(page.url.rstrip("/").split("?")[0] + path) as answer:
        return answer.read()


def test_generate(page, tmp_path):
    prompt(page, "a photo of a face on the beach")
    page.locator("#set-prompt textarea").press("Control+Enter")
    data = shown(page, "a photo of a face on the beach")
    (tmp_path / "made.png").write_bytes(data)
    record = records.read(tmp_path / "made.png")
    assert record["steps"] == STEPS and record["prompt"] == "a photo of a face on the beach"
    assert np.asarray(Image.open(io.BytesIO(data))).std() > 10


def test_styles_are_chosen_and_the_command_is_copied(context, served):
    table = served.out / "styles.csv"
    table.write_text("name,prompt,negative_prompt\nink,an ink drawing of {prompt},\n")
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    page = opened(context, served)
    prompt(page, "a small face")
    page.locator("#styles input").click()
    page.get_by_role("option", name="ink").click()
    page.keyboard.press("Escape")
    page.locator("#generate").click()
    shown(page, "an ink drawing of a small face")
    table.unlink()
    go(page, "Runs")
    page.locator("#detail summary", has_text="Command").click()
    page.locator("#detail button", has_text="Copy").click()
    text = page.locator("#detail pre").first.inner_text()
    assert text.startswith("sdjax text2img --prompt 'an ink drawing of a small face'") and f"--steps {STEPS}" in text
    wait_for(lambda: page.evaluate("navigator.clipboard.readText()") == text, 10)


def test_two_in_the_queue_survive_a_reload_and_a_closed_tab(context, served):
    page = opened(context, served)
    prompt(page, "first of two faces")
    page.locator("#enqueue").click()
    prompt(page, "second of two faces")
    wait_for(lambda: len(served.client().get("/api/jobs")["jobs"]) >= 1)
    wait_for(lambda: "second of" in (page.evaluate("localStorage.getItem('sdjax.draft.pictures')") or ""), 10)
    page.reload()
    page.wait_for_function("window.sdjax_pictures === true")
    wait_for(lambda: page.locator("#set-prompt textarea").input_value() == "second of two faces", 10)
    page.locator("#enqueue").click()
    wait_for(
        lambda: sum("of two faces" in str(one["settings"]) for one in served.client().get("/api/jobs")["jobs"]) == 2
    )
    page.close()
    jobs = [one for one in served.client().get("/api/jobs")["jobs"] if "of two faces" in str(one["settings"])]
    wait_for(lambda: all(served.client().job(one["id"])["state"] == "done" for one in jobs), 240)
    page = opened(context, served)
    shown(page, "second of two faces")
    assert page.locator("#gallery .small img[alt='first of two faces']").count() == 1


def test_a_painted_mask_is_repainted(page, tmp_path):
    path = tmp_path / "grey.png"
    Image.new("RGB", (64, 64), (90, 120, 150)).save(path)
    page.locator("#mode label", has_text="Repaint").click()
    canvas = page.locator("#editor canvas").first
    canvas.wait_for()
    page.wait_for_timeout(1500)
    page.locator("#editor input[type=file]").first.set_input_files(str(path))
    page.wait_for_timeout(1500)
    page.locator("#editor [aria-label='Brush'], #editor [title='Brush']").first.click()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 20, y)
    page.mouse.down()
    for i in range(9):
        page.mouse.move(x - 20 + 5 * i, y + (i % 2) * 10, steps=3)
    page.mouse.up()
    page.wait_for_timeout(800)
    prompt(page, "a red hat in the middle")
    page.locator("#generate").click()
    data = shown(page, "a red hat in the middle")
    (tmp_path / "made.png").write_bytes(data)
    record = records.read(tmp_path / "made.png")
    made = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    changed = np.abs(made - np.array([90, 120, 150])).max(axis=2) > 40
    assert record.task == "inpaint" and changed.any() and not changed.all()


def test_stop(page, served):
    prompt(page, "a picture that is stopped")
    steps(page, 100)
    page.locator("#generate").click()
    page.locator("#now .now.running", has_text="stopped").wait_for()
    page.locator("#set-prompt textarea").press("Escape")
    (job,) = (one for one in served.client().get("/api/jobs")["jobs"] if "is stopped" in str(one["settings"]))
    wait_for(lambda: served.client().job(job["id"])["state"] == "cancelled", 120)


def test_an_error_is_one_sentence_in_its_place(page):
    prompt(page, "a face")
    page.locator("#set-size input").fill("0x0")
    page.locator("#set-size input").press("Tab")
    page.locator("#generate").click()
    page.locator("#problem .problem", has_text="Size").wait_for()
    assert page.locator(".toast-wrap .toast-body").count() == 0


def test_prompts_are_text(page, served):
    """None of these texts becomes a tag or a program, wherever it is shown."""
    client = served.client()
    client.post("/api/queue/pause")
    for text in PAYLOADS:
        client.submit("text2img", prompt=text, negative_prompt=text, steps=1)
    go(page, "Runs")
    for text in PAYLOADS:
        row = page.locator("#jobs .job .name", has_text=text[:40].strip()).first
        row.click()
        page.locator("#detail h3", has_text=text[:40].strip()).wait_for()
    inside = (
        "#jobs :is(script, iframe, svg, a, style, [onerror], [onload]), #detail :is(script, iframe, style, [onerror])"
    )
    assert page.locator(inside).count() == 0
    client.post("/api/queue/clear")
    client.post("/api/queue/go")


def test_an_idle_tab_asks_little(page, context):
    page.wait_for_timeout(2000)
    begin = len(context.watched.requests)
    page.wait_for_timeout(6000)
    rate = (len(context.watched.requests) - begin) / 6
    print(f"{rate:.2f} requests a second")
    assert rate <= 2
