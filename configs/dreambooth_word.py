"""Textual inversion and DreamBooth together: learns a word and fine-tunes the UNet, from a few pictures of one subject.

    python train/run.py configs/dreambooth_word.py data.path=photos/dog method.parts.0.init=dog data.word="<new> dog"

Writes a model with the word in it.  To keep the class: preserve=1, or class pictures as in configs/dreambooth.py, with
data.word="<new> dog", so that the class is "dog".

The learning rates are DreamBooth's 5e-6 for the UNet and textual inversion's 5e-4 for the word.
"""

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.methods.chain import Chain
from sdjax.methods.full import Full
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Chain((TextualInversion(word="<new>"), Full(("unet",), keep=True))),
        data=Data(templates="trigger", batch=2),
        class_data=ClassData(identifiers=("<new>",)),
        optim=Optim(lr=5e-6, rates=(("rows", 100.0),)),
        steps=1000,
        prompts=("a photo of [name]",),
    )
