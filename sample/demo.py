"""One image in, pictures of its subject out: the embedded model, personalised in seconds.

    make demo                                    # somebody whom the model has never seen
    python sample/demo.py --image photo.png      # a picture of your own

Rows of the grid: the model without the image, E4T's encoder alone, and after tuning.
"""

import sys
from pathlib import Path

from sdjax.service.demo import main

if __name__ == "__main__":
    sys.exit(main(__doc__.splitlines()[0], Path(__file__).parents[1] / "configs"))
