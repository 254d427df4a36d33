"""Draws the pictures of a subject's class that a DreamBooth run lacks, from the model that it will train.

    python train/class_images.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.path=dogs

Recipe and settings are those of the run.  class_data.count pictures shall be in class_data.path (200); what lies there
counts, what this program made before and another model or prompt would not make is made anew.  Prompts are
class_data.prompts, else the subject's without class_data.identifiers.  Stopped and started again it makes what is
missing.  A machine's devices share each batch.
"""

import sys

from sdjax.service.class_images import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
