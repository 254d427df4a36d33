"""The subjects of compare.py: drawn people, a folder of pictures, or the folder of DreamBooth's data set.

drawn(Path("outputs"), "heldout", 8)        people of Pocketland; their pictures go to outputs/heldout/NUMBER
own("photos/cat", "cat")
protocol("dreambooth/dataset")              a subject per sub-folder; classes and prompts from the text file NAME
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
    """A subject: the folder of its pictures, its domain and, if it is drawn, its identity.

    prompts: with {} in place of the subject's name.  plain: its name in the base model's prompts.
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
        """Returns the path to train on: the first picture if `pictures` is 1, else the folder."""
        return self.files[0] if pictures == 1 else self.folder

    def texts(self, word: str, count: int) -> list[str]:
        """Returns the first `count` prompts, with a word in place of {}."""
        return [prompt.replace("{}", word) for prompt in self.prompts[:count]]


def drawn(out: Path, split: str, people: int) -> list[Subject]:
    """Draws five photos of each person into OUT/SPLIT/NUMBER; returns the subjects."""
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
    """Returns a folder of pictures as a list of one subject."""
    return [Subject(Path(folder), domain, f"a {domain}")]


def protocol(folder: str) -> list[Subject]:
    """Returns the subjects of DreamBooth's data set with their prompts; the authors' set has 30, with 25 prompts each.

    Source: Ruiz et al. 2023, section 5.1, and the layout of the authors' data set.
    Raises SettingError if the folder lacks the file NAME or a subject's folder.
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
