"""A small run that saves at every step, for tests that kill it."""

from sdjax.data.batches import Data
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(method=TextualInversion("<new>", "face"), data=Data(word="<new>", batch=4), checkpoint=1)
