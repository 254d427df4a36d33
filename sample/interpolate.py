"""Makes frames between two prompts or seeds, and an animation of them.

python sample/interpolate.py --model pocket --prompt "a photo of a face" --seed 1 --to-seed 2 --frames 16
python sample/interpolate.py --model pocket --prompt "a photo of a cat" "a photo of a dog" --frames 16 --batch 8
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("interpolate", __doc__))
