"""Whom compare.py personalises for: drawn people, a folder of pictures, or the folder of DreamBooth's protocol.

drawn(Path("outputs"), "heldout", 8)        people of Pocketland; pictures are written to outputs/heldout/NUMBER
own("photos/cat", "cat")
protocol("dreambooth/dataset")              every sub-folder a subject; classes and prompts as its text file says
"""

import re
from dataclasses import dataclass
from pathlib import Path

import embedded
import pocket
from PIL import Image

from sdjax.data import pocketland
from sdjax.images import reading
from sdjax.settings import SettingError

PEOPLE, VIEWS = 50_000, 5  # offset of the people's seeds within a split; pictures of each
NAME = "prompts_and_classes.txt"  # of DreamBooth's data set: subjects and their classes, prompts of objects and animals
LIVE = ("cat", "dog")


@dataclass(frozen=True)
class Subject:
    """One subject: the folder of its pictures, its domain, and who it is where it is drawn.

    prompts: with {} for what the subject is called; plain: what the base model's prompts call it.
    """

    folder: Path
    domain: str
    plain: str
    prompts: tuple[str, ...] = tuple(pocket.texts("{}"))
    who: pocketland.Face | None = None
    number: int = 0

    @property
    def files(self) -> list[Path]:
        """The files of its pictures."""
        return sorted(path for path in self.folder.iterdir() if path.suffix.lower() in reading.SUFFIXES)

    def source(self, pictures: int) -> Path:
        """Returns what is trained on: all pictures, or the first one alone."""
        return self.files[0] if pictures == 1 else self.folder

    def texts(self, word: str, count: int) -> list[str]:
        """Returns the first `count` prompts, about a word."""
        return [prompt.replace("{}", word) for prompt in self.prompts[:count]]


def drawn(out: Path, split: str, people: int) -> list[Subject]:
    """Returns people of a split, five photos each, drawn into OUT/SPLIT/NUMBER."""
    found = []
    for number in range(people):
        who, folder = pocketland.identity(pocket.SPLITS[split] + PEOPLE + number), out / split / f"{number}"
        folder.mkdir(parents=True, exist_ok=True)
        for view in range(VIEWS):
            context = ("room", "beach", "forest", "city", "meadow")[view]
            place = pocketland.scene(pocket.SCENES + PEOPLE + VIEWS * number + view, context, "photo", "none")
            Image.fromarray(embedded.draw(who, place)).save(folder / f"{view}.png")
        found.append(Subject(folder, "face", "a face", who=who, number=number))
    return found


def own(folder: str, domain: str) -> list[Subject]:
    """Returns the one subject of a folder of pictures."""
    return [Subject(Path(folder), domain, f"a {domain}")]


def protocol(folder: str) -> list[Subject]:
    """Returns the subjects of DreamBooth's data set, 30 in its own, each with 25 prompts.

    Source: Ruiz et al. 2023, section 5.1; the layout is that of the authors' data set.
    Raises SettingError where the folder has no such file, or a subject no folder.
    """
    path = Path(folder) / NAME
    if not path.is_file():
        raise SettingError("protocol", folder, f"a folder with {NAME}")
    classes, objects, live = path.read_text().split("prompt_list")
    found = []
    for number, (name, domain) in enumerate(re.findall(r"^(\w+),([\w ]+)$", classes, re.M)[1:]):
        if not (Path(folder) / name).is_dir():
            raise SettingError("protocol", folder, f"a folder {name}, as {NAME} says")
        texts = re.findall(r"^'(.+)'\.format", live if domain in LIVE else objects, re.M)
        prompts = tuple(text.replace("{0} {1}", "{}") for text in texts)
        found.append(Subject(Path(folder) / name, domain, domain, prompts, number=number))
    return found
