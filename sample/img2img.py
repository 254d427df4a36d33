"""Makes pictures from words and a picture.

python sample/img2img.py --model pocket --image photo.png --prompt "a watercolor of a face" --strength 0.6
"""

import sys

import options as common


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "img2img")
    common.picture_options(made)
    made.add_argument("--strength", type=float, default=0.75, help="0 to 1: how much of the picture may change")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax.sampling import generate

    sd, picture = common.load(options), common.picture(options.image)
    task = dict(strength=options.strength, size=options.size, resize=options.resize)
    made = generate.img2img(sd, common.prompts(options), picture, **task, **common.settings(options))
    return common.write(made, options, sd, strength=options.strength)


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
