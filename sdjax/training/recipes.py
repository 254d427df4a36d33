"""The recipes of configs/ by name, in a checkout and in an installed package, which holds a copy of them.

recipe = find("lora")          # configs/lora.py of a checkout
"""

from pathlib import Path

from sdjax.settings import nearest

PACKAGE = Path(__file__).parents[1]
FOLDERS = (PACKAGE / "configs", PACKAGE.parent / "configs")  # of an installed package (setup.py), of a checkout


def known() -> dict[str, Path]:
    """Returns {name: file} of the recipes, such as "lora" and "pocket/tune", in the names' order."""
    folder = next((folder for folder in FOLDERS if folder.is_dir()), FOLDERS[-1])
    found = {path.relative_to(folder).with_suffix("").as_posix(): path for path in folder.rglob("*.py")}
    return dict(sorted(found.items()))


def find(recipe: str) -> Path:
    """Returns the file of a recipe: a path, or the name of a recipe of ours.  A file that exists comes first.

    Raises ValueError for neither, with the nearest name.
    """
    path, there = Path(recipe), known()
    if path.is_file():
        return path
    if recipe not in there:
        wanted = f"a Python file with a function config(), or a recipe's name: {nearest(recipe, there)}"
        raise ValueError(f"recipe {recipe!r}: no such file or name; expected {wanted}")
    return there[recipe]
