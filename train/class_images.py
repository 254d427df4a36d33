"""Draws class pictures for a DreamBooth run from its model; `sdjax class_images` is the same program.

python train/class_images.py configs/dreambooth.py data.path=photos/dog data.word="sks dog" class_data.path=dogs
python train/class_images.py --help
"""

import sys

from sdjax.service.class_images import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python train/class_images.py"))
