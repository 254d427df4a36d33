"""The tasks of a network: text to image, inpainting, upscaling; one per run.

task.py defines the interface; `known` finds every task in this package.
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
    """Returns the task with a name; "" returns the model's own.

    Raises SettingError for an unknown name, and for a model without a known task.
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
