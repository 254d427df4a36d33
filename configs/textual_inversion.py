"""Textual inversion: learns a word from a few pictures, as new rows of the token table.

    python train/run.py configs/textual_inversion.py data.path=photos/cat method.init=cat
    python train/run.py configs/textual_inversion.py data.path=photos/flawed method.word=<flaws> method.negative=true

Writes export/learned_embeds.safetensors for diffusers and A1111; method.layout=a1111 writes A1111's .pt instead.
init=FILE continues from an embedding of any tool.  For several words in one run, use `concepts` of
sdjax/methods/textual_inversion.py with data.words.
"""

from sdjax.data.batches import Data
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=TextualInversion(word="<new>", init=""),
        data=Data(templates="object", batch=4, buckets=3),
        optim=Optim(lr=5e-3, weight_decay=0.0),  # the learning rate of the original code and of A1111
        steps=3000,
        prompts=("a photo of [name]",),
    )
