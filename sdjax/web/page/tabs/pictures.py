"""Pictures: a form made from the settings' declarations, the current picture, and finished ones."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax.sampling.fields import fields
from sdjax.sampling.settings import TASKS
from sdjax.service import orders, records, styles, uploads
from sdjax.service.library import WHOLE
from sdjax.service.queue import WAITING, Job
from sdjax.service.records import Record
from sdjax.service.tokens import Tokens
from sdjax.settings import SettingError
from sdjax.web.page import draft, form, marks, plots, shelf, stage, units, words
from sdjax.web.page.desk import QUIET, Desk

ID, TITLE, ORDER = "pictures", "Pictures", 1
SOURCE = "page"
OWN = ("image", "mask", *units.NAMES)  # settings with their own controls
# Replace the declared defaults; workers compile these programs ahead, so that the first picture comes at once.
USUAL: dict[str, Any] = {"grammar": "a1111", "seed": -1, "sampler": "euler", "schedule": "automatic"}
DIFFERS = ("steps", "guidance", "strength")  # settings whose default depends on the task
NAMED = ("model", "vae")  # settings that name entries of the library
PICTURED = ("text2img", "img2img", "upscale", "controlnet")  # tasks with a picture but no canvas
MODES = [(words.TASKS[task], task) for task in TASKS]
FIRST = ("Start", "Masking", "Enlarging", "Frames", "Sampling", "Hires")  # parts with a fold of their own
WHITE = "#ffffff"


@dataclasses.dataclass
class Pictures:
    """The components of the tab; fills and reads them.

    controls: {setting: component}; folds: {part: its accordion}; units: of ControlNets.
    """

    desk: Desk
    mode: Any
    count: Any
    controls: dict[str, Any]
    folds: dict[str, Any]
    image_fold: Any
    styles: Any
    image: Any
    editor: Any
    mask: Any
    units: units.Units
    problem: Any
    chosen: Any

    @property
    def inputs(self) -> list[Any]:
        """The components that `read` reads."""
        given = [self.styles, self.image, self.editor, self.mask]
        return [self.mode, self.count, *given, *self.units.inputs, *self.controls.values()]

    @property
    def outputs(self) -> list[Any]:
        """The components that `fill` updates."""
        return [self.mode, self.styles, self.image, self.editor, *self.controls.values()]

    def read(self, mode: str, count: Any, *given: Any) -> tuple[str, dict[str, Any], int]:
        """Returns (task, {setting: value} for orders, count) from the values of inputs; stores uploads."""
        chosen, image, editor, mask, *rest = given
        of_units, values = rest[: len(self.units.inputs)], rest[len(self.units.inputs) :]
        found: dict[str, Any] = dict(zip(self.controls, values, strict=True))
        keep = self.desk.services.kept
        if mode == "inpaint":
            found |= self._painted(editor)
        elif image and mode in PICTURED:
            found["image"] = keep(Path(image).read_bytes(), "image")
        if mask and mode in ("inpaint", "controlnet"):
            found["mask"] = keep(Path(mask).read_bytes(), "mask")
        if mode == "controlnet":
            found |= self.units.read(of_units, keep)
        found |= self._styled(chosen or [], found)
        return mode, form.values(mode, found), 1 if mode == "interpolate" else int(count or 1)

    def _styled(self, chosen: list[str], found: Mapping[str, Any]) -> dict[str, str]:
        known = styles.of(self.desk.services.place)
        names = ("prompt", "negative_prompt")
        texts = styles.applied(
            [known[name] for name in chosen if name in known], *(found[name] or "" for name in names)
        )
        return dict(zip(names, texts, strict=True))

    def _painted(self, editor: Mapping[str, Any] | None) -> dict[str, Any]:
        if not editor or not editor.get("background"):
            raise SettingError("image", None, "a picture to repaint: drop one on the canvas")
        found = {"image": self.desk.services.kept(Path(editor["background"]).read_bytes(), "image")}
        layers = [uploads.painted(self.desk.services.place, Path(one).read_bytes()) for one in editor["layers"] if one]
        drawn = next(filter(None, layers), None)
        return found | ({"mask": drawn} if drawn else {})

    def fill(self, task: str, values: Mapping[str, Any], image: str | None = None, whole: bool = True) -> list[Any]:
        """Returns updates of outputs for a task's settings; whole: reset settings that `values` lacks.

        image: the file of the start picture.
        """
        known = form.of(task)
        found = []
        for name in self.controls:
            one = known.get(name)
            if one is None or not whole and name not in values:
                found.append(gr.skip())
                continue
            value = values.get(name, one.usual)
            strange = one.choices is not None and value is not None and value not in one.choices
            found.append(gr.skip() if strange else form.filled(one, value))
            if name in NAMED and not strange:
                found[-1] = gr.update(value=value or "", choices=listed(self.desk, name))
        plain = image if image and task != "inpaint" else None
        painted = {"background": image, "layers": [], "composite": None} if image and task == "inpaint" else None
        kept = [plain if plain or whole else gr.skip(), gr.skip() if painted is None else painted]
        said = whole or "prompt" in values  # a prompt that was made with styles holds them
        return [task, [] if said else gr.skip(), *kept, *found]

    def ordered(self, job: Job, drawn: Mapping[str, Any] | None = None) -> list[Any]:
        """Returns updates of outputs for a job's order; drawn: values that replace the order's."""
        values = {"model": "", **job.request["settings"], **(drawn or {})}
        image = values.get("image")
        file = self.desk.services.place.upload(image) if isinstance(image, str) else None
        return self.fill(job.request["task"], values, str(file) if file is not None and file.is_file() else None)

    def defaults(self) -> dict[str, Any]:
        """Returns {setting: value} of the form's initial values: the page's, overridden by saved ones."""
        kept = self.desk.services.queue.option("page.defaults", {})
        return {**USUAL, **(kept if isinstance(kept, dict) else {})}


# ---- the components ---------------------------------------------------------------------------------


def build(desk: Desk) -> None:
    """Makes the components."""
    every = form.every()
    tokens = Tokens(desk.services.library)
    controls: dict[str, Any] = {}

    def add(name: str, **more: Any) -> Any:
        controls[name] = form.control(every[name], **more)
        if name in USUAL:
            controls[name].value = USUAL[name]
        return controls[name]

    with gr.Row(elem_classes="split"):
        with gr.Column(scale=5, min_width=340, elem_classes="side"):
            mode = gr.Radio(MODES, value="text2img", show_label=False, container=False, elem_id="mode")
            with gr.Group(elem_classes="ask"):
                add("prompt", lines=3, max_lines=12, placeholder="a photo of a red house by the sea")
                add("negative_prompt", lines=1, max_lines=6, placeholder="what should not be in it")
            counted = marks.area(elem_id="tokens")
            chosen_styles = gr.Dropdown([], multiselect=True, visible=False, label="Styles", elem_id="styles",
                                        info="Texts around the prompt, from styles.csv.")  # fmt: skip
            image_fold = gr.Accordion("A photo of the person or thing", open=False, visible=True, elem_id="image-fold")
            with image_fold:
                image = gr.Image(type="filepath", image_mode=None, format="png", sources=["upload", "clipboard"],
                                 label="Picture", elem_id="image", height=260)  # fmt: skip
            brush = gr.Brush(default_size=24, colors=[WHITE], color_mode="fixed", default_color=WHITE)
            editor = gr.ImageEditor(type="filepath", format="png", label="Paint over the part to repaint",
                                    brush=brush, layers=False, visible=False, elem_id="editor", height=420,
                                    sources=["upload", "clipboard"], transforms=())  # fmt: skip
            mask_fold = gr.Accordion("Load a mask instead of painting", open=False, visible=False)
            with mask_fold:
                mask = gr.Image(type="filepath", image_mode=None, format="png", sources=["upload"], label="Mask",
                                height=200, elem_id="mask")  # fmt: skip
            own_units = units.build(desk)
            with gr.Row(elem_classes="go", equal_height=True):
                go = gr.Button("Generate", variant="primary", elem_id="generate", scale=3, min_width=120)
                more = gr.Button("Add to queue", elem_id="enqueue", scale=2, min_width=110)
            problem = marks.area(elem_id="problem")
            with gr.Row(equal_height=True):
                add("size", min_width=210)
                count = gr.Slider(1, 16, 1, step=1, label="Number", info="Pictures in one job.", min_width=210,
                                  elem_id="count")  # fmt: skip
            add("model", min_width=200)
            with gr.Row(elem_classes="seed"):
                add("seed", min_width=150)
                dice = gr.Button("Random", elem_id="dice", min_width=84, scale=0, elem_classes="tool")
                again = gr.Button("Last one", elem_id="reuse-seed", min_width=96, scale=0, elem_classes="tool")
            with gr.Accordion("Learned styles and subjects", open=False, elem_id="cards-fold"):
                cards = marks.area(elem_id="cards")
            folds = _folds(every, controls, add)
            plot = plots.build(desk)
            with gr.Accordion("Paste settings of another picture", open=False):
                pasted = gr.Textbox(label="Text", lines=4, max_lines=10, elem_id="pasted",
                                    info="The text that A1111 and others show below a picture.")  # fmt: skip
                paste = gr.Button("Fill the form", elem_id="paste")
                pasted_problem = marks.area()
        with gr.Column(scale=7, min_width=340, elem_classes="stage"):
            now = marks.area(elem_id="now")
            gallery = marks.area(elem_id="gallery")
            chosen = gr.State()
    given = (chosen_styles, image, editor, mask)
    made = Pictures(desk, mode, count, controls, folds, image_fold, *given, own_units, problem, chosen)
    desk.places[ID] = made
    queue = desk.services.queue
    desk.live(now, lambda: stage.now(queue, "pictures"))
    desk.live(gallery, lambda given: stage.gallery(queue, given), [chosen], jobs=True)
    desk.live(cards, lambda: _cards(desk))

    # ---- what the buttons do ----
    for one, first in ((go, True), (more, False)):
        put = desk.on(one.click, _putting(made, first), made.inputs, [chosen], problem)
        desk.look(put)
    shows = [image_fold, editor, mask_fold, own_units.fold, count, *folds.values()]
    rest = [controls[name] for name in controls]
    before = gr.State("text2img")
    differing = [controls[name] for name in DIFFERS]
    desk.on(mode.change, lambda new, old, *now: _moded(made, new, old, *now), [mode, before, *differing],
            [before, *shows, *rest])  # fmt: skip
    desk.on(dice.click, lambda: -1, [], [controls["seed"]])
    desk.on(again.click, lambda given: _seed(desk, given), [chosen], [controls["seed"]], problem)
    counting = [controls["prompt"], controls["model"]]
    gr.on([controls["prompt"].change, controls["model"].change], lambda text, model: _counted(tokens, text, model),
          counting, counted, trigger_mode="always_last", **QUIET)  # fmt: skip
    desk.on(cards.act, _inserted, [controls["prompt"]], [controls["prompt"]])
    desk.on(paste.click, lambda text: _pasted(made, text), [pasted], made.outputs, pasted_problem)
    for area in (now, gallery):
        desk.look(desk.on(area.act, _acting(made), [chosen], [chosen], problem))
    plots.wire(desk, plot, made)
    desk.places["gallery"] = gallery


def _folds(every: Mapping[str, Any], controls: dict[str, Any], add: Any) -> dict[str, Any]:
    """Makes a fold for each part of the settings without a control yet; rare ones share the fold More settings."""
    parts: dict[str, list[str]] = {}
    for name, one in every.items():
        if name not in controls and name not in OWN:
            parts.setdefault(one.part.__name__, []).append(name)
    begun = {one.part.__name__ for one in form.of("text2img").values()}
    folds = {}

    def fold(part: str) -> None:
        title = form.TITLES.get(part, part)
        folds[part] = gr.Accordion(title, open=False, elem_id=f"part-{part}", visible=part in begun)
        with folds[part]:
            for name in parts[part]:
                add(name)

    for part in (part for part in FIRST if part in parts):
        fold(part)
    with gr.Accordion("More settings", open=False, elem_id="more"):
        for part in (part for part in parts if part not in FIRST):
            fold(part)
    return folds


def wire(desk: Desk, page: Any) -> None:
    """Connects the tab with the others and fills the form when the page opens."""
    made: Pictures = desk.places[ID]
    gallery = desk.places["gallery"]
    info, teach = desk.places["info"], desk.places["teach"]

    def send(key: str, event: gr.EventData) -> list[Any]:
        to, job, number = event._data["to"], desk.job(event._data["job"]), int(event._data["number"])
        return sent(made, teach, key, to, desk.services.place.picture(job.pictures[number]), job, number)

    outputs = [desk.tabs, *made.outputs, info.file, teach.files]
    desk.on(gallery.send, send, [teach.files], outputs, made.problem)
    filled = [made.styles, *_listing(made), *_defaulted(made), *made.units.models]
    opened = gr.on([page.load], lambda: _opened(made), None, filled, **QUIET)
    draft.keep([made.mode, made.count, *made.controls.values()], opened)


def sent(made: Pictures, teach: Any, key: str, to: str, path: Path, job: Job | None = None, number: int = 0) -> list:
    """Returns updates of [tabs, *made.outputs, info's file, teach's set] that send a picture to another tab."""
    skips = [gr.skip()] * len(made.outputs)
    if to == "info":
        return [gr.Tabs(selected="info"), *skips, str(path), gr.skip()]
    if to == "teach":
        return [gr.Tabs(selected="teach"), *skips, gr.skip(), teach.add(key, [path])]
    tasks = {"change": "img2img", "repaint": "inpaint", "enlarge": "upscale", "follow": "controlnet"}
    if to in tasks:
        prompt = _prompted(path)
        filled = made.fill(tasks[to], prompt, str(path), whole=False)
    else:
        filled = _reused(made, path, job, number)
    return [gr.Tabs(selected=ID), *filled, gr.skip(), gr.skip()]


def _prompted(path: Path) -> dict[str, Any]:
    """Returns the prompts and the model in a picture's record."""
    try:
        record = records.read(path)
    except ValueError:
        return {}
    names = ("prompt", "negative_prompt")
    return {name: record.settings[name] for name in names if record.settings.get(name)}


def _reused(made: Pictures, path: Path, job: Job | None, number: int) -> list[Any]:
    """Returns the updates for a picture's settings: its job's order with the drawn seed, or its record."""
    if job is None:
        return of_record(made, records.read(path))
    seeds, drawn = job.result.get("seeds", []), {}
    if number < len(seeds):
        seed, other = seeds[number]
        drawn = {"seed": seed, **({"variation_seed": other} if job.request["settings"].get("variation") else {})}
    return made.ordered(job, drawn)


def of_record(made: Pictures, record: Record) -> list[Any]:
    """Returns the updates for a record; keeps the chosen model if the record's is not in the library."""
    values = dict(record.settings)
    library = made.desk.services.library
    for name, kind in orders.NAMED.items():
        wanted = [record.hashes.get(name), values.pop(name, None)]
        for one in filter(lambda item: isinstance(item, str) and item, wanted):
            try:
                values.setdefault(name, library.find(kind, one).name)
            except SettingError:
                continue
    values.setdefault("model", "")
    return made.fill(record.task, {**USUAL, **values})


# ---- events -------------------------------------------------------------------------------------------


def _putting(made: Pictures, first: bool) -> Any:
    """Returns the function that adds a job: first before waiting ones, else at the end."""

    def put(*given: Any) -> list[Any]:
        task, values, count = made.read(*given)
        services = made.desk.services
        order = orders.pictures(services.library, task, values, count)
        waiting = [job.id for job in services.queue.waiting() if job.state == WAITING]
        job = services.queue.add("pictures", order, SOURCE)
        if first and waiting:
            services.queue.move(job.id, waiting[0])
        return [None]

    return put


def _acting(made: Pictures) -> Any:
    def act(chosen: Any, event: gr.EventData) -> list[Any]:
        do, job = event._data["do"], made.desk.job(event._data["job"])
        queue = made.desk.services.queue
        if do == "choose":
            return [[job.id, int(event._data["number"])]]
        if do == "resume":
            queue.resume(job.id)
        else:
            queue.ask(job.id, "skip" if do == "skip" else "stop")
        return [gr.skip()]

    return act


def _moded(made: Pictures, new: str, old: str, *now: Any) -> list[Any]:
    """Returns updates of the visible controls for a task, and of settings whose default depends on it."""
    known, before = form.of(new), fields(TASKS[old])
    parts = {one.part.__name__ for one in known.values()}
    named = new == "text2img"
    label = "A photo of the person or thing" if named else "The picture"
    image = gr.update(visible=new in PICTURED, label=label, open=not named and new != "controlnet")
    shows = [image, gr.update(visible=new == "inpaint"), gr.update(visible=new in ("inpaint", "controlnet")),
             gr.update(visible=new == "controlnet", open=True), gr.update(visible=new != "interpolate")]  # fmt: skip
    first = {"img2img": "Start", "upscale": "Enlarging", "interpolate": "Frames"}.get(new)
    shows += [_fold(part in parts, part == first) for part in made.folds]
    usual = {}
    for name, value in zip(DIFFERS, now, strict=True):
        if name in known and (name not in before or value == form.begun(before[name])):
            usual[name] = form.begun(known[name])
    rest = [gr.update(visible=name in known, **({"value": usual[name]} if name in usual else {}))
            for name in made.controls]  # fmt: skip
    return [new, *shows, *rest]


def _fold(visible: bool, opened: bool) -> Any:
    return gr.update(visible=visible, open=True) if opened else gr.update(visible=visible)


def _seed(desk: Desk, chosen: Any) -> list[Any]:
    there = stage.made(desk.services.queue)
    job, number = next(((job, n) for job, n in there if chosen and [job.id, n] == chosen), (there or [(None, 0)])[0])
    if job is None:
        raise ValueError("make a picture first: there is no seed yet")
    seeds = job.result.get("seeds", [])
    return [seeds[number][0] if number < len(seeds) else gr.skip()]


def _counted(tokens: Tokens, text: str, model: str) -> Markup:
    try:
        found = tokens.count(model, text or "")
    except ValueError as error:
        return marks.tag("p", str(error), cls="dim")
    if found is None:
        return Markup("")
    used, room = found
    parts = f" in {-(-used // room)} parts" if used > room else ""
    return marks.tag("p", f"{used} of {room} tokens{parts}" if not parts else f"{used} tokens{parts} of {room}",
                     cls="dim", title="How much of the prompt the model reads at once")  # fmt: skip


def _pasted(made: Pictures, text: str) -> list[Any]:
    return of_record(made, records.parse(text or ""))


def _opened(made: Pictures) -> list[Any]:
    """Returns updates of controls that depend on the server: lists of models, and initial values."""
    library, known = made.desk.services.library, form.every()
    lists = [gr.update(choices=listed(made.desk, name)) for name in NAMED]
    values = made.defaults()
    kept = [form.filled(known[name], values[name]) if name in values else gr.skip() for name in _names(made)]
    return [_styles(made.desk), *lists, *kept, *made.units.listed(library)]


def _styles(desk: Desk) -> Any:
    """Returns the update of the list of styles, which is hidden without any."""
    try:
        names = list(styles.of(desk.services.place))
    except ValueError:
        names = []  # a job with styles reports it
    return gr.update(choices=names, visible=bool(names))


def listed(desk: Desk, name: str) -> list[tuple[str, str]]:
    """Returns the choices of a setting that names entries of the library."""
    there = desk.services.library.entries(orders.NAMED[name])
    return titles(desk, [(form.usual_name(name), ""), *((one.name, one.name) for one in there)])


def titles(desk: Desk, models: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Returns choices of models with the names of their runs."""
    jobs = shelf.names_of(desk.services.queue)
    return [(f"{jobs[value]} (taught)" if value in jobs else text, value) for text, value in models]


def _names(made: Pictures) -> list[str]:
    return [name for name in made.controls if name not in ("prompt", *NAMED)]


def _listing(made: Pictures) -> list[Any]:
    return [made.controls[name] for name in NAMED]


def _defaulted(made: Pictures) -> list[Any]:
    return [made.controls[name] for name in _names(made)]


# ---- cards of adapters ----------------------------------------------------------------------------------


def _cards(desk: Desk) -> tuple[Any, Any]:
    library = desk.services.library
    there = [one for one in desk.entries() if one.kind not in WHOLE]
    key = tuple((one.kind, one.name, library.hash(one)) for one in there)
    return key, lambda: _listed(desk, there)


def _listed(desk: Desk, there: list[Any]) -> Markup:
    if not there:
        return marks.empty(
            "Nothing learned yet", "Teach something in the next tab, or put LoRA files into the library."
        )
    found = []
    for one in there:
        about = desk.services.library.known_of(one)
        said = [word for word, _ in about.get("words", [])[:3]]
        text = f"<{one.kind}:{one.stem}:1>" if one.kind != "embedding" else one.stem
        picture = marks.tag("span", one.stem[:1].upper(), cls="letter")
        body = [picture, marks.tag("span", one.stem, cls="name"), marks.tag("span", ", ".join(said), cls="dim")]
        found.append(marks.tag("div", *body, cls="mini", role="button", tabindex="0",
                               data={"do": "insert", "text": text, "words": said[0] if said else ""}))  # fmt: skip
    return marks.tag("div", *found, cls="minis")


def _inserted(prompt: str, event: gr.EventData) -> list[Any]:
    text, word = event._data["text"], event._data.get("words", "")
    if text in (prompt or ""):
        return [" ".join((prompt or "").replace(text, "").split())]
    return [" ".join(filter(None, [prompt, word if word not in (prompt or "") else "", text]))]
