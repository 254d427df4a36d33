"""The documents' lists of samplers, schedules, recipes, methods and formats, generated from the registries.

python tests/doc_lists.py          # rewrites what stands between <!-- list: NAME --> and <!-- end -->
"""

import ast
import inspect
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MARKED = re.compile(r"(<!-- list: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def samplers():
    """Returns the table of samplers."""
    from sdjax.diffusion import samplers

    rows = [
        (f"`{one.name}`", one.word, "" if one.eta is None else one.eta, f"`{one.automatic or 'normal'}`")
        for one in samplers.known().values()
    ]
    return table(("`--sampler`", "in A1111", "`eta`", "`--schedule automatic`"), rows)


def schedules():
    """Returns the names of the noise schedules."""
    from sdjax.sampling import settings
    from sdjax.sampling.fields import fields

    return ", ".join(f"`{name}`" for name in fields(settings.TextToImage)["schedule"].choices) + "\n"


def recipes():
    """Returns the table of recipes."""
    paths = sorted((ROOT / "configs").rglob("*.py"), key=lambda path: (len(path.parts), path))
    rows = [(f"`{path.relative_to(ROOT)}`", first(ast.get_docstring(ast.parse(path.read_text())))) for path in paths]
    return table(("recipe", "what it does"), rows)


def methods():
    """Returns the table of methods."""
    from sdjax import methods

    return table(("method", "what it trains"), [(f"`{name}`", about(one)) for name, one in methods.known().items()])


def formats():
    """Returns the table of adapter formats."""
    from sdjax.formats.adapters import kinds

    rows = [
        (f"`{name}`", about(type(one)), quoted(f"<{tag}:NAME>" for tag in one.tags), quoted(one.suffixes))
        for name, one in kinds.known().items()
    ]
    return table(("format", "contents", "in prompts", "files"), rows)


LISTS = {made.__name__: made for made in (samplers, schedules, recipes, methods, formats)}


def filled(text):
    """Returns a document with its lists made from the registries."""
    return MARKED.sub(lambda found: found[1] + LISTS[found[2]]() + found[3], text)


def table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join("| " + " | ".join(map(str, line)) + " |\n" for line in lines)


def first(text):
    """Returns the first sentence of a docstring, without its full stop."""
    return re.split(r"(?<=\.)\s", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".")


def about(one):
    return first(inspect.getdoc(one))


def quoted(words):
    return ", ".join(f"`{word}`" for word in words)


def pages():
    """Returns the documents that hold lists."""
    return [path for path in sorted([ROOT / "README.md", *ROOT.glob("docs/*.md")]) if MARKED.search(path.read_text())]


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    for page in pages():
        page.write_text(filled(page.read_text()))
