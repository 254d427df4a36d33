"""Settings: folders, initial values of Pictures, theme; saved on the server."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax import __version__
from sdjax.web.page import form, marks
from sdjax.web.page.desk import QUIET, Desk
from sdjax.web.page.marks import tag

ID, TITLE, ORDER = "settings", "Settings", 6
BEGIN = ("negative_prompt", "size", "steps", "sampler", "schedule", "guidance", "seed", "grammar", "clip_skip",
         "noise_source")  # fmt: skip
THEMES = [("As the system", "system"), ("Light", "light"), ("Dark", "dark")]
OPTION = "page.defaults"
PAINT = """theme => {
    if (theme === 'system') localStorage.removeItem('sdjax.theme'); else localStorage.setItem('sdjax.theme', theme);
    const dark = theme === 'dark' || (theme === 'system' && matchMedia('(prefers-color-scheme: dark)').matches);
    document.body.classList.toggle('dark', dark);
    return theme;
}"""
FOLDERS = {
    "models": "Models",
    "adapters": "Adapters",
    "data": "Pictures to learn from",
    "out": "The server's own",
}


def build(desk: Desk) -> None:
    """Makes the components."""
    queue, known = desk.services.queue, form.every()
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=6, min_width=340, elem_classes="side"):
            marks.area(tag("h3", "Initial values of Pictures"))
            controls = {name: form.control(known[name], elem_id=f"begin-{name}") for name in BEGIN}
            with gr.Row():
                keep = gr.Button("Keep", variant="primary", elem_id="keep-defaults")
                usual = gr.Button("Reset", elem_id="usual-defaults")
            problem = marks.area()
            news = marks.area(elem_id="kept")
        with gr.Column(scale=6, min_width=340, elem_classes="side"):
            theme = gr.Radio(THEMES, value="system", label="Theme", elem_id="theme", info="Saved on the server.")
            marks.area(_folders(desk))
            marks.area(_keys())
    desk.places[ID] = (controls, theme)

    def kept(*given: Any) -> list[Any]:
        found = form.values("text2img", {**dict(zip(controls, given, strict=True)), "prompt": ""})
        found = {name: form.shown(value) for name, value in found.items() if name in controls}
        queue.options(**{OPTION: found})
        return [
            marks.said("Saved. Pictures starts with these when you open the page again."),
            *[gr.skip()] * len(controls),
        ]

    def delivered() -> list[Any]:
        queue.options(**{OPTION: {}})
        return [marks.said("Reset."), *_shown(desk, controls)]

    desk.on(keep.click, kept, list(controls.values()), [news, *controls.values()], problem)
    desk.on(usual.click, delivered, [], [news, *controls.values()], problem)
    theme.input(lambda value: queue.options(**{"page.theme": value}), [theme], [], js=PAINT, **QUIET)


def wire(desk: Desk, page: Any) -> None:
    """Fills the tab when the page opens."""
    controls, theme = desk.places[ID]

    def opened() -> list[Any]:
        return [desk.services.queue.option("page.theme", "system"), *_shown(desk, controls)]

    gr.on([page.load], opened, None, [theme, *controls.values()], **QUIET).then(
        None, [theme], [theme], js=PAINT, **QUIET
    )


def _shown(desk: Desk, controls: dict[str, Any]) -> list[Any]:
    known = form.of("text2img")
    values = desk.places["pictures"].defaults()
    return [form.filled(known[name], values.get(name)) for name in controls]


def _folders(desk: Desk) -> Markup:
    place = desk.services.place
    there = {"models": place.models, "adapters": place.named, "data": place.data, "out": place.root}
    rows = [(FOLDERS[name], str(path) if path is not None else f"none; start the server with --{name} DIR")
            for name, path in there.items()]  # fmt: skip
    rows += [("Default model", place.model), ("Numbers", place.dtype), ("Version", __version__)]
    body = [tag("tr", tag("th", name), tag("td", value)) for name, value in rows]
    text = "You set folders when you start the server, never in the browser."
    links = tag("p", tag("a", "The API for other programs", href="/docs", target="_blank"))
    return tag("div", tag("h3", "Folders"), tag("p", text, cls="dim"), tag("table", *body), links, cls="detail")


def _keys() -> Markup:
    rows = [
        ("Ctrl-Enter", "the tab's main button"),
        ("Esc", "stops the running job"),
        ("Tab, Enter", "through cards and buttons"),
    ]
    body = [tag("tr", tag("th", tag("kbd", key)), tag("td", text)) for key, text in rows]
    return tag("div", tag("h3", "Keys"), tag("table", *body), cls="detail")
