"""Makes pictures from words and a picture.

python sample/img2img.py --model pocket --image photo.png --prompt "a watercolor of a face" --strength 0.6
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("img2img", __doc__))
