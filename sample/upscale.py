"""Enlarges a picture four times, with Stable Diffusion's x4 upscaler or, without a prompt, with LDM-SR.

python sample/upscale.py --model X4_FOLDER --image small.png --prompt "a white cat"
python sample/upscale.py --model X4_FOLDER --image small.png --prompt "" --preset 64-256
python sample/upscale.py --model LDM-SR.ckpt --image small.png --eta 1
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("upscale", __doc__))
