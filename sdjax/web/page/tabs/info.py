"""Picture info: the settings in a picture's file, and buttons that use the picture."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax.sampling.settings import TASKS
from sdjax.service import records
from sdjax.service.records import Record
from sdjax.web.page import form, marks, words
from sdjax.web.page.desk import Desk
from sdjax.web.page.marks import button, tag
from sdjax.web.page.tabs import pictures

ID, TITLE, ORDER = "info", "Picture info", 5
SENT = (("reuse", "Use its settings"), ("change", "Change"), ("repaint", "Repaint"), ("enlarge", "Enlarge"),
        ("follow", "Follow its shape"), ("teach", "Teach"))  # fmt: skip
ALWAYS = ("seed", "steps", "sampler", "guidance")  # shown even where they are the usual ones


@dataclass
class Info:
    """The components that other tabs fill."""

    file: Any


def build(desk: Desk) -> None:
    """Makes the components."""
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=5, min_width=340):
            file = gr.Image(type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"], height=460,
                            label="Drop a picture here", elem_id="info-file")  # fmt: skip
            problem = marks.area()
        with gr.Column(scale=7, min_width=340):
            told = marks.area(_nothing(), elem_id="told")
    desk.places[ID] = Info(file)
    desk.places["told"], desk.places["info problem"] = told, problem
    desk.on(file.change, lambda path: [_told(path)], [file], [told], problem)


def wire(desk: Desk, page: Any) -> None:
    """Connects the tab with the others."""
    made, teach, info = desk.places["pictures"], desk.places["teach"], desk.places[ID]

    def send(path: str | None, key: str, event: gr.EventData) -> list[Any]:
        if not path:
            raise ValueError("drop a picture first")
        return pictures.sent(made, teach, key, event._data["to"], Path(path))

    outputs = [desk.tabs, *made.outputs, info.file, teach.files]
    desk.on(desk.places["told"].send, send, [info.file, teach.files], outputs, desk.places["info problem"])


def _nothing() -> Markup:
    return marks.empty(
        "See a picture's settings",
        "Drop a PNG, JPEG or WebP file of sdjax, A1111, ComfyUI, InvokeAI, NovelAI or Fooocus.",
    )


def _told(path: str | None) -> Markup:
    if not path:
        return _nothing()
    try:
        record = records.read(path)
    except ValueError:
        text = "The file has no settings. You can still change, repaint, enlarge or learn from it."
        return tag("div", marks.said(text), _acts(SENT[1:]), cls="detail")
    return tag("div", *_record(record), cls="detail")


def _record(record: Record) -> list[Any]:
    text = records.text(record)
    known = form.every()
    texts = ("prompt", "negative_prompt")
    said = {name: value for name, value in record.settings.items() if name not in texts}
    said = {name: value for name, value in said.items() if value is not None and value is not False}  # 0 is a value
    told = {
        name: value for name, value in said.items() if name in ALWAYS or name not in known or value != known[name].usual
    }
    rows = [(form.label(name), form.shown(value)) for name, value in told.items()]
    rows += [(f"hash of {name}", value) for name, value in record.hashes.items()]
    rows += list(record.more.items())
    body = [tag("tr", tag("th", name), tag("td", str(value)[:2000])) for name, value in rows]
    negative = record.settings.get("negative_prompt")
    kind = words.TASKS.get(record.task, record.task) if record.task in TASKS else record.task
    return [
        tag("p", record.settings.get("prompt") or "no prompt", cls="prompt big"),
        tag("p", tag("b", "Left out: "), negative, cls="prompt") if negative else None,
        tag("p", kind, cls="dim"), _acts(SENT), tag("table", *body),
        tag("details", tag("summary", "As text"), tag("pre", text), open=False),
    ]  # fmt: skip


def _acts(sent: Any) -> Markup:
    return tag(
        "div", *(button(label, "send", "main" if to == "reuse" else "", to=to) for to, label in sent), cls="acts"
    )
