"""Makes pictures from words and what ControlNets see in other pictures.

python sample/controlnet.py --model SD15 --control CANNY --control-image edges.png --prompt "a house in the snow"
python sample/controlnet.py --model SD15 --control CANNY DEPTH --control-image edges.png depths.png --weight 0.8 0.5 ...
python sample/controlnet.py --model SD15 --control CANNY --control-image edges.png --image photo.png --strength 0.6 ...
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
    add("--resize", default="crop", help="how given pictures get to the size of what is made: crop, fill, stretch")
    add("--image", help="a picture to begin with, as in sample/img2img.py")
    add("--strength", type=float, help="0 to 1: how much of it may change; default: 0.75, and 1 with a mask")
    add("--mask", help="a picture of its size, white where to paint: the rest stays as it is")
    add("--feather", type=int, default=4, help="pixels over which the painted region fades in, inside the mask")
    add("--hires", type=float, help="enlarge so many times and paint over (hires fix)")
    add("--hires-strength", type=float, default=0.7, help="of painting over")
    add("--hires-steps", type=int, help="of painting over; default: as many as before")
    add("--hires-method", default="latent", help="how to enlarge: latent, lanczos")
    return made


def run(options):
    """Writes the pictures that the options ask for and returns their paths."""
    from sdjax.formats.models import controlnet

    if options.image is None and (options.mask or options.strength is not None):
        raise ValueError("--mask, --strength: need a picture to begin with; expected --image")
    if options.image and options.hires is not None:
        raise ValueError(f"--hires={options.hires}: enlarges what words make; expected no --image")
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
    return make(options, sd, dict(size=options.size, control=controls, **common.settings(options)))


def make(options, sd, settings):
    """Makes and writes the pictures of the task that the options name; returns their paths."""
    from sdjax.sampling import generate, inpainting, upscaling

    prompts, strength, size = common.prompts(options), options.strength, None
    unused = set() if options.mask else {"feather"}
    unused |= set() if options.hires is not None else {"hires", "hires_steps", "hires_method"}
    if options.image:
        given = common.picture(options.image)
        strength = (1.0 if options.mask else 0.75) if strength is None else strength
        settings |= dict(strength=strength, resize=options.resize)
    if options.mask:
        mask = common.mask(options.mask)
        made = inpainting.inpaint(sd, prompts, given, mask, feather=options.feather, **settings)
    elif options.image:
        made = generate.img2img(sd, prompts, given, **settings)
    elif options.hires is not None:
        strength, size = options.hires_strength, [s * sd.factor for s in generate.latent_shape(sd, options.size)[:2]]
        larger = dict(scale=options.hires, strength=strength, method=options.hires_method)
        made = upscaling.hires(sd, prompts, **larger, hires_steps=options.hires_steps, **settings)
    else:
        made = generate.text2img(sd, prompts, **settings)
    return common.write(made, options, sd, size=size, strength=strength, leave_out=unused)


def _each(options, name):
    """Returns one number per ControlNet."""
    given, count = getattr(options, name), len(options.control)
    if len(given) not in (1, count):
        raise ValueError(f"--{name}: {len(given)} numbers for {count} ControlNets: expected one, or as many")
    return given * (count // len(given))


if __name__ == "__main__":
    sys.exit(common.main(parser(), run))
