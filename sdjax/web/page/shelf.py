"""The Library tab's cards, and the details of one entry."""

from collections.abc import Hashable
from typing import Any
from urllib.parse import quote, urlencode

from markupsafe import Markup

from sdjax.service import descriptions
from sdjax.service.library import Entry, Library
from sdjax.service.queue import Queue
from sdjax.web.page import marks, words
from sdjax.web.page.marks import button, tag

KINDS = {"model": "Model", "vae": "Autoencoder", "controlnet": "ControlNet", "lora": "LoRA", "embedding": "Word",
         "hypernet": "Hypernetwork"}  # fmt: skip
BASES = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
USED = ("model", "lora", "embedding", "hypernet")  # what "Use" knows


def title(entry: Entry, names: dict[str, str]) -> str:
    """Returns the title of an entry; names: of runs."""
    return names.get(entry.name) or entry.stem


def names_of(queue: Queue) -> dict[str, str]:
    """Returns {the library's name of a run's model: the run's name}."""
    return {f"run {job.key[:8]}": words.name(job) for job in queue.newest(500) if job.kind == "training"}


def found(library: Library, names: dict[str, str], entries: list[Entry], search: str, kind: str) -> list[Entry]:
    """Returns the entries with all words of a search in their names, trigger words, notes, tags or hashes."""
    asked = (search or "").casefold().split()
    some = [one for one in entries if kind in ("", one.kind)]
    return [one for one in some if _has(library, one, names, asked)]


def _has(library: Library, one: Entry, names: dict[str, str], asked: list[str]) -> bool:
    about, notes = library.known_of(one), library.notes(one)
    texts = [title(one, names), one.name, one.kind, about.get("base", ""), notes["notes"], *notes["tags"]]
    texts += [word for word, _ in about.get("words", [])] + list(about.get("hashes", {}).values())
    text = " ".join(map(str, texts)).casefold()
    return all(word in text for word in asked)


def shelf(
    library: Library, queue: Queue, entries: list[Entry], search: str, kind: str, chosen: Any
) -> tuple[Hashable, Any]:
    """Returns (key, function that makes it) for the cards."""
    names = names_of(queue)
    there = found(library, names, entries, search, kind)
    told = [(one.kind, one.name, library.hash(one), str(library.notes(one)), title(one, names)) for one in there]
    return (tuple(told), tuple(chosen or ()), search), lambda: _shelf(library, there, names, chosen, search)


def _shelf(library: Library, there: list[Entry], names: dict[str, str], chosen: Any, search: str) -> Markup:
    if not there:
        if search:
            return marks.empty("Nothing found", "Search for a name, a word, a tag or a hash.")
        return marks.empty("Nothing here yet", "Teach something, or start the server with --models and --adapters.")
    cards = [_book(library, one, names, list(chosen or ()) == [one.kind, one.name]) for one in there]
    return tag("div", *cards, cls="shelf", role="listbox")


def _book(library: Library, one: Entry, names: dict[str, str], on: bool) -> Markup:
    about, notes = library.known_of(one), library.notes(one)
    said = [KINDS.get(one.kind, one.kind), BASES.get(about.get("base", ""), about.get("base", ""))]
    chips = [
        tag("span", text, cls="chip")
        for text in [*(word for word, _ in about.get("words", [])[:3]), *notes["tags"][:4]]
    ]
    name = title(one, names)
    text = [
        tag("p", name, cls="name"),
        tag("p", " · ".join(filter(None, said)), cls="dim"),
        tag("div", *chips, cls="chips"),
    ]
    data = {"do": "choose", "kind": one.kind, "name": one.name}
    body = tag("div", *text, cls="text")
    return tag("div", tag("div", cover(one, name), cls="cover"), body, cls="book on" if on else "book", role="option",
               tabindex="0", data=data)  # fmt: skip


def cover(one: Entry, name: str) -> Markup:
    """Returns the preview picture beside an entry's file, else the first letter of its name."""
    if one.path is not None and descriptions.preview(one.path) is not None:
        address = f"/api/library/{one.kind}/preview?{urlencode({'name': one.name})}"
        return tag("img", src=address, alt="", loading="lazy")
    return tag("span", name[:1].upper())


def detail(library: Library, queue: Queue, one: Entry, licence: str, private: bool) -> Markup:
    """Returns the details of an entry and its buttons."""
    about, names = library.known_of(one), names_of(queue)
    head = [tag("h3", title(one, names)), tag("p", KINDS.get(one.kind, one.kind), cls="dim")]
    return tag("div", *head, _acts(one, licence, private), _table(one, about), cls="detail")


def _acts(one: Entry, licence: str, private: bool) -> Markup:
    data: dict[str, Any] = {"kind": one.kind, "name": one.name}
    acts = [button("Use", "send", "main", to="use", **data)] if one.kind in USED else []
    if one.path is not None:
        asked = urlencode({"name": one.name, "licence": licence or "", **({"private": "true"} if private else {})},
                          quote_via=quote)  # fmt: skip
        acts.append(tag("a", "Package for sharing", cls="act", href=f"/api/library/{one.kind}/package?{asked}",
                        title="A zip with the file and a card", download=f"{one.stem}.zip"))  # fmt: skip
        acts.append(button("Move to trash", "trash", title="You can restore it from the server's folder", **data))
    return tag("div", *acts, cls="acts")


def _table(one: Entry, about: dict[str, Any]) -> Markup:
    card = about.get("card", {})
    rows: list[tuple[str, Any]] = [
        ("Name", one.name),
        ("Base model", BASES.get(about.get("base", ""), about.get("base", ""))),
    ]
    rows.append(("Trigger words", ", ".join(word for word, _ in about.get("words", []))))
    rows += [("Title", about.get("title", "")), ("Size", _size(about.get("size", 0)))]
    rows += [(f"Hash {name}", value) for name, value in about.get("hashes", {}).items()]
    rows += [(name.capitalize(), value) for name, value in about.get("training", {}).items()]
    rows += [(name.capitalize(), value) for name, value in card.items()]
    body = [tag("tr", tag("th", name), tag("td", str(value)[:2000])) for name, value in rows if value not in ("", None)]
    return tag("table", *body)


def _size(count: Any) -> str:
    if not isinstance(count, int) or count <= 0:
        return ""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
