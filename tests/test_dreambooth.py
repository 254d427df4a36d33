"""DreamBooth and the loss's settings against the formulas in PyTorch; class rows of batches; class pictures."""

import dataclasses
import math
import re

import jax
import numpy as np
import optax
import pytest
import torch
from torch.nn.functional import mse_loss
from torch_step import assert_same_gradients, batch, context, drawn, fresh, models

from sdjax import trees
from sdjax.data.classes import ClassData
from sdjax.methods.chain import Chain
from sdjax.methods.custom_diffusion import CustomDiffusion
from sdjax.methods.full import Full
from sdjax.methods.lora import Lora
from sdjax.methods.textual_inversion import TextualInversion
from sdjax.training.optim import Optim, optimizer
from sdjax.training.settings import Train
from sdjax.training.step import default_loss, initial_state, make_step

KEY, RATE = 11, 1e4  # a rate so large that the change is the gradient to many digits
PATTERN = r"attn2|fc1|conv_in"
SUBJECT, CLASS = ["a photo of face red", "red face in the snow"], ["a photo of a face", "a face in the snow"]


def moved(method, rows, accumulate=1, **settings):
    """Returns ({name: gradient} of one step of plain descent, the key of its draws)."""
    sd, _, _ = models()
    trained, frozen = method.split(sd, jax.random.key(1))
    # away from the model before, so that what holds on to it has a gradient
    trained = jax.tree.map(lambda x: 1.1 * x, trained)
    tx, root = optax.sgd(RATE), jax.random.key(KEY)
    loss = default_loss(method, Train(method=method, **settings))
    step = jax.jit(make_step(method, tx, root, loss=loss, accumulate=accumulate))
    state, metrics = step(initial_state(trees.copy(trained), tx), frozen, rows)
    return jax.tree.map(lambda old, new: (old - new) / RATE, trained, state["trained"]), float(metrics["loss"])


def scaled(module, pattern):
    """Returns a copy of a torch module with 1.1 times its weights, of names that match only."""
    module = fresh(module)
    with torch.no_grad():
        for name, weight in module.named_parameters():
            weight.mul_(1.1 if re.search(pattern, name) else 1.0)
    return module


def test_class_rows_are_dreambooths_loss():
    """UNet and text encoder, two microbatches, three rows of the subject and one of the class: lambda counts means."""
    sd, unet, text = models()
    classes = ClassData(path="there", rows=1, weight=0.7)
    prompts = [*SUBJECT, "a red face", CLASS[0]]
    weight = np.array([4 / 3, 4 / 3, 4 / 3, 4 * classes.weight], np.float32)
    rows = batch(sd, prompts, weight=weight)
    grads, loss = moved(Full(("unet", "text_encoder"), PATTERN), rows, accumulate=2)
    seen = drawn(sd, rows, jax.random.fold_in(jax.random.key(KEY), 0))
    unet, text = scaled(unet, PATTERN), scaled(text, PATTERN)
    predicted = unet(seen["z_t"], seen["t"], context(text, rows["ids"]["text_encoder"])).sample
    instance, prior = mse_loss(predicted[:3], seen["noise"][:3]), mse_loss(predicted[3:], seen["noise"][3:])
    total = instance + 0.7 * prior
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert_same_gradients(grads["unet"], unet.named_parameters())
    named = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in text.named_parameters()}
    assert_same_gradients(grads["text_encoder"], named)


def test_output_preservation_is_its_formula():
    """The model before training tells the class prompt's prediction, at the same noise and times."""
    sd, unet, text = models()
    rows = batch(sd, SUBJECT, class_ids=sd.tokenize(CLASS))
    grads, loss = moved(Full(("unet",), "attn2", keep=True), rows, preserve=0.6)
    seen = drawn(sd, rows, jax.random.fold_in(jax.random.key(KEY), 0))
    now = scaled(unet, "attn2")
    with torch.no_grad():
        subject, others = (context(text, rows[name]["text_encoder"]) for name in ("ids", "class_ids"))
        wanted = unet(seen["z_t"], seen["t"], others).sample
    total = mse_loss(now(seen["z_t"], seen["t"], subject).sample, seen["noise"])
    total = total + 0.6 * mse_loss(now(seen["z_t"], seen["t"], others).sample, wanted)
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    assert_same_gradients(grads["unet"], now.named_parameters())


def test_custom_diffusion_is_diffusers():
    """diffusers' attention processors with a trained word; the start of the text has no gradient."""
    from diffusers.models.attention_processor import CustomDiffusionAttnProcessor

    sd, unet, text = models()
    method = Chain((TextualInversion("<new>", "red"), CustomDiffusion(query=True)))
    _, known = method.split(sd, jax.random.key(1))
    rows = batch(known, ["a photo of <new> face", "<new> in the snow"])
    grads, loss = moved(method, rows)
    seen = drawn(sd, rows, jax.random.fold_in(jax.random.key(KEY), 0))
    unet, text = fresh(unet), fresh(text)
    processors = {}
    for name in unet.attn_processors:
        layer, own = unet.get_submodule(name.removesuffix(".processor")), "attn2" in name
        sizes = {"hidden_size": len(layer.to_q.weight), "cross_attention_dim": 32} if own else {}
        processors[name] = CustomDiffusionAttnProcessor(train_kv=own, train_q_out=own, **sizes)
        if own:
            weights = {kind: getattr(layer, kind).weight for kind in ("to_k", "to_v", "to_q")}
            weights = {f"{kind}_custom_diffusion.weight": weight for kind, weight in weights.items()}
            out = {f"to_out_custom_diffusion.0.{kind}": getattr(layer.to_out[0], kind) for kind in ("weight", "bias")}
            processors[name].load_state_dict({n: 1.1 * w.detach() for n, w in {**weights, **out}.items()})
    unet.set_attn_processor(processors)
    text.resize_token_embeddings(int(known.words["<new>"]["text_encoder"].max()) + 1, mean_resizing=False)
    table = text.get_input_embeddings().weight
    with torch.no_grad():
        (start,) = known.tokenizers["text_encoder"].ids("red")[:1]
        table[int(known.words["<new>"]["text_encoder"][0])] = 1.1 * table[start]
    total = mse_loss(unet(seen["z_t"], seen["t"], context(text, rows["ids"]["text_encoder"])).sample, seen["noise"])
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-5)
    theirs = {}
    for name, processor in unet.attn_processors.items():
        for weight, value in processor.named_parameters():
            theirs[name.removesuffix("processor") + weight.replace("_custom_diffusion", "")] = value
    assert_same_gradients(grads["1"]["unet"], theirs)
    wanted = table.grad[int(known.words["<new>"]["text_encoder"][0])].numpy()
    assert np.linalg.norm(grads["0"]["rows"]["text_encoder"][0] - wanted) <= 1e-4 * np.linalg.norm(wanted)


def kohya_weight(seen, snr):
    """Returns the debiased weights [B] as sd-scripts computes them."""
    return 1 / torch.sqrt(torch.minimum(snr[seen["t"]], torch.tensor(1000.0)))


@pytest.mark.parametrize("decay", ["snr", "exponential"])
def test_huber_debiased_pyramid_and_perturbation_are_their_formulas(decay):
    sd, unet, text = models()
    rows = batch(sd, SUBJECT)
    noise = {"pyramid": 0.4, "perturbation": 0.1, "noise_offset": 0.05}
    grads, loss = moved(Full(("unet",), "attn2"), rows, huber=0.2, huber_decay=decay, debiased=True, **noise)
    seen = drawn(sd, rows, jax.random.fold_in(jax.random.key(KEY), 0), **noise)
    bar = torch.tensor(np.asarray(sd.schedule.alphas_cumprod), dtype=torch.float32)
    more = seen["z_t"] - bar[seen["t"]].sqrt()[:, None, None, None] * seen["z"]
    more = more / (1 - bar[seen["t"]]).sqrt()[:, None, None, None] - seen["noise"]
    assert 0.08 < float(more.std()) < 0.12  # the target does not have it
    if decay == "snr":
        sigma = ((1 - bar) / bar).sqrt()[seen["t"]]
        c = (1 - 0.2) / (1 + sigma) ** 2 + 0.2
    else:
        c = torch.exp(math.log(0.2) / 1000 * seen["t"].float())
    c = c[:, None, None, None]
    now = scaled(unet, "attn2")
    with torch.no_grad():
        told = context(text, rows["ids"]["text_encoder"])
    off = now(seen["z_t"], seen["t"], told).sample - seen["noise"]
    error = (2 * c * (torch.sqrt(off**2 + c**2) - c)).mean((1, 2, 3))
    total = (error * kohya_weight(seen, bar / (1 - bar))).mean()
    total.backward()
    assert loss == pytest.approx(float(total.detach()), rel=1e-4)
    assert_same_gradients(grads["unet"], now.named_parameters())


@pytest.mark.parametrize(
    "method",
    [
        Full(("unet", "text_encoder"), "attn2|fc1", keep=True),
        Chain((TextualInversion("<new>"), Full(("unet",), keep=True))),
        Chain((TextualInversion("<new>"), CustomDiffusion())),
    ],
)
def test_the_model_before_has_the_weights_that_were_there(method):
    sd, _, _ = models()
    _, frozen = method.split(sd, jax.random.key(0))
    before = method.before(frozen)
    assert trees.digest(before.parts["unet"]) == trees.digest(sd.parts["unet"])
    for encoder, ids in sd.tokenize(CLASS).items():
        assert np.array_equal(before.embed(encoder, ids), sd.embed(encoder, ids))
    with pytest.raises(ValueError, match="keep=False: expected True, where the loss looks back"):
        Full().before(Full().split(sd)[1])


def test_lora_with_a_word_holds_on_to_the_class():
    """Pivotal tuning: nothing to hold on to at the start, more the further it goes; a rate of 0 keeps the word."""
    sd, _, _ = models()
    method = Chain((TextualInversion("<new>", "red"), Lora(rank=2, targets="attn2")))
    trained, frozen = method.split(sd, jax.random.key(1))
    rows = batch(frozen, ["a photo of <new> face", "<new> in the snow"], class_ids=frozen.tokenize(CLASS))
    plain, kept = (default_loss(method, Train(method=method, preserve=strength)) for strength in (0.0, 1.0))
    value = jax.jit(lambda tree, frozen: [one(frozen, tree, rows, jax.random.key(3), 0)[0] for one in (plain, kept)])
    one, other = value(trained, frozen)
    assert float(other) == pytest.approx(float(one), rel=1e-6)
    one, other = value(jax.tree.map(lambda x: x + 0.3, trained), frozen)
    assert float(other) > float(one) * 1.001
    tx, _ = optimizer(Optim(lr=1e-2, rates=(("rows", 0.0),)), 1)
    step = jax.jit(make_step(method, tx, jax.random.key(0), loss=kept))
    state, _ = step(initial_state(trees.copy(trained), tx), frozen, rows)
    assert trees.digest(state["trained"]["0"]) == trees.digest(trained["0"])
    assert trees.digest(state["trained"]["1"]) != trees.digest(trained["1"])


def test_settings_of_the_loss_that_do_not_fit():
    with pytest.raises(ValueError, match="debiased=True: expected False with min_snr=5.0"):
        Train(debiased=True, min_snr=5.0)
    with pytest.raises(ValueError, match="huber_decay='x': expected one of constant, exponential, snr"):
        Train(huber_decay="x")
    assert dataclasses.replace(Train(), huber=0.1).huber == 0.1
