"""Personalizes the embedded model from one image in seconds and makes pictures of its subject.

    make demo                                    # a face that the model has never seen
    python sample/demo.py --image photo.png      # your own picture

The rows of the grid: the model without the image, with E4T's encoder alone, and after tuning.
"""

import sys

from sdjax.service.demo import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0]))
