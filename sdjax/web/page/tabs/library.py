"""Library: cards of models and adapters; notes and tags, use, sharing, merging, the trash."""

from typing import Any

import gradio as gr
from markupsafe import Markup

from sdjax.service import sharing, tools
from sdjax.service.library import Entry
from sdjax.settings import SettingError
from sdjax.web.page import marks, shelf
from sdjax.web.page.desk import Desk

ID, TITLE, ORDER = "library", "Library", 4
KINDS = [("All", ""), *((label, kind) for kind, label in shelf.KINDS.items())]
LICENCES = ("", "cc0-1.0", "cc-by-4.0", "cc-by-nc-4.0", "creativeml-openrail-m", "apache-2.0", "mit")
WORK = {"merge": "Merge adapters into one", "resize": "Change the rank of a LoRA",
        "extract": "Extract a LoRA from a model", "convert": "Convert a model to another format"}  # fmt: skip
OF = {"merge": "Adapters, at most 8.", "resize": "A LoRA.",
      "extract": "A model, then one trained from it.", "convert": "A model."}  # fmt: skip
RANK = 16  # that resize and extract begin with


def build(desk: Desk) -> None:
    """Makes the components."""
    library, queue = desk.services.library, desk.services.queue
    with gr.Row(elem_classes="split"):
        with gr.Column(scale=7, min_width=340, elem_classes="side"):
            with gr.Row(equal_height=True):
                search = gr.Textbox(label="Search", placeholder="a name, a word, a tag, a hash", elem_id="search",
                                    info="Shows entries with all these words.", min_width=180)  # fmt: skip
                kind = gr.Dropdown(KINDS, value="", label="Kind", info="Shows one kind only.", min_width=120, scale=0)
            cards = marks.area(elem_id="shelf")
            _work(desk)
        with gr.Column(scale=5, min_width=340, elem_classes="stage"):
            problem = marks.area()
            told = marks.area(elem_id="book")
            with gr.Group(visible=False) as own:
                notes = gr.Textbox(label="Notes", lines=3, info="For you only.", elem_id="notes")
                tags = gr.Textbox(label="Tags", info="Separated by commas.", elem_id="tags")
                keep = gr.Button("Keep notes and tags", elem_id="keep-notes")
                with gr.Accordion("Sharing", open=False):
                    licence = gr.Dropdown(LICENCES, value="", label="Licence", allow_custom_value=True,
                                          info="Written into the package.", elem_id="licence")  # fmt: skip
                    private = gr.Checkbox(False, label="Include private data", elem_id="private",
                                          info="Prompts, and names of files and folders.")  # fmt: skip
            chosen = gr.State()
    desk.places[ID] = chosen
    desk.places["book"], desk.places["library problem"] = told, problem
    desk.live(cards, lambda *given: shelf.shelf(library, queue, desk.entries(), *given), [search, kind, chosen])
    desk.live(told, lambda *given: _told(desk, *given), [chosen, licence, private])

    def choose(event: gr.EventData) -> list[Any]:
        entry = library.find(event._data["kind"], event._data["name"])
        said = library.notes(entry)
        return [[entry.kind, entry.name], gr.update(visible=True), said["notes"], ", ".join(said["tags"])]

    def note(given: Any, text: str, some: str) -> list[Any]:
        library.note(_entry(desk, given), text or "", [one.strip() for one in (some or "").split(",") if one.strip()])
        return []

    def act(event: gr.EventData) -> list[Any]:
        sharing.discard(library, library.find(event._data["kind"], event._data["name"]))
        return [None, gr.update(visible=False)]

    desk.look(desk.on(cards.act, choose, [], [chosen, own, notes, tags], problem))
    desk.look(desk.on(keep.click, note, [chosen, notes, tags], [], problem))
    desk.look(desk.on(told.act, act, [], [chosen, own], problem))
    for one in (search.input, kind.change, licence.change, private.change):
        desk.look(one(None, None, None, queue=False, show_progress="hidden", api_visibility="private"))


def wire(desk: Desk, page: Any) -> None:
    """Connects the tab with Pictures."""
    pictures = desk.places["pictures"]

    def use(prompt: str, event: gr.EventData) -> list[Any]:
        entry = desk.services.library.find(event._data["kind"], event._data["name"])
        values = {"model": entry.name} if entry.kind == "model" else {"prompt": _prompt(desk, prompt, entry)}
        return [gr.Tabs(selected="pictures"), *pictures.fill("text2img", values, whole=False)]

    outputs = [desk.tabs, *pictures.outputs]
    desk.on(desk.places["book"].send, use, [pictures.controls["prompt"]], outputs, desk.places["library problem"])


def _prompt(desk: Desk, prompt: str, entry: Entry) -> str:
    """Returns a prompt with an adapter and its first trigger word added."""
    word = next((word for word, _ in desk.services.library.known_of(entry).get("words", [])), "")
    text = entry.stem if entry.kind == "embedding" else f"<{entry.kind}:{entry.stem}:1>"
    parts = [prompt or "", "" if word in (prompt or "") else word, "" if text in (prompt or "") else text]
    return " ".join(filter(None, parts))


def _entry(desk: Desk, chosen: Any) -> Entry:
    if not chosen:
        raise ValueError("choose a card first")
    return desk.services.library.find(chosen[0], chosen[1])


def _told(desk: Desk, chosen: Any, licence: str, private: bool) -> tuple[Any, Any]:
    library, queue = desk.services.library, desk.services.queue
    if not chosen:
        text = "Shows its trigger words, hashes, notes and buttons."
        return None, lambda: marks.empty("Choose a card", text)
    try:
        entry = _entry(desk, chosen)
    except SettingError:
        return None, lambda: Markup("")
    key = (tuple(chosen), str(library.known_of(entry)), licence, private)
    return key, lambda: shelf.detail(library, queue, entry, licence, private)


def _work(desk: Desk) -> None:
    """Makes the form for jobs on files."""
    library = desk.services.library
    with gr.Accordion("Merge, resize, extract, convert", open=False, elem_id="work") as fold:
        tool = gr.Radio([(text, name) for name, text in WORK.items()], value="merge", label="What to do")
        of = gr.Dropdown([], multiselect=True, label="Of", info=OF["merge"], elem_id="work-of")
        with gr.Row():
            strengths = gr.Textbox(label="Strengths", placeholder="0.8, 0.5", info="In the same order; 1 by default.")
            rank = gr.Number(0, precision=0, label="Rank", elem_id="work-rank",
                             info="How much the file can hold; 0 keeps the rank.")  # fmt: skip
        with gr.Row():
            form = gr.Dropdown(_formats("merge"), value="", label="Format", elem_id="work-format",
                               info="The tools that should read it.")  # fmt: skip
            name = gr.Textbox(label="Name", info="The name of the new file.", elem_id="work-name")
        go = gr.Button("Make it", elem_id="work-go")
        problem = marks.area()
        news = marks.area()

    def listed(which: str) -> list[Any]:
        kinds = ("model",) if which in ("extract", "convert") else ("lora", "embedding", "hypernet")
        names = [one.name for one in library.entries() if one.kind in kinds]
        return [gr.update(choices=names, value=[], info=OF[which])]

    def shaped(which: str) -> list[Any]:
        rank = gr.update(visible=which != "convert", value=0 if which == "merge" else RANK)
        return [*listed(which), gr.update(visible=which == "merge"), rank, gr.update(choices=_formats(which), value="")]

    def put(*given: Any) -> list[Any]:
        which, names, weights, size, kind, called = given
        try:
            numbers = [float(one) for one in (weights or "").split(",") if one.strip()]
        except ValueError:
            raise SettingError("strengths", weights, "numbers with commas between them") from None
        body = {"tool": which, "of": list(names or []), "rank": int(size or 0), "name": (called or "").strip()}
        body |= {"strengths": numbers} if numbers and which == "merge" else {}
        body |= {"format": kind} if kind else {}
        desk.services.queue.add("tool", tools.order_of(library, body), "page")
        return [marks.said("Added to the queue; see Runs for its progress.")]

    desk.on(fold.expand, listed, [tool], [of])
    desk.on(tool.change, shaped, [tool], [of, strengths, rank, form])
    desk.look(desk.on(go.click, put, [tool, of, strengths, rank, form, name], [news], problem))


def _formats(which: str) -> list[tuple[str, str]]:
    """Returns the choices of a tool's format; the first leaves it to the program."""
    return [("Default", ""), *((one, one) for one in (tools.MODELS if which == "convert" else tools.ADAPTERS))]
