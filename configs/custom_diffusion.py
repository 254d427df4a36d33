"""Custom Diffusion: learns a word and the cross-attention that reads it, from a few pictures.

    python train/run.py configs/custom_diffusion.py data.path=photos/dog method.parts.0.init=dog data.word="<new> dog"

Writes export/pytorch_custom_diffusion_weights.safetensors and learned_embeds.safetensors for diffusers.  Start the
word from a rare token (python train/vocabulary.py --rare MODEL) or from a word with a similar meaning.  Class
pictures, as in the paper: class_data.path=FOLDER data.batch=4, see configs/dreambooth.py.  Queries and outputs too:
method.parts.1.query=true.

Learning rate, batch and steps follow diffusers' example for one subject.
"""

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.methods.chain import Chain
from sdjax.methods.custom_diffusion import CustomDiffusion
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Chain((TextualInversion(word="<new>"), CustomDiffusion())),
        data=Data(templates="trigger", batch=2, flip=0.5, buckets=3),
        class_data=ClassData(identifiers=("<new>",)),
        optim=Optim(lr=1e-5),
        steps=500,
        prompts=("a photo of [name]",),
    )
