"""Personalizes the embedded model from one image in seconds; `sdjax demo` is the same program.

make demo                                    # a face that the model has never seen
python sample/demo.py --image photo.png      # your own picture
"""

import sys

from sdjax.service.demo import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], "python sample/demo.py"))
