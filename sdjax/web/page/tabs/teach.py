"""Teach: drop pictures, say what they show, start.  The page suggests method and settings, which can be changed."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax.service import picture_sets, recipes, suggest, teaching, uploads
from sdjax.service.queue import DONE, ENDED, FAILED, RUNNING, WAITING, Job
from sdjax.training.recipes import known
from sdjax.web.page import draft, marks, stage, words
from sdjax.web.page.desk import QUIET, Desk
from sdjax.web.page.marks import button, tag
from sdjax.web.page.tabs import pictures, runs

ID, TITLE, ORDER = "teach", "Teach", 2
KINDS = [("A person", "person"), ("A pet", "pet"), ("A thing", "thing"), ("A style", "style")]
GIVEN = ["image", ".zip", ".txt", ".caption"]
GROUPS = {"": "The run", "method": "The method", "data": "Pictures and words", "optim": "How fast it learns",
          "class_data": "Pictures of the class"}  # fmt: skip
BY_ITSELF = "Chosen for you"


@dataclass
class Teach:
    """The components that other tabs fill.

    files: the key of the set.  kind, name, model, recipe: of the order.  changes: {setting: value}.
    """

    desk: Desk
    files: Any
    kind: Any
    name: Any
    model: Any
    recipe: Any
    changes: Any

    @property
    def inputs(self) -> list[Any]:
        """The components of an order."""
        return [self.files, self.kind, self.name, self.model, self.recipe, self.changes]

    @property
    def outputs(self) -> list[Any]:
        """The components that `again` updates."""
        return self.inputs

    def add(self, key: str | None, paths: list[Path]) -> str:
        """Adds pictures to a set, a new one for ""; returns its key."""
        key = key or secrets.token_hex(16)
        uploads.keep_set(self.desk.services.place, key, [(path.name, path.read_bytes()) for path in paths])
        return key

    def again(self, job: Job) -> list[Any]:
        """Returns values of outputs that repeat a run, with a copy of its pictures."""
        order, place = job.request, self.desk.services.place
        key, old = secrets.token_hex(16), (order.get("data") or {}).get("set")
        if isinstance(old, str) and place.set(old).is_dir():
            picture_sets.copied(place, old, key)
        name = str(order.get("name") or "")
        return [key, gr.skip(), name, order.get("model") or "", order.get("recipe"), dict(order.get("settings") or {})]


def build(desk: Desk) -> None:
    """Makes the components."""
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=7, min_width=340, elem_classes="side"):
            drop = gr.File(file_count="multiple", file_types=GIVEN, label="Drop 3 to 20 pictures here", height=160,
                           elem_id="drop")  # fmt: skip
            key = gr.Textbox("", visible="hidden", elem_id="set-key")
            shown = marks.area(elem_id="set")
            edit = _editor()
        with gr.Column(scale=5, min_width=340, elem_classes="stage"):
            kind = gr.Radio(KINDS, value=None, label="What is it?", elem_id="kind", elem_classes="big-choice")
            sentence = marks.area(elem_id="sentence")
            problem = marks.area()
            start = gr.Button("Start", variant="primary", elem_id="start")
            now = marks.area(elem_id="learning")
            with gr.Accordion("Change how it learns", open=False, elem_id="how"):
                name = gr.Textbox(label="Name", info="Its name in the library and in prompts.",
                                  placeholder="my cat", elem_id="teach-name")  # fmt: skip
                model = gr.Dropdown([("The usual one", "")], value="", label="Model", info="The model that learns it.",
                                    elem_id="teach-model")  # fmt: skip
                names = [(BY_ITSELF, ""), *((one, one) for one in known())]
                recipe = gr.Dropdown(names, value="", label="Method", elem_id="recipe",
                                     info="The suggestion depends on pictures, model and memory.")  # fmt: skip
                changes = gr.State({})
                every = gr.Button("Show all settings of this method", size="sm", elem_id="all-settings")
                _settings(desk, recipe, kind, key, model, changes, every)
    made = Teach(desk, key, kind, name, model, recipe, changes)
    desk.places[ID] = made
    desk.places["learning"], desk.places["teach problem"] = now, problem
    desk.live(shown, lambda given: _set(desk, given), [key])
    desk.live(now, lambda: _learning(desk))
    desk.live(sentence, lambda *given: _sentence(made, *given), made.inputs)

    def add(paths: list[str] | None, given: str) -> list[Any]:
        return [made.add(given, [Path(path) for path in paths or []]), None]

    desk.look(desk.on(drop.upload, add, [drop, key], [key, drop], problem))
    desk.look(desk.on(start.click, lambda *given: _started(made, *given), made.inputs, [], problem))
    for one in (kind, model, recipe):
        desk.look(one.change(None, None, None, **QUIET))
    desk.on(recipe.change, lambda: {}, [], [changes])
    _edits(desk, shown, key, edit, problem)


def wire(desk: Desk, page: Any) -> None:
    """Connects the tab with Pictures and fills it when the page opens."""
    made: Teach = desk.places[ID]
    now, problem = desk.places["learning"], desk.places["teach problem"]

    def use(event: gr.EventData) -> list[Any]:
        return runs.use(desk, desk.job(event._data["job"]))

    desk.on(now.send, use, [], [desk.tabs, *desk.places["pictures"].outputs], problem)

    def act(event: gr.EventData) -> list[Any]:
        queue, id = desk.services.queue, int(event._data["job"])
        queue.resume(id) if event._data["do"] == "resume" else queue.ask(id, "stop")
        return []

    desk.look(desk.on(now.act, act, [], [], problem))

    def opened() -> Any:
        entries = desk.services.library.entries("model")
        choices = [("The usual one", ""), *((one.name, one.name) for one in entries)]
        return gr.update(choices=pictures.titles(desk, choices))

    draft.keep([made.files, made.kind, made.name, made.recipe], page.load(opened, None, [made.model], **QUIET), ID)


# ---- the pictures -----------------------------------------------------------------------------------------


@dataclass
class Editor:
    """The components for cutting and masking one picture; name: of the picture."""

    fold: Any
    name: Any
    canvas: Any
    keep: Any
    clean: Any
    leave: Any


def _editor() -> Editor:
    with gr.Group(visible=False, elem_id="edit-picture") as fold:
        name = gr.State()
        brush = gr.Brush(default_size=24, colors=["#ffffff"], color_mode="fixed", default_color="#ffffff")
        canvas = gr.ImageEditor(type="filepath", format="png", brush=brush, layers=False, height=420, sources=(),
                                transforms=("crop",), label="Cut it, or paint over the part to learn",
                                elem_id="edit-canvas")  # fmt: skip
        with gr.Row():
            keep = gr.Button("Keep", variant="secondary", elem_id="edit-keep")
            clean = gr.Button("Remove the mask")
            leave = gr.Button("Cancel")
    return Editor(fold, name, canvas, keep, clean, leave)


def _edits(desk: Desk, shown: Any, key: Any, edit: Editor, problem: Any) -> None:
    """Connects the buttons that edit pictures of the set."""
    place = desk.services.place

    def act(given: str, event: gr.EventData) -> list[Any]:
        do, name = event._data["do"], event._data.get("name", "")
        if do == "caption":
            picture_sets.describe(place, given, name, str(event._data.get("value", "")))
        elif do == "turn":
            picture_sets.turn(place, given, name)
        elif do == "remove":
            picture_sets.remove(place, given, name)
        elif do == "empty":
            return ["", gr.update(visible=False), None, gr.skip()]
        elif do == "edit":
            path = str(picture_sets.picture(place, given, name))
            return [given, gr.update(visible=True), name, {"background": path, "layers": [], "composite": None}]
        return [gr.skip(), gr.skip(), gr.skip(), gr.skip()]

    def keep(given: str, name: str, canvas: Mapping[str, Any] | None) -> list[Any]:
        if canvas and canvas.get("background"):
            layer = next((Path(one).read_bytes() for one in canvas["layers"] if one), None)
            picture_sets.redraw(place, given, name, Path(canvas["background"]).read_bytes(), layer)
        return [gr.update(visible=False), None]

    def clean(given: str, name: str) -> list[Any]:
        picture_sets.clean(place, given, name)
        return [gr.update(visible=False), None]

    desk.look(desk.on(shown.act, act, [key], [key, edit.fold, edit.name, edit.canvas], problem))
    desk.look(desk.on(edit.keep.click, keep, [key, edit.name, edit.canvas], [edit.fold, edit.name], problem))
    desk.look(desk.on(edit.clean.click, clean, [key, edit.name], [edit.fold, edit.name], problem))
    desk.on(edit.leave.click, lambda: [gr.update(visible=False), None], [], [edit.fold, edit.name], problem)


def _listed(desk: Desk, key: str | None) -> list[picture_sets.Shown]:
    try:
        return picture_sets.listed(desk.services.place, key) if key else []
    except ValueError:
        return []


def _set(desk: Desk, key: str | None) -> tuple[Any, Any]:
    there = _listed(desk, key)
    return (key, tuple((one.name, one.caption, one.masked, one.state) for one in there)), lambda: _thumbs(key, there)


def _thumbs(key: str | None, there: list[picture_sets.Shown]) -> Markup:
    if not there:
        return marks.empty(
            "No pictures yet", "Five work well: sharp, from different sides, with different backgrounds."
        )
    head = tag(
        "p", words.count(len(there), "picture"), button("Start over", "empty", title="Other pictures"), cls="dim"
    )
    return tag("div", head, tag("div", *(_thumb(key, one) for one in there), cls="thumbs"))


def _thumb(key: str | None, one: picture_sets.Shown) -> Markup:
    picture = tag("img", src=f"/api/sets/{key}/{one.name}?at={one.state}", alt=one.name, loading="lazy")
    caption = tag(
        "input",
        value=one.caption,
        placeholder="what is on it (optional)",
        aria_label=f"Caption of {one.name}",
        maxlength="2000",
        data={"change": "caption", "name": one.name},
    )
    asked = (("⟳", "turn", "Turn"), ("✂", "edit", "Cut or mask"), ("✕", "remove", "Remove"))
    acts = [button(sign, do, "tool", title, name=one.name) for sign, do, title in asked]
    badge = tag("span", "masked", cls="badge") if one.masked else None
    return tag("div", tag("div", picture, badge, tag("div", *acts, cls="tools"), cls="frame"), caption, cls="thumb")


# ---- orders and progress -----------------------------------------------------------------------------------


def order_of(
    made: Teach, key: str, kind: str | None, name: str, model: str, recipe: str, changes: Any
) -> dict[str, Any]:
    """Returns the order of a run.  Raises ValueError for a missing choice."""
    there = _listed(made.desk, key)
    if not there:
        raise ValueError("drop some pictures first")
    if not kind and not recipe:
        raise ValueError("say what it is: a person, a pet, a thing or a style")
    services = made.desk.services
    found = suggest.suggest(services.library, services.queue, model, kind or "thing", len(there))
    settings = {**(found.settings if not recipe or recipe == found.recipe else {}), **(changes or {})}
    if any(one.masked for one in there):
        settings.setdefault("data.mask", True)
    entry = services.library.find("model", model or services.library.own.name).name
    own = recipe or found.recipe
    order: dict[str, Any] = {"recipe": own, "data": {"set": key}, "model": entry, "settings": settings}
    if own.endswith("tune"):
        order["init"] = entry
    called = (name or "").strip() or (kind or own.replace("/", " "))
    return {**order, "name": called}


def _started(made: Teach, *given: Any) -> list[Any]:
    services = made.desk.services
    order = order_of(made, *given)
    copy = secrets.token_hex(16)
    picture_sets.copied(services.place, order["data"]["set"], copy)
    kept, steps = teaching.order_of(services.library, {**order, "data": {"set": copy}})
    services.queue.add("training", kept, "page", steps)
    return []


def _sentence(made: Teach, key: str, kind: str | None, name: str, model: str, recipe: str, changes: Any) -> tuple:
    there = _listed(made.desk, key)
    masks = sum(one.masked for one in there)
    device = made.desk.services.queue.option("device", {})
    told = (len(there), masks, kind, model, recipe, tuple(sorted(map(str, (changes or {}).items()))), str(device))
    return told, lambda: _said(made, len(there), masks, kind, model, recipe, changes or {})


def _said(made: Teach, count: int, masks: int, kind: str | None, model: str, recipe: str, changes: Any) -> Markup:
    if not kind or not count:
        text = (
            "Drop pictures and say what they show; the page then suggests a method." if not count else "Say what it is."
        )
        return tag("p", text, cls="sentence dim")
    services = made.desk.services
    try:
        found = suggest.suggest(services.library, services.queue, model, kind, count)
    except ValueError as error:
        return marks.problem(made.desk.said(error))
    if recipe and recipe != found.recipe:
        own = [tag("b", recipe), " learns it, as chosen."]
    else:
        time, room = words.duration(found.seconds), f"{found.memory / 1e9:.1f} GB"
        said = "as last time" if found.known else "the first time"
        own = ["Learns it as ", tag("b", found.method), f": about {time} {said}, with about {room} of memory."]
    own.append(f" {words.count(masks, 'mask')} used." if masks else "")
    own.append(f" {words.count(len(changes), 'setting')} changed by you." if changes else "")
    return tag("p", *own, cls="sentence")


def _learning(desk: Desk) -> tuple[Any, Any]:
    queue = desk.services.queue
    job, behind = stage.current(queue, "training")
    last = next((one for one in queue.newest(100) if one.kind == "training"), None) if job is None else None
    shown = job or last
    key = shown and (shown.id, shown.state, shown.phase, shown.step, shown.asked, behind, words.left(shown))
    return key, lambda: _card(desk, shown, behind)


def _card(desk: Desk, job: Job | None, behind: int) -> Markup:
    if job is None:
        return Markup("")
    if job.state in (RUNNING, WAITING):
        waits = job.state == WAITING and any(one.state == RUNNING for one in desk.services.queue.waiting())
        note = tag("p", "It starts after the job before it.", cls="dim") if waits else None
        return marks.join([stage.card(desk.services.queue, job, behind), note])
    name = words.name(job)
    if job.state == DONE:
        use = button("Make pictures of it", "send", "main", to="use", job=job.id)
        return tag(
            "div", tag("p", tag("b", name), " is ready.", cls="name"), tag("div", use, cls="acts"), cls="card done"
        )
    text = f"{name}: {job.error}" if job.state == FAILED else f"{name} was stopped; what it learned is kept."
    told = marks.problem(text) if job.state == FAILED else tag("p", text, cls="name")
    again = button("Resume", "resume", job=job.id) if job.state in ENDED else None
    return tag("div", told, tag("div", again, cls="acts"), cls="card")


# ---- all settings of a method ------------------------------------------------------------------------------


def _settings(desk: Desk, recipe: Any, kind: Any, key: Any, model: Any, changes: Any, every: Any) -> None:
    """Shows the settings of the method on request; stores edits in `changes`."""

    @gr.render(inputs=[recipe, kind, key, model, changes], triggers=[every.click], show_progress="hidden")
    def shown(chosen: str, what: str | None, given: str, of: str, changed: dict[str, Any]) -> None:
        services = desk.services
        count = max(1, len(_listed(desk, given)))
        found = suggest.suggest(services.library, services.queue, of, what or "thing", count)
        own = chosen or found.recipe
        start = {**(found.settings if own == found.recipe else {}), **(changed or {})}
        marks.area(tag("p", recipes.about(own), cls="dim"))
        groups: dict[str, list[recipes.Declared]] = {}
        for one in recipes.declared(own):
            groups.setdefault(one.group, []).append(one)
        for group, some in groups.items():
            with gr.Accordion(GROUPS.get(group, group), open=False):
                for one in some:
                    _setting(one, start.get(one.name, one.value), changes)


def _setting(one: recipes.Declared, value: Any, changes: Any) -> None:
    named: dict[str, Any] = {"label": one.name, "info": str(marks.escape(one.help)) or None, "interactive": True}
    if isinstance(value, bool):
        made = gr.Checkbox(value, **named)
    else:
        made = gr.Textbox("" if value is None else _text(value), **named)
    kept = one.value

    def change(given: Any, before: dict[str, Any]) -> dict[str, Any]:
        own = _parsed(given, kept)
        left = {name: old for name, old in (before or {}).items() if name != one.name}
        return left if own == kept or own is None else {**left, one.name: own}

    event = made.change if isinstance(made, gr.Checkbox) else made.blur
    event(change, [made, changes], changes, **QUIET)


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _parsed(given: Any, usual: Any) -> Any:
    """Returns a field's value in the type of its default; otherwise its text, which the run rejects."""
    if isinstance(usual, bool) or not isinstance(given, str):
        return given
    if isinstance(usual, tuple):
        return [part.strip() for part in given.split(",") if part.strip()]
    for kind in (int, float):
        try:
            return kind(given) if not isinstance(usual, str) else given
        except ValueError:
            continue
    return given
