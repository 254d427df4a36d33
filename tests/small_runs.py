"""A run of four steps that is made in seconds, for tests that stop it: by signals, full disks, other processes."""

import json

import numpy as np
from PIL import Image

from sdjax.data.batches import Data
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training import run_folder
from sdjax.training.loop import train
from sdjax.training.settings import Train

RECIPE = "from sdjax.training import export\n\n\ndef config():\n    return export.read({folder!r})\n"


def settings(folder):
    """Returns the settings of such a run, on two pictures that are written to a new folder; checkpoints 2 and 4."""
    folder.mkdir()
    for i in range(2):
        made = np.random.default_rng(i).integers(0, 255, (32, 32, 3), np.uint8)
        Image.fromarray(made).save(folder / f"{i}.png")
    data = Data(path=str(folder), word="<cat>", size=32, batch=1)
    return Train(
        model="random:tiny", method=TextualInversion("<cat>"), steps=4, checkpoint=2, preview=0, log=1, data=data
    )


def recipe(told, folder):
    """Writes a recipe of these settings into a folder and returns its path."""
    run_folder.write_settings(folder, told, "")
    (folder / "recipe.py").write_text(RECIPE.format(folder=str(folder)))
    return folder / "recipe.py"


def whole(told, out):
    """Returns the numbers of the export of a run that nothing stops."""
    train(told, out)
    return weights(out)


def weights(out):
    """Returns the numbers of a run's export, without the header, which tells the time."""
    data = next((out / "export").glob("*.safetensors")).read_bytes()
    return data[8 + int.from_bytes(data[:8], "little") :]


def logged(out):
    """Returns the steps whose loss a run's log has."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


def checkpoints(out):
    """Returns the steps of a run's checkpoints."""
    return sorted(int(path.name) for path in (out / "checkpoints").iterdir() if path.name.isdigit())
