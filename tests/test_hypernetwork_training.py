"""Hypernetworks as a method: one step against torch, dropout, first weights, and the file that A1111 opens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_step
from test_hypernetworks import hang, network
from test_laws import noised

import sdjax
from sdjax import trees
from sdjax.data.batches import Data
from sdjax.data.sources.drawn import Pocketland
from sdjax.formats.adapters import kinds
from sdjax.methods.chain import Chain
from sdjax.methods.hypernetwork import Hypernetwork
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.models import hypernetworks
from sdjax.settings import SettingError, override
from sdjax.training.begin import begin
from sdjax.training.loop import train
from sdjax.training.optim import Optim
from sdjax.training.run_folder import export, start
from sdjax.training.settings import Train
from sdjax.training.step import default_loss

METHODS = {
    "default": Hypernetwork(),
    "deep": Hypernetwork(
        layer_structure=(1, 1.5, 2, 1),
        activation="mish",
        activate_output=True,
        layer_norm=True,
        weight_init="XavierNormal",
    ),
}
DROPS = Hypernetwork(layer_structure=(1, 2, 2, 1), activation="elu", dropout=(0, 0.3, 0.5, 0))
DATA = Data(path="pocketland", size=32, batch=2, source=Pocketland(count=8))


def a1111(trained, method):
    """Returns A1111's networks {width: (for keys, for values)} in torch with our weights."""
    state = {
        "layer_structure": method.layer_structure,
        "activation_func": method.activation,
        "activate_output": method.activate_output,
        "is_layer_norm": method.layer_norm,
    }
    found = {}
    for width, pair in trained.items():
        pairs = []
        for name in ("to_k", "to_v"):
            made = network(int(width), 0, state).train()
            with torch.no_grad():
                for place, weights in pair[name].items():
                    weight = weights["scale"] if "scale" in weights else np.asarray(weights["kernel"]).T
                    made[int(place)].weight.copy_(torch.from_numpy(np.array(weight)))
                    made[int(place)].bias.copy_(torch.from_numpy(np.array(weights["bias"])))
            pairs.append(made)
        found[int(width)] = tuple(pairs)
    return found


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_step_are_torchs(name):
    method, (sd, unet, text) = METHODS[name], torch_step.models()
    trained, frozen = method.split(sd, jax.random.key(1))
    trained, key = noised(trained, 0.1), jax.random.key(5)
    batch = torch_step.batch(sd, ["a photo of a face", "a cat in the snow"])
    loss = default_loss(method, Train(method=method))
    ours = lambda trained, frozen: loss(frozen, trained, batch, jax.random.clone(key), jnp.int32(0))[0]  # noqa: E731
    value, grads = jax.jit(jax.value_and_grad(ours))(trained, frozen)
    pairs, unet, seen = a1111(trained, method), torch_step.fresh(unet), torch_step.drawn(sd, batch, key)
    hang(unet, pairs, 1.0)
    prediction = unet(seen["z_t"], seen["t"], torch_step.context(text, batch["ids"]["text_encoder"])).sample
    there = ((prediction - seen["noise"]) ** 2).mean()
    there.backward()
    assert float(value) == pytest.approx(there.item(), rel=1e-5)
    wanted = {
        f"{width}.{projection}.{place}.{kind}": (value.grad.mT if value.ndim == 2 else value.grad).numpy()
        for width, pair in pairs.items()
        for projection, modules in zip(("to_k", "to_v"), pair, strict=True)
        for place, module in enumerate(modules)
        for kind, value in zip(("weight", "bias"), module.parameters(), strict=False)
    }
    ours = {name.replace("kernel", "weight").replace("scale", "weight"): x for name, x in trees.flatten(grads).items()}
    assert set(ours) == set(wanted)
    most = max(np.linalg.norm(grad) for grad in wanted.values())
    for name, grad in wanted.items():
        size, apart = np.linalg.norm(grad), np.linalg.norm(ours[name] - grad)
        # A constant in all keys changes nothing, so that its gradient is rounding errors.
        assert apart <= 1e-4 * size if size > 1e-6 * most else apart <= 1e-5 * most, name


def test_dropout_belongs_to_the_example_and_the_layer():
    rows = DROPS.rows
    assert [row.dropout for row in rows] == [0.3, 0.5, 0]
    layers = noised(DROPS.draw((32,), jax.random.key(0)), 0.2)["32"]["to_k"]
    hook = hypernetworks.Hypernetwork({}, jnp.float32(1), rows=rows)
    x = jnp.ones((64, 5, 32))
    keys = jax.random.split(jax.random.key(3), 64)
    run = jax.jit(lambda x, keys: hook.run(layers, x, keys))
    found = run(x, keys)
    np.testing.assert_allclose(run(x[:2], keys[:2]), found[:2], atol=1e-5)
    assert len({float(row.sum()) for row in found}) == 64 and not np.array_equal(found[:, 0], found[:, 1])
    only = hypernetworks.Hypernetwork({}, jnp.float32(1), rows=(rows[0],))
    hidden, all_there = only.run(layers, x, keys), only.run(layers, x)
    gone = np.asarray(hidden) == 0
    assert gone.mean() == pytest.approx(0.3, abs=0.02)
    np.testing.assert_allclose(hidden[~gone], (all_there / 0.7)[~gone], rtol=1e-5)


@pytest.mark.parametrize("kind", ["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"])
def test_first_weights_have_torchs_distribution(kind):
    method = Hypernetwork(layer_structure=(1, 3, 1), weight_init=kind, zero=False, layer_norm=True, activation="relu")
    layers = method.draw((320,), jax.random.key(0))["320"]["to_v"]
    weight = torch.empty(960, 320)
    gain = {"nonlinearity": "relu"} if kind.startswith("Kaiming") else {}
    if kind == "Normal":
        torch.nn.init.normal_(weight, 0.0, 0.01)
    else:
        name = kind.replace("Xavier", "xavier_").replace("Kaiming", "kaiming_").lower() + "_"
        getattr(torch.nn.init, name)(weight, **gain)
    ours = np.asarray(layers["0"]["kernel"])
    assert ours.shape == (320, 960) and abs(ours.mean()) < 0.01 * ours.std()
    assert ours.std() == pytest.approx(float(weight.std()), rel=0.01)
    assert np.abs(ours).max() == pytest.approx(float(weight.abs().max()), rel=0.01 if kind.endswith("Uniform") else 0.3)
    assert np.asarray(layers["2"]["scale"]).std() == pytest.approx(0.01, rel=0.1)
    assert not layers["0"]["bias"].any() and not layers["2"]["bias"].any()


def test_sizes_are_those_of_a_models_attention():
    sd = sdjax.load("random:tiny")
    trained, _ = Hypernetwork().split(sd)
    assert sorted(trained) == ["32", "64"]
    assert trained["32"]["to_k"]["0"]["kernel"].shape == (32, 64)
    with pytest.raises(SettingError, match=r"sizes=\(768,\): expected some of this model's 32, 64"):
        Hypernetwork(sizes=(768,)).split(sd)
    shapes = jax.eval_shape(lambda key: Hypernetwork().draw((320, 640, 768, 1280), key), jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 21_939_840  # of SD 1: specs of A1111's files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layer_structure": (1, 2, 2)}, "layer_structure=.*: expected numbers above 0 that begin and end with 1"),
        ({"activation": "glu"}, "activation='glu': expected one of linear, relu"),
        ({"dropout": (0, 0.3)}, "dropout=.*: expected 3 rates below 1"),
        ({"weight_init": "Zeros"}, "weight_init='Zeros': expected one of Normal"),
        (
            {"activation": "sigmoid", "activate_output": True},
            "activate_output=True: sigmoid behind a last layer of zero",
        ),
        ({"activation": "relu", "activate_output": True}, "expected activate_output=false, or zero=false"),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(SettingError, match=message):
        Hypernetwork(**settings)


def test_settings_of_a_command_line():
    found = override(Hypernetwork(), ["layer_structure=(1, 2.5, 1)", "dropout=(0, 0.2, 0)", "activation=mish"])
    assert found == Hypernetwork((1, 2.5, 1), "mish", dropout=(0, 0.2, 0))


def test_a_run_writes_what_a1111_opens_and_goes_on_from_it(tmp_path):
    method = Hypernetwork(activation="mish", layer_norm=True, dropout=(0, 0.2, 0), weight_init="KaimingNormal")
    settings = Train(model="random:tiny", method=method, data=DATA, optim=Optim(lr=1e-2), steps=2, checkpoint=0)
    train(settings, tmp_path / "out")
    path = tmp_path / "out" / "export" / "out.pt"
    state = torch.load(path, weights_only=True)
    about = {name: value for name, value in state.items() if type(name) is str}
    assert about == {
        "layer_structure": [1, 2, 1],
        "activation_func": "mish",
        "is_layer_norm": True,
        "weight_initialization": "KaimingNormal",
        "activate_output": False,
        "use_dropout": True,
        "dropout_structure": [0, 0.2, 0.0],
        "last_layer_dropout": True,
        "step": 2,
        "name": "out",
        "sd_checkpoint": None,
        "sd_checkpoint_name": "random:tiny",
    }
    trained, frozen, *_ = begin(settings, pictures=False)
    kind, adapter = kinds.opened(path, frozen)
    started, _ = kind.start(adapter, method, trained, frozen)
    for place in ("0", "2", "4", "5"):
        name = next(iter(set(started["32"]["to_k"][place]) - {"bias"}))
        weight = state[32][0][f"linear.{place}.weight"].numpy()
        np.testing.assert_array_equal(started["32"]["to_k"][place][name], weight.T if name == "kernel" else weight)
    with pytest.raises(SettingError, match="activation='linear': expected 'mish', with which it was trained"):
        kind.start(adapter, Hypernetwork(), trained, frozen)


@pytest.mark.parametrize("lr", [0.0, 1e-3])
def test_pictures_of_an_export(lr, tmp_path):
    """At rate 0 the base model's, else others."""
    settings = Train(model="random:tiny", method=Hypernetwork(), data=DATA, optim=Optim(lr=lr), steps=3, checkpoint=0)
    train(settings, tmp_path / "out")
    base = sdjax.load("random:tiny")
    sd = sdjax.attach(base, tmp_path / "out" / "export" / "out.pt")
    options = {"seeds": [0], "steps": 3, "size": 32}
    one, other = (sdjax.text2img(one, ["a face"], **options) for one in (base, sd))
    assert np.array_equal(one, other) == (lr == 0)


def test_words_and_a_hypernetwork_are_two_files(tmp_path):
    method = Chain((TextualInversion("<cat>", "cat"), Hypernetwork()))
    frozen = method.split(sdjax.load("random:tiny"))[1]
    trained = noised(method.split(sdjax.load("random:tiny"), jax.random.key(0))[0], 0.1)
    path, use = export(method, frozen, trained, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypernetwork.pt", "learned_embeds.safetensors"]
    assert any("load_textual_inversion" in line for line in use) and any("<hypernet:" in line for line in use)
    sd = sdjax.load("random:tiny")
    for name in ("hypernetwork.pt", "learned_embeds.safetensors"):
        sd = sdjax.attach(sd, tmp_path / name)
    joined = method.join(frozen, trained)
    texts, random = ["a photo of a <cat>"], np.random.default_rng(0)
    z, t = jnp.asarray(random.standard_normal((1, 16, 16, 4), np.float32)), jnp.array([400.0])
    run = jax.jit(lambda sd, ids: sd.denoise(z, t, sd.condition(ids))[0])
    one, other = (run(sd.bare, sd.tokenize(texts)) for sd in (joined, sd))
    np.testing.assert_allclose(one, other, atol=1e-5)
    started, _ = start(method, method.split(frozen)[0], frozen, "x", kinds.opened(tmp_path / "hypernetwork.pt", frozen))
    np.testing.assert_array_equal(started["1"]["32"]["to_k"]["1"]["bias"], trained["1"]["32"]["to_k"]["1"]["bias"])
    with pytest.raises(ValueError, match="a file holds one hypernetwork"):
        Chain((Hypernetwork(), Hypernetwork(activation="relu")))


@pytest.mark.parametrize("order", [1, -1])
def test_a_hypernetwork_and_a_lora_are_two_files_that_act_together(order, tmp_path):
    method, sd = Chain((Hypernetwork(), Lora(rank=2, alpha=2.0))[::order]), sdjax.load("random:tiny")
    trained, frozen = method.split(sd, jax.random.key(0))
    trained = noised(trained, 0.05)
    export(method, frozen, trained, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hypernetwork.pt", "lora.safetensors"]
    attached = sdjax.attach(sdjax.attach(sd, tmp_path / "lora.safetensors"), tmp_path / "hypernetwork.pt")
    z, t = jax.random.normal(jax.random.key(2), (1, 16, 16, 4)), jnp.array([400.0])
    run = jax.jit(lambda sd, ids: sd.denoise(z, t, sd.condition(ids))[0])
    ids = sd.tokenize(["a photo of a face"])
    joined, other, base = (run(one.bare, ids) for one in (method.join(frozen, trained), attached, sd))
    np.testing.assert_allclose(joined, other, atol=2e-5 * float(jnp.abs(joined).max()))
    assert float(jnp.abs(joined - base).max()) > 1e-3
