"""Paints a part of a picture anew and leaves the rest as it is.

python sample/inpaint.py --model pocket --image photo.png --mask mask.png --prompt "a face with a hat"
"""

import sys

import options as common


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "inpaint")
    common.picture_options(made)
    add = made.add_argument
    add("--mask", required=True, help="a picture of the same size, white where to paint")
    add("--strength", type=float, default=1.0, help="0 to 1; below 1 begins with what is under the mask")
    add("--feather", type=int, default=4, help="pixels over which the painted region fades in, inside the mask")
    add("--margin", type=int, help="paint only around the mask, so many pixels and more, at the model's size")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax.sampling import inpainting

    sd, picture = common.load(options), common.picture(options.image)
    mask = common.mask(options.mask)
    task = dict(strength=options.strength, feather=options.feather, margin=options.margin)
    task |= dict(size=options.size, resize=options.resize)
    made = inpainting.inpaint(sd, common.prompts(options), picture, mask, **task, **common.settings(options))
    return common.write(made, options, sd, strength=options.strength)


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
