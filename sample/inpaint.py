"""Repaints the masked part of a picture and keeps the rest.

python sample/inpaint.py --model pocket --image photo.png --mask mask.png --prompt "a face with a hat"
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("inpaint", __doc__))
