"""Tokens and weights of prompts case by case, and their conditions against PyTorch's text encoder and the formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import struct

import sdjax
from sdjax.diffusion.wrappers import Guidance
from sdjax.formats import pipeline
from sdjax.stable_diffusion import StableDiffusion
from sdjax.text import conditioning
from sdjax.text.grammars import timeline
from sdjax.text.tokenizer import Tokenizer

ENCODER = "text_encoder"
ROOM = 75
WORDS = (
    "a b c d e red blue cat dog house sky sun hill on in ( ) [ ] : \\ , . 1 2 3 BREAK AND normal text important word"
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([WORDS] * 3, 700, length=ROOM + 2).add("<me>", 3).add("sks-cat", 2)


@pytest.fixture(scope="module")
def ids(tokenizer, tmp_path_factory):
    """Ids of a piece of text by transformers; <me> has three vectors, sks-cat two."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer.save(folder)
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    several = {"<me>": ["<me>", "<me>_1", "<me>_2"], "sks-cat": ["sks-cat", "sks-cat_1"]}

    def encode(text):
        tokens = [more for token in theirs.tokenize(text) for more in several.get(token, [token])]
        return theirs.convert_tokens_to_ids(tokens)

    return encode


R, S = 1.1, 1 / 1.1
# text: chunks of (piece, weight), as the tools' own parsers and their chunking define them.
A1111 = {
    "normal text": [[("normal text", 1)]],
    "": [[]],
    "an (important) word": [[("an", 1), ("important", R), ("word", 1)]],
    "(unbalanced": [[("unbalanced", R)]],
    "((red) cat": [[("red", R * R), ("cat", R)]],
    "[[red] cat": [[("red", S * S), ("cat", S)]],
    "\\(red\\]": [[("(red]", 1)]],
    "\\[red\\) \\\\": [[("[red) \\", 1)]],
    "red\\cat": [[("redcat", 1)]],
    "(red)(cat)": [[("redcat", R)]],
    "(red) (cat)": [[("red", R), ("cat", R)]],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        [
            ("a", 1),
            ("house", 1.3 * R * R),
            ("on", 1),
            ("a", R),
            ("hill", 0.5 * R),
            (", sun,", R),
            ("sky", R**4),
            (".", R),
        ]
    ],
    "(red:1.3)": [[("red", 1.3)]],
    "(red:0)": [[("red", 0)]],
    "(red:-1.5) cat": [[("red", -1.5), ("cat", 1)]],
    "(red:+.5)": [[("red", 0.5)]],
    "(red: 1.3 )": [[("red", 1.3)]],
    "((red:1.2) cat:1.5)": [[("red", 1.8), ("cat", 1.5)]],
    "[red:1.3]": [[("red:1.3", S)]],
    "[(red:1.3)]": [[("red", 1.3 * S)]],
    "([red])": [[("red", 1.0)]],
    "(red:cat)": [[("red:cat", R)]],
    "red:1.3": [[("red:1.3", 1)]],
    "red:1.3)": [[("red:1.3)", 1)]],
    "red) cat]": [[("red) cat]", 1)]],
    "(red, blue:1.2), cat": [[("red, blue", 1.2), (", cat", 1)]],
    "(red\n blue:1.2)": [[("red blue", 1.2)]],
    "a (b [c (d) e]": [[("a", 1), ("b", R), ("c", R * S), ("d", R * R * S), ("e", R * S)]],
    "<me> (<me>:1.2)": [[("<me>", 1), ("<me>", 1.2)]],
    "(a <me> b:0.9)": [[("a <me> b", 0.9)]],
    "SKS-Cat, sks-cat": [[("sks-cat, sks-cat", 1)]],
    "red BREAK cat": [[("red", 1)], [("cat", 1)]],
    "red\nBREAK\n(cat)": [[("red", 1)], [("cat", R)]],
    "BREAK cat": [[], [("cat", 1)]],
    "cat BREAK": [[("cat", 1)]],
    "a BREAK BREAK b": [[("a", 1)], [], [("b", 1)]],
    "BREAKing redBREAK": [[("breaking redbreak", 1)]],
    "(a BREAK b)": [[("a", R), ("break", -R), ("b", R)]],  # as there: inside brackets it is a word
    "(red:1.2) BREAK (red:1.2)": [[("red", 1.2)], [("red", 1.2)]],
    "red AND": [[("red and", 1)]],
    "a " * 75: [[("a " * 75, 1)]],
    "a " * 76: [[("a " * 75, 1)], [("a", 1)]],
    "a " * 160: [[("a " * 75, 1)], [("a " * 75, 1)], [("a " * 10, 1)]],
    "(" + "a " * 80 + ":1.2)": [[("a " * 75, 1.2)], [("a " * 5, 1.2)]],
    "a " * 60 + ", " + "b " * 20: [[("a " * 60 + ",", 1)], [("b " * 20, 1)]],  # 14 tokens after the comma move
    "a " * 55 + ", " + "b " * 20: [[("a " * 55 + ",", 1)], [("b " * 20, 1)]],  # 19 tokens
    "a " * 54 + ", " + "b " * 21: [[("a " * 54 + ", " + "b " * 20, 1)], [("b", 1)]],  # 20: too far away
    "a " * 74 + ", b": [[("a " * 74 + ",", 1)], [("b", 1)]],
    "a " * 75 + ", b": [[("a " * 75, 1)], [(", b", 1)]],
    "a " * 60 + ", (" + "b " * 20 + ":1.4)": [[("a " * 60 + ",", 1)], [("b " * 20, 1.4)]],
    "a " * 73 + "<me>": [[("a " * 73, 1)], [("<me>", 1)]],  # its vectors stay together
    "a " * 72 + "(<me>:1.3)": [[("a " * 72, 1), ("<me>", 1.3)]],
}
COMFYUI = {
    "normal text": [[("normal text", 1)]],
    "": [[]],
    "an (important) word": [[("an", 1), ("important", R), ("word", 1)]],
    "((red) cat:1.5)": [[("red", 1.5 * R), ("cat", 1.5)]],
    "((red:1.2) cat)": [[("red", 1.2), ("cat", R)]],
    "[red] (unbalanced": [[("[red] (unbalanced", 1)]],
    "\\(red\\) (cat)": [[("(red)", 1), ("cat", R)]],
    "red BREAK cat": [[("red break cat", 1)]],
    "a embedding:<me> b": [[("a <me> b", 1)]],
    "(embedding:sks-cat, a:1.3)": [[("sks-cat, a", 1.3)]],
    "embedding:SKS-cat": [[("sks-cat", 1)]],
    "a " * 160: [[("a " * 75, 1)], [("a " * 75, 1)], [("a " * 10, 1)]],
    "a " * 70 + "(red cat dog sun sky hill:1.2)": [[("a " * 70, 1)], [("red cat dog sun sky hill", 1.2)]],
    "a " * 70 + "(a a a a a a a a:1.2)": [[("a " * 70, 1), ("a " * 5, 1.2)], [("a a a", 1.2)]],
}
PLAIN = {
    "a (red:1.3) [cat] BREAK": [[("a (red:1.3) [cat] break", 1)]],
    "a " * 160: [[("a " * 75, 1)]],
}
TABLES = {"a1111": A1111, "comfyui": COMFYUI, "plain": PLAIN}
CASES = [(grammar, text) for grammar, table in TABLES.items() for text in table]


def test_there_are_sixty_cases_and_more():
    assert len(CASES) >= 60


@pytest.mark.parametrize(("grammar", "text"), CASES)
def test_tokens_and_weights(tokenizer, ids, grammar, text):
    made = conditioning.chunks(tokenizer, text, grammar)
    expected = [[(number, w) for piece, w in chunk for number in ids(piece)] for chunk in TABLES[grammar][text]]
    assert [[number for number, _ in chunk] for chunk in made] == [[number for number, _ in c] for c in expected]
    assert [w for chunk in made for _, w in chunk] == pytest.approx([w for chunk in expected for _, w in chunk])


def test_rows_have_begin_end_and_padding(tokenizer):
    other = tokenizer.of(tokenizer.vocabulary, tokenizer.merges, 9, pad="a</w>")  # SD 2 pads with another token
    made, weights = conditioning.rows(other, [[(5, 1.5), (6, 0.5)]], 2)
    pads = [other.pad] * 5
    assert made.tolist() == [[other.bos, 5, 6, other.eos, *pads], [other.bos, other.eos, *pads, other.pad, other.pad]]
    assert weights.tolist() == [[1, 1.5, 0.5, 1, 1, 1, 1, 1, 1], [1] * 9]


# ---- conditions --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Our model, and transformers' text encoder of the folder that we wrote; no weight of it is zero."""
    sd, random = pipeline.load("random:tiny"), np.random.default_rng(3)

    def noised(x):
        return np.asarray(x) + np.float32(0.1) * random.standard_normal(x.shape, np.float32)

    sd = sd.with_parts(text_encoder=jax.tree.map(noised, sd.parts["text_encoder"]))
    folder = tmp_path_factory.mktemp("model") / "model"
    sdjax.save(sd, folder)
    return sd, transformers.CLIPTextModel.from_pretrained(folder / "text_encoder").eval()


@pytest.fixture(scope="module")
def sd(pair):
    return pair[0]


@torch.no_grad()
def encoded(theirs, ids, skip=0):
    """transformers' vectors [n L C] of ids [n L], float64: the last layers left out, the final norm applied."""
    states = theirs(torch.from_numpy(ids).long(), output_hidden_states=True).hidden_states
    model = getattr(theirs, "text_model", theirs)
    return model.final_layer_norm(states[-1 - skip]).double()


def a1111(z, weights):
    """One chunk's vectors [L C] times weights [L], and the old mean again."""
    weighed = z * torch.from_numpy(weights).double()[:, None]
    return weighed * (z.mean() / weighed.mean())


def comfyui(z, weights, empty):
    out = z.clone()
    for i, weight in enumerate(weights.tolist()):
        if weight != 1:
            out[i] = (z[i] - empty[i]) * weight + empty[i]
    return out


TEXT = "a (photo:1.4) of a [face] on the (beach:0.6), a mosaic of a cat in the snow (at night)"


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("weighting", ["a1111", "comfyui"])
def test_weights_act_as_in_the_tools(pair, weighting, skip):
    sd, theirs = pair
    tokenizer = sd.tokenizers[ENCODER]
    _, cond, negative = conditioning.condition(sd, [TEXT], ["(red:1.2)"], skip=skip, weighting=weighting)
    count = cond.words["text_encoder"]["weights"].shape[1]
    assert count == 2 and cond.unet.context.shape == negative.unet.context.shape == (1, 32, 32)
    empty = encoded(theirs, conditioning.rows(tokenizer, [], 1)[0], skip)[0]
    for made, text in ((cond, TEXT), (negative, "(red:1.2)")):
        ids, weights = conditioning.rows(tokenizer, conditioning.chunks(tokenizer, text), count)
        assert (weights != 1).any()
        formula = a1111 if weighting == "a1111" else lambda z, w: comfyui(z, w, empty)
        expected = [formula(z, w) for z, w in zip(encoded(theirs, ids, skip), weights, strict=True)]
        np.testing.assert_array_equal(made.words["text_encoder"]["ids"][0], ids.reshape(-1))
        np.testing.assert_allclose(made.unet.context[0], torch.cat(expected).numpy(), atol=2e-5)


def test_the_texts_of_a_schedule_share_their_mean(pair):
    """As stable-diffusion-webui encodes them: one batch with a row per end, so twice where a text comes twice."""
    sd, theirs = pair
    text = "[(cat:1.5)|a (dog:0.7)]"
    texts = ["(cat:1.5)", "a (dog:0.7)", "(cat:1.5)"]  # three steps
    sd, cond, _ = conditioning.condition(sd, [text], steps=3)
    tokenizer = sd.tokenizers["text_encoder"]
    rows = [conditioning.rows(tokenizer, conditioning.chunks(tokenizer, text), 1) for text in texts]
    z = torch.cat([encoded(theirs, ids) for ids, _ in rows])
    weighed = z * torch.from_numpy(np.concatenate([weights for _, weights in rows])).double()[..., None]
    expected = weighed * (z.mean() / weighed.mean())
    for step, text in ((0, 0), (1, 0), (2, 1)):
        made, _ = sd.conditioners[0](sd, None, None, step, cond)
        np.testing.assert_allclose(made.unet.context[0], expected[text].numpy(), atol=2e-5)


def test_a_mean_of_nothing_is_not_restored():
    """Behind a fresh layer norm the mean is 0 up to rounding: its restoration would be noise, another in each batch."""
    fresh = pipeline.load("random:tiny")
    _, three, _ = conditioning.condition(fresh, ["a cat", "(cat:1.5)", "a"])
    _, alone, _ = conditioning.condition(fresh, ["(cat:1.5)"])
    z = _conditioned(fresh, fresh.tokenize(["cat"])).unet.context[0]
    expected = z * np.where(np.arange(16) == 1, 1.5, 1)[:, None].astype(np.float32)
    assert len(fresh.tokenizers["text_encoder"].ids("cat")) == 1
    np.testing.assert_allclose(three.unet.context[1], expected, atol=1e-5)
    np.testing.assert_allclose(alone.unet.context[0], expected, atol=1e-5)


def shown(text, steps, prompts_of):
    """The text of each step by the webui's rule: that of the first end that is not below the steps done."""
    ends = prompts_of(text, steps)
    return [next(text for end, text in ends if done <= end) for done in range(steps)]


@pytest.mark.parametrize("text", ["[cat:dog:0.5]", "a [dog:3]", "[cat|dog|a]", "[cat::2] snow", "[[cat|dog]:a:0.6]"])
def test_each_step_has_its_text(sd, text):
    timed, cond, _ = conditioning.condition(sd, [text, "a [face::4]"], ["", "[red:blue:0.2]"], steps=6)
    step = jax.jit(lambda sd, i: sd.conditioners[0](sd, None, None, i, cond)[0])
    for i in range(6):
        made = step(timed, i)
        wanted = [shown(t, 6, timeline)[i] for t in (text, "a [face::4]")]
        np.testing.assert_array_equal(made.words["text_encoder"]["ids"], sd.tokenize(wanted)["text_encoder"])
        unwanted = shown("[red:blue:0.2]", 6, timeline)[i]
        np.testing.assert_array_equal(made.negative.words[ENCODER]["ids"][1:], sd.tokenize([unwanted])[ENCODER])
        np.testing.assert_allclose(
            made.unet.context[:1], _conditioned(sd, sd.tokenize(wanted)).unet.context[:1], atol=1e-5
        )


def test_plain_prompts_are_what_they_always_were(sd):
    texts = ["a (photo:1.3) of a [face:cat:0.5] AND snow <lora:x:1>", "a face"]
    same, cond, negative = conditioning.condition(sd, texts, ["(red)", ""], grammar="plain")
    assert same.conditioners == () and cond.also == ()
    for made, wanted in ((cond, texts), (negative, ["(red)", ""])):
        expected = _conditioned(sd, sd.tokenize(wanted))
        np.testing.assert_array_equal(made.words["text_encoder"]["ids"], expected.words["text_encoder"]["ids"])
        np.testing.assert_allclose(made.unet.context, expected.unet.context, atol=1e-5)


class Network(struct.PyTreeNode):
    """Stands for the UNet, which takes long to compile: a prediction that feels every number of the context."""

    rank: int = struct.field(pytree_node=False, default=9)  # innermost

    def __call__(self, sd, call, z, t, cond):
        phase = jnp.arange(cond.unet.context[0].size, dtype=jnp.float32).reshape(1, *cond.unet.context.shape[1:])
        return z * jnp.mean(cond.unet.context * jnp.cos(phase), (1, 2))[:, None, None, None] * 30


_conditioned = jax.jit(StableDiffusion.condition)


def denoised(sd, cond, i=0):
    sd = sd.add(wrappers=Network())
    z = jax.random.normal(jax.random.key(1), (len(cond.words["text_encoder"]["ids"]), 16, 16, 4))
    return _denoise(sd, z, jnp.full(len(z), 500.0), cond, jnp.int32(i))


@jax.jit
def _denoise(sd, z, t, cond, i):
    return sd.denoise(z, t, cond, i)[0]


def test_several_prompts_at_once_are_a_sum_of_guided_predictions(sd):
    texts, negatives = ["a face AND snow:0.5 AND cat:-0.2", "dog:0.7"], ["red", ""]
    alone = [
        denoised(sd, conditioning.condition(sd, several, grammar="plain")[1])
        for several in (["a face", "dog"], [" snow", "dog"], [" cat", "dog"], negatives)
    ]
    *positives, negative = [np.asarray(x, np.float64) for x in alone]
    shares = np.array([[1, 0.5, -0.2], [0.7, 0, 0]])[..., None, None, None]
    expected = negative + 3 * sum(shares[:, k] * (positive - negative) for k, positive in enumerate(positives))
    made, cond, unwanted = conditioning.condition(sd, texts, negatives)
    ours = denoised(made.add(wrappers=Guidance(3.0, unwanted)), cond)
    assert np.abs(expected - positives[0]).max() > 0.05
    np.testing.assert_allclose(ours, expected, atol=2e-5)


def test_a_schedule_reaches_the_prediction_and_its_negative(sd):
    def guided(text, negative, i):
        made, cond, unwanted = conditioning.condition(sd, [text], [negative], steps=10)
        return denoised(made.add(wrappers=Guidance(3.0, unwanted)), cond, i)

    early, late = (guided("[cat:dog:5]", "[red:blue:5]", i) for i in (0, 9))
    np.testing.assert_allclose(early, guided("cat", "red", 0), atol=1e-5)
    np.testing.assert_allclose(late, guided("dog", "blue", 9), atol=1e-5)
    assert np.abs(early - late).max() > 1e-2


def test_other_prompts_and_schedules_compile_nothing(sd):
    def run(texts, negatives, steps):
        made, cond, unwanted = conditioning.condition(sd, texts, negatives, steps=steps)
        denoised(made.add(wrappers=Guidance(3.0, unwanted)), cond)

    run(["a cat", "a dog"], ["", ""], 20)
    before = conditioning._encoded._cache_size(), _denoise._cache_size()
    run(["(a [cat|dog|face|snow:1.3)", "[a:b:0.5]"], ["[red:blue:3]", "(x:0.2)"], 30)
    run(["[cat|dog|face|snow]", "a"], ["[a|b|c|d|e]", "b"], 1000)
    assert (conditioning._encoded._cache_size(), _denoise._cache_size()) == before
    run(["a cat BREAK b", "a dog"], ["", ""], 20)
    assert conditioning._encoded._cache_size() == before[0] + 1


def test_sizes_tell_which_prompts_are_padded_for_others(sd):
    texts = ["a cat", "a BREAK [b:c BREAK d:0.5]", "a AND b AND c", "a"]
    assert conditioning.sizes(sd, texts, ["", "", "", "a BREAK b"]) == [(1, 1), (3, 1), (1, 3), (2, 1)]
    assert conditioning.sizes(sd, texts, grammar="plain") == [(1, 1)] * 4


def test_words_are_read_anew_for_conditioners_that_change_rows(sd):
    """What an encoder such as E4T's does with the rows of a prompt, weights and chunks included."""
    for weighting in ("a1111", "comfyui"):
        made, cond, _ = conditioning.condition(sd, [TEXT], weighting=weighting)
        rows = {ENCODER: sd.embed(ENCODER, cond.words[ENCODER]["ids"])}
        again = jax.jit(conditioning.reread)(sd, cond.with_unet(context=None), rows)
        np.testing.assert_allclose(again.unet.context, cond.unet.context, atol=1e-5)
        other = jax.jit(conditioning.reread)(sd, cond, {ENCODER: 2 * rows[ENCODER]})
        assert np.abs(np.asarray(other.unet.context - cond.unet.context)).max() > 0.1
    plain = _conditioned(sd, sd.tokenize(["a cat"]))
    again = jax.jit(conditioning.reread)(sd, plain.with_unet(context=None), {})
    np.testing.assert_allclose(again.unet.context, plain.unet.context, atol=1e-5)


def test_words_of_several_vectors_are_used_by_name(sd):
    grown = sd.add_word("<dog>", 3, "dog cat")
    for grammar, text in (("a1111", "a (<dog>:1.2)"), ("comfyui", "a (embedding:<dog>:1.2)")):
        _, cond, _ = conditioning.condition(grown, [text], grammar=grammar)
        assert cond.words[ENCODER]["ids"][0, 2:5].tolist() == grown.words["<dog>"][ENCODER].tolist()
        assert cond.words["text_encoder"]["weights"][0, 0, :7].tolist() == pytest.approx([1, 1, 1.2, 1.2, 1.2, 1, 1])


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        (["a"], {"grammar": "compel"}, "grammar='compel': expected one of plain, a1111, comfyui"),
        (["a"], {"weighting": "compel"}, "weighting='compel': expected one of a1111, comfyui"),
        (["a", "b"], {"negatives": [""]}, "2 prompts, 1 negative prompts"),
        (["a <lora:ink:1>"], {}, "take adapters out with grammars.adapters"),
        (["a AND b"], {}, "need a negative prompt"),
        (["a:1.5"], {}, "need a negative prompt"),
        (["embedding:ink"], {"grammar": "comfyui"}, "embedding:ink is not known; the model has none"),
        (["a"], {"skip": 9}, "skip=9"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(sd, texts, options, message):
    with pytest.raises(ValueError, match=message) as error:
        conditioning.condition(sd, texts, **options)
    assert "\n" not in str(error.value)


def test_a_word_with_too_many_vectors_for_a_chunk(sd):
    grown = sd.add_word("<many>", 15, "dog")
    with pytest.raises(ValueError, match="15 vectors; expected at most 14"):
        conditioning.condition(grown, ["a <many>"])
