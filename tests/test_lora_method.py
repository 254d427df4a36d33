"""LoRA and its relatives while they train, against peft and LyCORIS with the same numbers."""

import functools
import re

import jax
import lora_cases
import numpy as np
import pytest

from sdjax.families.sd import Sd
from sdjax.formats.adapters import lora_tensors
from sdjax.methods.adapter import Adapter
from sdjax.methods.edits import Factored

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
NAMES = [(library, name) for library, methods in lora_cases.METHODS.items() for name in methods]
NAMING = {"peft": lora_tensors.peft, "lycoris": functools.partial(lora_tensors.kohya, Sd().lora)}


@functools.cache
def gradients(library):
    """Returns ((their loss, gradients), (ours)) of one step, same latents, times, noise and prompts."""
    random = np.random.default_rng(3)
    z, target = random.standard_normal((2, 2, 8, 8, 4)).astype(np.float32)
    inputs = z, np.array([7.0, 901.0], np.float32), target
    return lora_cases.gradients_there(library, inputs), lora_cases.gradients_here(library, inputs)


def ours(library, name):
    """Returns {name in a file: gradient} of a method."""
    grads = gradients(library)[1][1][name]
    edits = {
        part: {f"{module}.kernel": Factored({**f, "scale": np.float32(1)}) for module, f in modules.items()}
        for part, modules in grads.items()
    }
    found = lora_tensors.named(Adapter(edits=edits), NAMING[library])
    return {key.replace("text_model.", ""): x for key, x in found.items() if not key.endswith("alpha")}


def spelled(library, name, key):
    """Returns a parameter's name in a file, None where it is another adapter's."""
    if library == "lycoris":
        return key.replace("lycoris_", "lora_unet_")
    key, count = re.subn(rf"\.{name}(?=\.|$)", "", key)
    if not count:
        return None
    return "base_model.model." + (key.removesuffix(".weight") if "magnitude" in key else key)


@pytest.mark.parametrize(("library", "name"), NAMES)
def test_gradients_are_those_of_other_libraries(library, name):
    """Relative error of every factor's gradient at most 1e-4, with noise in what starts as zero."""
    (value, there), (mine, _) = gradients(library)
    assert mine == pytest.approx(value, rel=1e-5)
    found = {spelled(library, name, key): x for part in there.values() for key, x in part.items()}
    here = ours(library, name)
    assert here
    for key, gradient in here.items():
        size = max(np.abs(found[key]).max(), 1e-6)
        assert np.abs(gradient.reshape(found[key].shape) - found[key]).max() <= 1e-4 * size, key


@pytest.mark.parametrize("library", lora_cases.METHODS)
def test_all_that_other_libraries_train_was_compared(library):
    (_, there), (_, grads) = gradients(library)
    assert len(jax.tree.leaves(grads)) == sum(map(len, there.values()))
