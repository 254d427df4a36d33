"""The unofficial E4T's folder: encoder, offsets and a tuning step against its formulas in PyTorch, and what uses it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.core import FrozenDict
from port_folder import Port, photo
from torch_step import batch, drawn, models
from torch_weights import file_name

import sdjax
from sdjax import trees
from sdjax.formats.adapters import e4t, kinds
from sdjax.formats.storage import parameters
from sdjax.methods import offsets
from sdjax.methods.chain import Chain
from sdjax.methods.e4t import E4T
from sdjax.methods.full import Full
from sdjax.models.clip import squashed_pixels
from sdjax.stable_diffusion import TOKENS, to_pixels
from sdjax.training import optim, run_folder
from sdjax.training.optim import Optim
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

ROWS, LAMBDA = 3, 0.02
PROMPTS = ["a photo of *s", "*s in the snow", "a face"]


@pytest.fixture(scope="module")
def port():
    _, unet, text = models()
    return Port(unet, text)


@pytest.fixture(scope="module")
def folder(port, tmp_path_factory):
    return port.write(tmp_path_factory.mktemp("port") / "pretrained")


def bare(sd):
    """Returns a model without a vision tower, as Stable Diffusion is."""
    networks = FrozenDict({name: network for name, network in sd.networks.items() if name != "image_encoder"})
    return sd.with_parts(image_encoder=None).replace(networks=networks)


def started(folder, method, sd=None):
    """Returns (trained, frozen) of a run that starts from a folder, as begin makes them."""
    sd = bare(models()[0]) if sd is None else sd
    opened = kinds.opened(folder, sd)
    sd = opened[0].brings(opened[1], sd)
    return run_folder.start(method, *method.split(sd), str(folder), opened)


@pytest.fixture(scope="module")
def tuning(folder):
    """Returns (method, trained, frozen, pixels of the picture)."""
    method = Chain((E4T(penalty=ROWS * LAMBDA), Full(("unet", "text_encoder"))))
    trained, frozen = started(folder, method)
    pixels = jnp.asarray(to_pixels(photo()))
    return method, trained, method.look(frozen, trained, pixels), pixels


@pytest.fixture(scope="module")
def theirs(port, tuning):
    """Returns what PyTorch is asked with: the same times, noise, prompts and picture."""
    _, _, frozen, pixels = tuning
    rows = batch(frozen, PROMPTS)
    seen = drawn(frozen, rows, jax.random.key(2))
    ids = {name: torch.tensor(np.array(x)).long() for name, x in {
        "ids": rows["ids"]["text_encoder"], "nothing": frozen.tokenize([""])["text_encoder"],
        "word": frozen.words["*s"]["text_encoder"], "domain": frozen.tokenizers["text_encoder"].ids("face"),
    }.items()}  # fmt: skip
    return rows, seen, torch.tensor(np.array(pixels)).permute(2, 0, 1)[None], ids


def relative(ours, wanted):
    wanted = wanted.detach().numpy() if isinstance(wanted, torch.Tensor) else np.asarray(wanted)
    assert np.asarray(ours).shape == wanted.shape
    return np.linalg.norm(np.asarray(ours) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("sides", [(32, 32, 24), (40, 57, 24), (24, 24, 24), (17, 30, 33)])
def test_squashed_pixels_are_kornias_resize(sides):
    from port_folder import MEAN, STD

    height, width, size = sides
    pixels = np.random.default_rng(0).uniform(-1, 1, (2, height, width, 3)).astype(np.float32)
    wanted = torch.nn.functional.interpolate(
        torch.tensor(pixels).permute(0, 3, 1, 2), (size, size), mode="bicubic", align_corners=True
    )
    wanted = ((wanted + 1) / 2).permute(0, 2, 3, 1).numpy()
    assert relative(squashed_pixels(jnp.asarray(pixels), size), (wanted - np.array(MEAN)) / np.array(STD)) < 1e-5


def test_offsets_are_the_ports(port, tuning):
    method, trained, frozen, _ = tuning
    made = trees.flatten(method.join(frozen, trained).parts["unet"])
    wanted = port.weights()
    found = {name: x for name, x in made.items() if re.search(offsets.TARGETS, name)}
    assert len(found) == len(port.names) == 24
    plain = dict(port.unet.named_parameters())
    for name, weight in found.items():
        theirs = wanted[file_name(name)]
        assert relative(weight.T, theirs) < 1e-5
        assert relative(theirs.detach(), plain[file_name(name)]) > 0.05


def test_the_encoders_word_is_the_ports(port, tuning, theirs):
    method, trained, frozen, _ = tuning
    _, seen, pixels, ids = theirs
    joined = method.join(frozen, trained)
    encoder = joined.conditioners[0]
    z, t = jnp.asarray(seen["z_t"].permute(0, 2, 3, 1).numpy()), jnp.asarray(seen["t"].numpy(), jnp.float32)
    move = jax.jit(lambda sd: encoder.offset(sd, z, t, None))(joined.bare)
    wanted = port.word(pixels, seen["z_t"], seen["t"], ids["nothing"], ids["domain"])
    row = port.text.get_input_embeddings().weight[ids["domain"]]
    assert relative(row.detach().numpy() + encoder.scale * np.asarray(move), wanted) < 1e-4
    assert relative(encoder.scale * np.asarray(move), wanted - row) < 1e-4


def in_file(frozen, tree):
    """Returns {part and name in the port's file: numpy array} of a tree of a tuning run, but for the word's row."""
    own, full = tree["0"], tree["1"]
    unet, table = trees.merge(frozen.parts["unet"], full["unet"]), models()[0].table("text_encoder")
    text = trees.edit(full["text_encoder"], TOKENS, lambda name, rows: rows[: len(table)])
    named = {"encoder": own["head"], "unet": full["unet"], "offsets": offsets.by_name(unet, own["offsets"])}
    found = {name: tensor.array() for name, tensor in parameters.write(named).items()}
    return found | {_bare(f"text.{name}"): tensor.array() for name, tensor in parameters.write(text).items()}


def _bare(name):
    """Returns a text encoder's name without the prefix that only some versions of transformers write."""
    return name.replace("text.text_model.", "text.")


def test_a_tuning_step_is_the_ports(port, tuning, theirs):
    """Loss, gradients of all that trains, and what one step of AdamW with clipped gradients changes.

    The text encoder trains too, so that what the port takes for a constant, the domain's row and T(""), is one here.
    """
    method, trained, frozen, _ = tuning
    rows, seen, pixels, ids = theirs
    loss = default_loss(method, Train(method=method))
    ask = jax.jit(jax.value_and_grad(lambda tree: loss(frozen, tree, rows, jax.random.key(2), 0)[0]))
    value, grads = ask(trained)
    learned = {_bare(f"{part}.{name}"): w for part in ("encoder", "unet", "text")
               for name, w in getattr(port, part).named_parameters() if w.requires_grad}  # fmt: skip
    for name, one in zip(port.names, port.offsets, strict=True):
        there = f"offsets.{name.replace('.weight', '.kernel')}"
        learned |= {f"{there}.{leaf}": w for leaf, w in one.named_parameters()}
    wanted = port.loss(pixels, seen, ids["ids"], ids["word"], ids["nothing"], ids["domain"], LAMBDA)
    wanted.backward()
    assert float(value) == pytest.approx(wanted.item(), rel=1e-5)
    ours = in_file(frozen, grads)
    assert ours.keys() == learned.keys()
    for name, grad in ours.items():
        if not name.endswith("k_proj.bias"):  # moves all scores of a query alike, so that its gradient is rounding
            assert relative(grad, learned[name].grad) < 1e-4, name
    settings = Optim(lr=1e-3)
    tx, _ = optim.optimizer(settings, 1)
    updates, _ = jax.jit(lambda grads, trained: tx.update(grads, tx.init(trained), trained))(grads, trained)
    moved = stepped(learned, settings)
    ours = in_file(frozen, updates)
    both = [np.concatenate([x[name].ravel() for name in sorted(moved) if "k_proj.bias" not in name])
            for x in (ours, moved)]  # fmt: skip
    assert relative(*both) < 1e-4


def stepped(learned, settings):
    """Returns what one step of AdamW as the port takes it adds to weights {name: weight}, which stay as they are."""
    before = {name: w.detach().clone() for name, w in learned.items()}
    torch.nn.utils.clip_grad_norm_(learned.values(), settings.clip)
    torch.optim.AdamW(learned.values(), lr=settings.lr).step()
    moved = {name: (w.detach() - before[name]).numpy() for name, w in learned.items()}
    with torch.no_grad():
        for name, w in learned.items():
            w.copy_(before[name])
            w.grad = None
    return moved


# ---- sampling ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned_port():
    """The port after tuning, whose UNet and text encoder are others than the base model's in a few weights."""
    _, unet, text = models()
    made = Port(unet, text, seed=4)
    with torch.no_grad():
        for part, few in ((made.unet, "mid_block.resnets.0.conv1"), (made.text, "layers.1.mlp.fc1")):
            for weight in part.get_submodule(next(n for n, _ in part.named_modules() if n.endswith(few))).parameters():
                weight.add_(0.05 * torch.randn(weight.shape))
    return made


@pytest.fixture(scope="module")
def result(tuned_port, tmp_path_factory):
    """The port's folder after tuning."""
    return tuned_port.write(tmp_path_factory.mktemp("port") / "tuned", tuned=True, picture=photo())


def asked(sd, text="a photo of *s"):
    return jax.random.normal(jax.random.key(1), (1, 16, 16, 4)), jnp.array([300.0]), sd.condition(sd.tokenize([text]))


@jax.jit
def denoised(sd, z, t, cond):
    return sd.denoise(z, t, cond)[0]


def said(sd, text="a photo of *s"):
    return np.asarray(denoised(sd.bare, *asked(sd, text)))


@pytest.fixture(scope="module")
def attached(result):
    """Returns (a base model, the same with what was tuned attached)."""
    base = bare(models()[0])
    return base, sdjax.attach(base, result)


def test_a_tuned_folder_says_what_it_said_in_torch(tuned_port, attached, theirs):
    _, sd = attached
    _, _, pixels, ids = theirs
    z, t, cond = asked(sd)
    seen = torch.tensor(np.array(z)).permute(0, 3, 1, 2), torch.tensor([300])
    vectors = tuned_port.word(pixels, *seen, ids["nothing"], ids["domain"])
    told = torch.tensor(np.array(cond.words["text_encoder"]["ids"])).long()
    told = tuned_port.told(told, vectors, int(sd.words["*s"]["text_encoder"][0]))
    made, _ = tuned_port.run(*seen, told)
    assert relative(said(sd), made.permute(0, 2, 3, 1)) < 1e-4


def test_it_is_attached_at_any_strength_and_detached(attached, result):
    base, sd = attached
    off = sdjax.attach(sd, result, 0.0)
    assert relative(said(off), said(base, "a photo of face")) < 1e-5
    assert relative(said(sdjax.attach(sd, result, 0.5)), said(sd)) > 1e-3
    again = sdjax.detach(sd)
    assert trees.digest(again) == trees.digest(base) and again.networks == base.networks
    assert again.conditioners == () and again.reference.own == {}


def test_an_encoder_that_has_seen_nothing_asks_for_a_picture(folder, result, attached):
    base, tuned = attached
    sd = sdjax.attach(base, folder)
    with pytest.raises(ValueError, match="image=None: the adapter's encoder has seen none; expected a picture"):
        e4t.shown(sd)
    with pytest.raises(ValueError, match="image='a picture': the adapter was tuned on one picture .*expected none"):
        e4t.shown(tuned, photo())
    with pytest.raises(ValueError, match="looks at a picture already|the model knows it already"):
        sdjax.attach(tuned, folder)
    pictures = [said(e4t.shown(sd, photo(seed))) for seed in (0, 1)]
    assert relative(*pictures) > 1e-4
