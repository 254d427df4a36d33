"""Runs: the queue, its history, and a run's progress."""

from typing import Any

import gradio as gr

from sdjax.service import taught, teaching
from sdjax.service.queue import RUNNING, WAITING, Job
from sdjax.web.page import details, marks
from sdjax.web.page.desk import Desk

ID, TITLE, ORDER = "runs", "Runs", 3


def build(desk: Desk) -> None:
    """Makes the components."""
    queue, library = desk.services.queue, desk.services.library
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=4, min_width=320, elem_classes="side"):
            with gr.Row(elem_classes="bar-of-buttons", equal_height=True):
                pause = gr.Button("Pause the queue", size="sm", elem_id="pause")
                clear = gr.Button("Cancel all waiting jobs", size="sm", elem_id="clear")
            problem = marks.area()
            jobs = marks.area(elem_id="jobs")
        with gr.Column(scale=8, min_width=340, elem_classes="stage"):
            detail = marks.area(elem_id="detail")
            chosen = gr.State()
    desk.places[ID] = chosen
    desk.places["detail"], desk.places["runs problem"] = detail, problem
    desk.live(jobs, lambda given: details.listed(queue, given), [chosen])
    desk.live(detail, lambda given: details.detail(queue, library, given), [chosen])
    desk.live(pause, lambda: (queue.paused, lambda: "Resume the queue" if queue.paused else "Pause the queue"))

    def act(given: Any, event: gr.EventData) -> list[Any]:
        do, id = event._data["do"], int(event._data["job"])
        return [id] if do == "choose" else [_asked(desk, do, id, given)]

    for area in (jobs, detail):
        desk.look(desk.on(area.act, act, [chosen], [chosen], problem))
    desk.look(desk.on(pause.click, lambda: queue.pause(not queue.paused) or [], [], [], problem))
    desk.look(desk.on(clear.click, lambda: queue.clear() and [] or [], [], [], problem))


def _asked(desk: Desk, do: str, id: int, chosen: Any) -> Any:
    """Does the action of a job's button; returns the job to show."""
    queue, job = desk.services.queue, desk.job(id)
    if do in teaching.ORDERS:
        if job.state != RUNNING:
            raise ValueError("this run is over")
        teaching.order(desk.services.place.run(job.key), do)
    elif do == "forget":
        queue.forget(id)
        return None
    elif do == "resume":
        queue.resume(id)
    elif do == "first":
        first = next((one.id for one in queue.waiting() if one.state == WAITING), None)
        queue.move(id, first)
    else:
        queue.ask(id, "skip" if do == "skip" else "stop")
    return chosen


def wire(desk: Desk, page: Any) -> None:
    """Connects the tab with Pictures and Teach."""
    detail, problem = desk.places["detail"], desk.places["runs problem"]
    pictures, teach = desk.places["pictures"], desk.places["teach"]

    def send(event: gr.EventData) -> list[Any]:
        job, to = desk.job(event._data["job"]), event._data["to"]
        skips = [gr.skip()] * len(pictures.outputs)
        if to == "use":
            return [*use(desk, job), *[gr.skip()] * len(teach.outputs)]
        if job.kind == "training":
            return [gr.Tabs(selected="teach"), *skips, *teach.again(job)]
        return [gr.Tabs(selected="pictures"), *pictures.ordered(job), *[gr.skip()] * len(teach.outputs)]

    desk.on(detail.send, send, [], [desk.tabs, *pictures.outputs, *teach.outputs], problem)


def use(desk: Desk, job: Job) -> list[Any]:
    """Returns updates of [tabs, *the outputs of Pictures] for pictures with a run's results."""
    pictures, services = desk.places["pictures"], desk.services
    made = taught.used(services.library, job)
    image = str(services.place.upload(made.image)) if made.image else None
    filled = pictures.fill("text2img", {"prompt": made.prompt, "model": made.model}, image, whole=False)
    return [gr.Tabs(selected="pictures"), *filled]
