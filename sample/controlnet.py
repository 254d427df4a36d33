"""Makes pictures from words and what ControlNets see in other pictures.

python sample/controlnet.py --model M --control canny --control-image edges.png --prompt "a house in the snow"
python sample/controlnet.py --model M --control canny depth --control-image edges.png depths.png --weight 0.8 0.5 ...
"""

import sys

import options as common


def parser():
    """Returns the command line's parser."""
    made = common.parser(__doc__, "controlnet")
    add = made.add_argument
    add("--control", required=True, nargs="+", help="ControlNets: diffusers folders, hub ids, files, random:sd15 ...")
    add("--control-image", required=True, nargs="+", help="what each of them looks at: edges, depths, poses ...")
    add("--weight", type=float, nargs="+", default=[1.0], help="how strongly each acts; one number for all")
    add("--start", type=float, nargs="+", default=[0.0], help="from which part of the steps on, 0 to 1")
    add("--end", type=float, nargs="+", default=[1.0], help="up to which part of the steps")
    add("--guess", action="store_true", help="act on the prompt's side only: for prompts that say little")
    add("--resize", default="crop", help="how the control images get to the pictures' size: crop, fill, stretch")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax import generate
    from sdjax.convert import controlnet

    columns = [options.control_image, *(_each(options, name) for name in ("weight", "start", "end"))]
    if len(options.control_image) != len(options.control):
        raise ValueError(f"--control-image: {len(options.control_image)} for {len(options.control)} ControlNets")
    sd = common.load(options)
    controls = [
        controlnet.load_control(source, options.dtype).on(
            common.picture(image), weight, start, end, options.guess, options.resize
        )
        for source, image, weight, start, end in zip(options.control, *columns, strict=True)
    ]
    made = generate.text2img(
        sd, common.prompts(options), size=options.size, control=controls, **common.settings(options)
    )
    return common.write(made, options, sd)


def _each(options, name):
    """Returns one number per ControlNet."""
    given, count = getattr(options, name), len(options.control)
    if len(given) not in (1, count):
        raise ValueError(f"--{name}: {len(given)} numbers for {count} ControlNets: expected one, or as many")
    return given * (count // len(given))


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
