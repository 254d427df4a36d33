"""What a network is for: text to image, inpainting, upscaling; one per run.

task.py says what a task is; a new file here is a new task, found by walking the package (`known`).
"""

import sys

from sdjax.runtime.members import members
from sdjax.settings import SettingError
from sdjax.stable_diffusion import StableDiffusion
from sdjax.tasks.task import Task


def known() -> dict[str, Task]:
    """Returns {name: Task} of all tasks."""
    return {task.name: task for task in (made() for made in members(sys.modules[__name__], Task).values())}


def of(sd: StableDiffusion, name: str = "") -> Task:
    """Returns the task of a name; "" for the one that the model's UNet is made for.

    Raises SettingError for an unknown name, and where the model is for no known task.
    """
    tasks = known()
    if name:
        if name not in tasks:
            raise SettingError("task", name, f"one of {', '.join(tasks)}")
        return tasks[name]
    fitting = [task for task in tasks.values() if task.matches(sd)]
    if not fitting:
        taken, latent = sd.networks["unet"].config.in_channels, sd.networks["vae"].config.latent_channels
        raise SettingError(
            "task",
            name,
            f"a model for one of {', '.join(tasks)}; its UNet takes {taken} channels, a latent has {latent}",
        )
    return fitting[0]
