"""A1111's hypernetworks against its formula in float64, around the attention layers of diffusers' UNet."""

import warnings
from types import SimpleNamespace

import jax
import numpy as np
import pytest
import torch
from adapter_files import assert_same, fresh, made

import sdjax
from sdjax import trees
from sdjax.formats.adapters import attachable
from sdjax.formats.adapters.hypernetwork_file import HypernetworkFile
from sdjax.models import hypernetworks

WIDTHS = (32, 64)  # of the attention layers and, 32, of the text
CLASSES = {
    "relu": torch.nn.ReLU,
    "leakyrelu": torch.nn.LeakyReLU,
    "elu": torch.nn.ELU,
    "swish": torch.nn.Hardswish,
    "tanh": torch.nn.Tanh,
    "sigmoid": torch.nn.Sigmoid,
    "mish": torch.nn.Mish,
}
CASES = {
    "default": {"layer_structure": [1, 2, 1], "activation_func": "linear"},
    "relu": {"layer_structure": [1, 2, 1], "activation_func": "relu", "activate_output": False},
    "deep": {
        "layer_structure": [1, 1.5, 2, 1],
        "activation_func": "leakyrelu",
        "activate_output": True,
        "is_layer_norm": True,
        "dropout_structure": [0, 0.1, 0, 0],
        "use_dropout": True,
    },
    "dropout of older files": {"layer_structure": [1, 2, 2, 1], "activation_func": "elu", "use_dropout": True},
    "behind the last layer too": {
        "layer_structure": [1, 2, 2, 1],
        "activation_func": "elu",
        "use_dropout": True,
        "last_layer_dropout": True,
    },
    "norms": {"layer_structure": [1, 1], "activation_func": "tanh", "is_layer_norm": True},
    "without settings": {},
}


def network(width, seed, settings):
    """Returns A1111's network of one width as a row of torch's modules, with noise in every weight."""
    structure = settings.get("layer_structure", [1, 2, 1])
    act, last = settings.get("activation_func"), len(structure) - 2
    rates = settings.get("dropout_structure")
    if rates is None and settings.get("use_dropout"):
        rates = [0] + [0.3] * (len(structure) - 3) + [0.3 * settings.get("last_layer_dropout", False), 0]
    rows = []
    for i in range(len(structure) - 1):
        rows.append(torch.nn.Linear(int(width * structure[i]), int(width * structure[i + 1])))
        if act not in (None, "linear") and (i < last or settings.get("activate_output", True)):
            rows.append(CLASSES[act]())
        if settings.get("is_layer_norm"):
            rows.append(torch.nn.LayerNorm(int(width * structure[i + 1])))
        if rates and rates[i + 1] > 0:
            rows.append(torch.nn.Dropout(rates[i + 1]))
    made = torch.nn.Sequential(*rows).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in made.parameters():
            weight.copy_(0.2 * torch.randn(weight.shape, generator=generator))
    return made


def write(path, settings, seed=0):
    """Writes a file and returns its networks {width: (for keys, for values)}."""
    pairs = {
        width: (network(width, seed + width, settings), network(width, seed - width, settings)) for width in WIDTHS
    }
    states = {
        width: tuple({f"linear.{name}": value for name, value in one.state_dict().items()} for one in pair)
        for width, pair in pairs.items()
    }
    torch.save({**states, "step": 5, "name": "x", "sd_checkpoint": None, **settings}, path)
    return pairs


def hang(unet, pairs, strength):
    """Puts x + s N(x) in front of every to_k and to_v of diffusers' UNet."""

    def hook(i):
        return lambda module, args: (args[0] + strength * pairs[args[0].shape[-1]][i](args[0]),)

    for name, module in unet.named_modules():
        if name.endswith((".to_k", ".to_v")):
            module.register_forward_pre_hook(hook(name.endswith("v")))


@pytest.mark.parametrize("name", CASES)
def test_networks(name, tmp_path):
    """x + s N(x) of every width, for keys and for values."""
    pairs = write(tmp_path / "x.pt", CASES[name])
    (hook,) = sdjax.attach(made("sd1")[1], tmp_path / "x.pt", 0.7).hooks
    for width, pair in pairs.items():
        x = np.random.default_rng(width).standard_normal((2, 3, width)).astype(np.float32)
        for projection, theirs in zip(("to_k", "to_v"), pair, strict=True):
            at = SimpleNamespace(module=SimpleNamespace(name=projection), method_name="__call__")
            ours = hook.intercept("unet", lambda x: x, (x,), {}, at, None)
            wanted = x + 0.7 * theirs.double()(torch.from_numpy(x).double()).detach().numpy()
            np.testing.assert_allclose(ours, wanted, atol=1e-5 * np.abs(wanted).max())


def test_two_act_one_after_the_other(tmp_path):
    one, other = write(tmp_path / "1.pt", CASES["relu"]), write(tmp_path / "2.pt", CASES["default"], seed=9)
    theirs, base = fresh("sd1"), made("sd1")[1]
    hang(theirs.unet, one, 1.0)
    hang(theirs.unet, other, -0.5)
    assert_same(sdjax.attach(sdjax.attach(base, tmp_path / "1.pt"), tmp_path / "2.pt", -0.5), theirs, moved=base)


def test_names_of_old_files(tmp_path):
    pairs = write(tmp_path / "new.pt", {})
    names = {
        "0.weight": "linear1.weight",
        "0.bias": "linear1.bias",
        "1.weight": "linear2.weight",
        "1.bias": "linear2.bias",
    }
    old = {
        width: tuple({names[name]: value for name, value in one.state_dict().items()} for one in pair)
        for width, pair in pairs.items()
    }
    torch.save(old, tmp_path / "old.pt")
    base = made("sd1")[1]
    new, old = (sdjax.attach(base, tmp_path / f"{name}.pt").hooks[0] for name in ("new", "old"))
    for width in WIDTHS:
        for name in ("to_k", "to_v"):
            ours, theirs = (trees.flatten(one.networks[str(width)][name]) for one in (new, old))
            assert list(ours) == list(theirs)
            np.testing.assert_array_equal(ours["1.kernel"], theirs["1.kernel"])


@pytest.mark.parametrize("name", CASES)
def test_files_of_a1111_are_written_again_as_they_were(name, tmp_path):
    """Tensors bit for bit, settings where A1111 has them; what the file leaves out has A1111's default."""
    write(tmp_path / "x.pt", CASES[name])
    kind = HypernetworkFile()
    adapter = attachable.read(tmp_path / "x.pt", made("sd1")[1])
    again = torch.load(kind.write(adapter, tmp_path), weights_only=True)
    before = torch.load(tmp_path / "x.pt")
    for width in WIDTHS:
        for ours, theirs in zip(again[width], before[width], strict=True):
            assert list(ours) == list(theirs) and all(torch.equal(ours[one], theirs[one]) for one in theirs)
    assert {name: again[name] for name in before if name not in WIDTHS} == {
        name: value for name, value in before.items() if name not in WIDTHS
    }
    assert isinstance(attachable.kind(tmp_path / "x.pt"), HypernetworkFile)


@pytest.mark.parametrize("name", hypernetworks.ACTIVATIONS)
def test_activations_and_their_slopes_are_torchs(name):
    classes = {cls.lower(): getattr(torch.nn, cls) for cls in torch.nn.modules.activation.__all__}
    theirs = CLASSES["swish"] if name == "swish" else classes[name]
    x = np.linspace(-4, 4, 41, dtype=np.float32)
    there = torch.from_numpy(x).requires_grad_()
    wanted = theirs().eval()(there)
    wanted.sum().backward()
    found, slope = jax.vmap(jax.value_and_grad(hypernetworks.ACTIVATIONS[name]))(x)
    np.testing.assert_allclose(found, wanted.detach(), atol=2e-6)
    smooth = np.abs(x - np.round(2 * x) / 2) > 0.01  # at a kink a slope is a convention
    np.testing.assert_allclose(slope[smooth], there.grad[smooth], atol=5e-6)


def test_activations_are_all_of_torchs_that_a_network_can_use():
    """Those that A1111 builds without arguments, that have no weights, keep the shape and know one picture only."""

    def fits(name):
        try:
            made = getattr(torch.nn, name)().eval()
        except TypeError:
            return False
        x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
        with warnings.catch_warnings(action="ignore"):
            whole, alone = made(x), made(x[:1])
        return not list(made.parameters()) and whole.shape == x.shape and torch.equal(whole[:1], alone)

    wanted = {name.lower() for name in torch.nn.modules.activation.__all__ if fits(name)}
    assert wanted | {"swish"} == set(hypernetworks.ACTIVATIONS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation_func": "softmax"}, "activation_func='softmax': expected linear or one of relu"),
        ({"layer_structure": [1, 2, 2]}, r"layer_structure=\[1, 2, 2\]: expected numbers that begin and end with 1"),
        ({"layer_structure": [1, 2, 2, 1]}, "32 to_k: does not fit layer_structure: linear.1.bias"),
        ({32: ({},)}, "32: a pair of networks"),
    ],
)
def test_what_does_not_fit(settings, message, tmp_path):
    write(tmp_path / "x.pt", {})
    state = torch.load(tmp_path / "x.pt") | settings
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=message):
        sdjax.attach(made("sd1")[1], tmp_path / "x.pt")
