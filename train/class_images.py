"""Draws class pictures for a DreamBooth run from the model that the run will train.

    python train/class_images.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.path=dogs

Use the recipe and settings of the run.  The program fills class_data.path up to class_data.count pictures (200).  Your
own pictures there count; its own pictures from another model or prompt are replaced.  The prompts are
class_data.prompts, otherwise the subject's prompts without class_data.identifiers.  Rerun the command after any
interruption: it makes the missing pictures.  All devices of the machine share each batch.
"""

import sys

from sdjax.service.class_images import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
