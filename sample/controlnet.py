"""Makes pictures from words and ControlNets.

python sample/controlnet.py --model SD15 --control CANNY --control-image edges.png --prompt "a house in the snow"
python sample/controlnet.py --model SD15 --control CANNY --control-image photo.png --preprocess canny --prompt ...
python sample/controlnet.py --model SD15 --control CANNY DEPTH --control-image edges.png depths.png --weight 0.8 0.5 ...
python sample/controlnet.py --model SD15 --control CANNY --control-image edges.png --image photo.png --strength 0.6 ...
"""

import sys

from sdjax.service.programs import main

if __name__ == "__main__":
    sys.exit(main("controlnet", __doc__))
