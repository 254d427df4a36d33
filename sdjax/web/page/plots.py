"""Many pictures at once: a table of varied settings, or a list of jobs."""

from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax.service import plots
from sdjax.service.queue import Job
from sdjax.web.page import form, marks, stage, words
from sdjax.web.page.desk import Desk
from sdjax.web.page.marks import tag

AXES = "XYZ"
LOOKED = 1000  # newest jobs to search for those of a table
ENDINGS = [".jsonl", ".csv", ".parquet"]


@dataclass
class Plot:
    """The components."""

    axes: list[tuple[Any, Any]]
    go: Any
    table: Any
    problem: Any
    rows: Any
    put: Any
    rows_problem: Any


def build(desk: Desk) -> Plot:
    """Makes the components, in the open block."""
    axes = []
    with gr.Accordion("Compare settings in a table (X/Y/Z plot)", open=False, elem_id="plot"):
        for i, letter in enumerate(AXES):
            with gr.Row():
                choices = [("Nothing", ""), *((form.label(name), name) for name in plots.names("text2img"))]
                name = gr.Dropdown(choices, value="", label=f"{letter}: setting", elem_id=f"axis-{letter}",
                                   info="The setting that varies along this axis.", min_width=140)  # fmt: skip
                text = gr.Textbox(label="Values", placeholder=("10, 20, 30", "1-9 (+2)", "0-1 [5]")[i], min_width=140,
                                  info="Prompt: a word, then replacements.", elem_id=f"values-{letter}")  # fmt: skip
            axes.append((name, text))
        go = gr.Button("Make the table", elem_id="make-plot")
        problem = marks.area()
        table = marks.area(elem_id="table")
    with gr.Accordion("Add a list of jobs to the queue", open=False, elem_id="list"):
        rows = gr.File(label="A list: .jsonl, .csv or .parquet", file_types=ENDINGS, height=120)
        put = gr.Button("Add all to queue", elem_id="add-list")
        rows_problem = marks.area()
    return Plot(axes, go, table, problem, rows, put, rows_problem)


def wire(desk: Desk, plot: Plot, pictures: Any) -> None:
    """Connects the components with the form."""
    services = desk.services

    def make(*given: Any) -> list[Any]:
        texts, rest = given[: 2 * len(AXES)], given[2 * len(AXES) :]
        task, values, _ = pictures.read(*rest)
        axes = [plots.Axis(name, text or "") for name, text in zip(texts[::2], texts[1::2], strict=True) if name]
        for order in plots.plotted(services.library, task, values, axes):
            services.queue.add("pictures", order, "page")
        return []

    def put(path: str | None, *rest: Any) -> list[Any]:
        if not path:
            raise ValueError("drop a list first")
        made, errors = plots.listed(services.library, Path(path), {"grammar": "a1111"})
        for order in made:
            services.queue.add("pictures", order, "page")
        told = marks.said(f"{words.count(len(made), 'job')} added") if made else Markup("")
        return [marks.join([told, *(marks.problem(one) for one in errors[:10])])]

    inputs = [one for pair in plot.axes for one in pair]
    desk.look(desk.on(plot.go.click, make, [*inputs, *pictures.inputs], [], plot.problem))
    desk.look(desk.on(plot.put.click, put, [plot.rows, *pictures.inputs], [plot.rows_problem]))
    desk.live(plot.table, lambda: newest(desk), jobs=True)

    def choose(event: gr.EventData) -> list[Any]:
        return [[int(event._data["job"]), 0]]

    desk.look(desk.on(plot.table.act, choose, [], [pictures.chosen], plot.problem))


def newest(desk: Desk) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the newest table."""
    jobs = desk.services.queue.newest(LOOKED)
    last = next((job.request["plot"] for job in jobs if _is_plot(job.request.get("plot"))), None)
    if last is None:
        return None, lambda: Markup("")
    own = [job for job in jobs if _is_plot(job.request.get("plot")) and job.request["plot"]["key"] == last["key"]]
    there = {tuple(job.request["plot"]["at"]): job for job in own}
    return (last["key"], tuple((job.id, job.state) for job in own)), lambda: table(last["axes"], there)


def _is_plot(told: Any) -> bool:
    return isinstance(told, dict) and {"key", "axes", "at"} <= told.keys()


def table(axes: list[Any], jobs: dict[tuple[int, ...], Job]) -> Markup:
    """Returns a table of pictures for each value of the third axis."""
    (x, xs), (y, ys), (z, zs) = [*axes, *[["", [""]]] * (3 - len(axes))]
    made = []
    for k, of_z in enumerate(zs):
        head = tag(
            "tr", tag("th", f"{form.label(y)} ↓" if y else ""), *(tag("th", f"{form.label(x)}: {v}") for v in xs)
        )
        rows = [head]
        for j, of_y in enumerate(ys):
            cells = [_cell(jobs.get((i, j, k)[: len(axes)])) for i in range(len(xs))]
            rows.append(tag("tr", tag("th", of_y), *cells))
        made.append(tag("div", tag("h4", f"{form.label(z)}: {of_z}") if z else None, tag("table", *rows), cls="plot"))
    return marks.join(made)


def _cell(job: Job | None) -> Markup:
    if job is None or not job.pictures:
        return tag("td", "" if job is None else words.STATES[job.state], cls="dim")
    picture = tag("img", src=stage.address(job.id, 0), alt="", loading="lazy")
    return tag("td", tag("div", picture, data={"do": "choose", "job": job.id}, role="button", tabindex="0"))
