"""Makes pictures from words.

python sample/text2img.py --model pocket --prompt "a photo of a face on the beach" --seed 1 --count 4
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("text2img", __doc__))
