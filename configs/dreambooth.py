"""DreamBooth: fine-tunes the UNet on a few pictures of one subject and preserves its class.

    python train/run.py configs/dreambooth.py data.path=photos/dog data.word="sks dog"

By default no class pictures are needed: for prompts without the identifier ("a dog"), the loss keeps the
predictions from before training.  With class pictures, as in the paper, drawn when the run starts or before it:

    python train/run.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.draw=true preserve=0
    python train/class_images.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.path=dogs
    python train/run.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.path=dogs preserve=0

Pictures with captions get the prompt "sks dog, CAPTION", others "a photo of sks dog".  Several subjects:
sub-folders "1_sks dog" and "1_zwx cat" with data.word="" data.templates=captions class_data.identifiers='("sks",
"zwx")'.  To train the text encoder too, at its own rate: method.parts='("unet", "text_encoder")' with
optim.rates='(("text_encoder", 0.4),)'.  Masks: data.mask=true.  To find rare words of a model:

    python train/vocabulary.py --rare MODEL

Learning rate and steps follow diffusers' example for SD 1.5 with prior preservation.
"""

from sdjax.data.batches import Data
from sdjax.data.classes import ClassData
from sdjax.methods.full import Full
from sdjax.training.optim import Optim
from sdjax.training.settings import Train


def config():
    """Returns the run's settings."""
    return Train(
        method=Full(("unet",), keep=True),
        data=Data(word="sks", templates="trigger", batch=2, buckets=3),
        class_data=ClassData(identifiers=("sks",)),
        optim=Optim(lr=5e-6),
        steps=800,
        preserve=1.0,
        prompts=("a photo of [name]",),
    )
