"""The tokenizer gives the ids of transformers' CLIP tokenizer, placeholder words included, and writes what it reads."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import transformers

from sdjax.text.tokenizer import BOS, EOS, Tokenizer, byte_vocabulary, train_vocabulary

SENTENCES = [
    "a photo of a woman on the beach with red hair",
    "The snowy city at night, neon style: it's 2024!",
    "a pencil sketch of a man with a hat and glasses",
]
STRINGS = [
    "",
    "a photo",
    "A  Photo\n of\tIT'S  a HAT!!",
    "naïve café Ångström é e\u0301",
    "日本語 text 🙂🙂 emoji",
    "<|startoftext|>hi<|endoftext|> there <|ENDOFTEXT|>",
    "12345 3.14 don't we'll I'd you're I've I'm",
    "word " * 50,
    "\u00a0nbsp\u2003em \u200bzero",
    "ﬁ ligature İstanbul ẞ",
    "¡hola! ¿qué? a_b-c/d\\e",
    " lead trail ",
    "\x01control",
    "hello!</w> wow!",
]
WORDS = ["a photo of <me>", "<ME>s and x<me>y", "<me>_1 <me>", "<one> <me> <one>", "<me", "<me>"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(SENTENCES, 600)


def reference(folder, length=32):
    theirs = transformers.CLIPTokenizer.from_pretrained(folder)
    return lambda texts: np.array(theirs(texts, padding="max_length", truncation=True, max_length=length).input_ids)


def test_ids_are_those_of_transformers(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    np.testing.assert_array_equal(tokenizer(STRINGS), reference(tmp_path)(STRINGS))


def test_placeholder_words_are_those_of_transformers(tokenizer, tmp_path):
    words = tokenizer.add("<Me>").add("<one>")
    words.save(tmp_path)
    np.testing.assert_array_equal(words(STRINGS + WORDS), reference(tmp_path)(STRINGS + WORDS))
    assert words.words == {"<me>": (tokenizer.size,), "<one>": (tokenizer.size + 1,)}


def test_a_word_of_several_vectors_is_what_the_diffusers_pipeline_makes_of_it(tokenizer, tmp_path):
    from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin

    words = tokenizer.add("<me>", 3).add("<one>")
    words.save(tmp_path)
    theirs = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    prompts = ["a photo of <me>, sketched", "<one> and <me>"]
    expanded = TextualInversionLoaderMixin().maybe_convert_prompt(prompts, theirs)
    np.testing.assert_array_equal(words(prompts), reference(tmp_path)(expanded))
    assert words.ids("<me>") == list(range(tokenizer.size, tokenizer.size + 3))


def test_longest_placeholder_word_wins(tokenizer):
    words = tokenizer.add("zq").add("zqx")
    assert words.ids("zqx") == [tokenizer.size + 1] and words.ids("zq") == [tokenizer.size]


@pytest.mark.parametrize("layout", ["files", "tokenizer.json", "special_tokens_map", "added_tokens"])
def test_every_layout_loads_as_in_transformers(tokenizer, tmp_path, layout):
    words = tokenizer.add("<me>", 2).add("<one>")
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    words.save(first)
    if layout == "tokenizer.json":
        transformers.CLIPTokenizer.from_pretrained(first).save_pretrained(second)
        assert not (second / "vocab.json").exists()
    else:
        words.save(second)
    if layout in ("special_tokens_map", "added_tokens"):
        settings = {"model_max_length": 32}
        special = {
            "bos_token": {"content": BOS, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False},
            "eos_token": EOS,
            "pad_token": "!",
        }
        (second / "tokenizer_config.json").write_text(json.dumps(settings))
        (second / "special_tokens_map.json").write_text(json.dumps(special))
    if layout == "added_tokens":
        ids = {"<me>": words.size - 3, "<me>_1": words.size - 2, "<one>": words.size - 1}
        (second / "added_tokens.json").write_text(json.dumps(ids))
    loaded = Tokenizer.load(second)
    np.testing.assert_array_equal(
        loaded(STRINGS + WORDS[3:]), _expanded(reference(second), loaded, STRINGS + WORDS[3:])
    )
    assert loaded.words == ({} if layout == "special_tokens_map" else words.words)
    assert loaded.length == 32


def _expanded(theirs, loaded, texts):
    return theirs([text.replace("<me>", "<me> <me>_1") if loaded.words else text for text in texts])


def test_saved_again_is_the_same_file(tokenizer, tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    first.mkdir(), second.mkdir()
    tokenizer.add("<me>", 2).save(first)
    Tokenizer.load(first).save(second)
    for path in sorted(first.iterdir()):
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_other_padding_and_scattered_ids(tmp_path):
    """SD 2 pads with id 0; random models have the begin and end of the real vocabulary without the words between."""
    tokenizer = Tokenizer.of(*byte_vocabulary(49408), length=77, pad="!")
    tokenizer = tokenizer.add("<me>", 2)
    tokenizer.save(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.size) == (49406, 49407, 0, 49410)
    np.testing.assert_array_equal(tokenizer(STRINGS), reference(tmp_path, 77)(STRINGS))
    assert Tokenizer.load(tmp_path).words == {"<me>": (49408, 49409)}


def test_trained_vocabulary_is_the_same_in_every_process(tokenizer):
    program = f"from sdjax.text.tokenizer import *; print(train_vocabulary({SENTENCES!r}, 600))"
    runs = {
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        for _ in range(4)
    }
    assert runs == {f"{train_vocabulary(SENTENCES, 600)}\n"}
    assert tokenizer.ids("photo") == [tokenizer.vocabulary["photo</w>"]]
    assert list(tokenizer.vocabulary.values()) == list(range(len(tokenizer.vocabulary)))


def test_words_that_collide_are_refused(tokenizer):
    words = tokenizer.add("<me>", 2)
    assert words.add("<ME>", 2) is words
    for word, vectors in [("photo", 1), ("<me>", 1), ("<me>_1", 1), ("", 1), ("two words", 1), ("<x>", 0)]:
        with pytest.raises(ValueError, match="word|vectors") as error:
            words.add(word, vectors)
        assert "\n" not in str(error.value)


def test_a_word_that_is_called_like_anothers_vector_is_a_word_of_its_own(tokenizer, tmp_path):
    words = tokenizer.add("<ink>").add("<ink>_1").add("<two>", 2)
    first = tokenizer.size
    wanted = {"<ink>": (first,), "<ink>_1": (first + 1,), "<two>": (first + 2, first + 3)}
    assert words.words == wanted and words.ids("<ink>_1") == [first + 1]
    words.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.words == wanted and again == words
    place = tmp_path / "tokenizer_config.json"
    config = json.loads(place.read_text())
    for counts in ({"<ink>": 3}, {"<ink>": 0}, {"<ink>": True}, {"<ink>": 10**12}, {"<no>": 1}, [1]):
        place.write_text(json.dumps({**config, "placeholder_vectors": counts}))
        with pytest.raises(ValueError, match="tokenizer_config.json: placeholder_vectors: .* is expected") as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value)
    del config["placeholder_vectors"]  # as others write it: names and ids tell
    place.write_text(json.dumps(config))
    assert list(Tokenizer.load(tmp_path).words) == ["<ink>", "<two>"]


def test_words_in_the_place_of_tokens(tokenizer, tmp_path):
    """As in A1111: where a word's tokens follow each other, whatever their case; longer words first."""
    plain = tokenizer.ids("a photo of two cats, photographs")
    words = tokenizer.add("photo", 2, place=True).add("Two  words", 1, place=True).add("two", 1, place=True)
    assert list(words.words) == ["photo", "two words", "two"] and words.knows("TWO words") and not words.knows("words")
    photo, both, two = words.words.values()
    assert [*photo, *both, *two] == list(range(tokenizer.size, tokenizer.size + 4))
    at = plain.index(tokenizer.vocabulary["photo</w>"])
    of = tokenizer.ids("of")
    assert words.ids("a Photo of two cats, photographs") == [
        *plain[:at], *photo, *of, *two, *plain[at + 1 + len(of) + len(tokenizer.ids("two")) :],
    ]  # fmt: skip
    assert words.ids("network") == tokenizer.ids("network")
    assert words.ids("two  words, two") == [*both, *tokenizer.ids(","), *two]
    assert words.ids("a photo of words", placed=False) == tokenizer.ids("a photo of words")
    assert words(["photo"])[0, :4].tolist() == [words.bos, *photo, words.eos]
    assert words.add("photo", 2, place=True) is words
    for word, vectors in (("photo", 1), ("two words", 2)):
        with pytest.raises(ValueError, match="is one token already|is known with"):
            words.add(word, vectors, place=True)
    with pytest.raises(ValueError, match="word='photo': stands in the place of tokens; attach it as another to save"):
        words.save(tmp_path)


def test_bad_folders_are_refused_by_name(tokenizer, tmp_path):
    with pytest.raises(ValueError, match="vocab.json: no such file"):
        Tokenizer.load(tmp_path)
    tokenizer.save(tmp_path)
    for name, content in [
        ("vocab.json", '{"a": 1'),
        ("merges.txt", "#version: 0.2\nzz yy"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", json.dumps({"added_tokens_decoder": {"9999": {"content": "<me>"}}})),
    ]:
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError) as error:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value), error.value
        (tmp_path / name).write_bytes(before)
    with pytest.raises(ValueError, match="size=100"):
        train_vocabulary([], 100)


def test_importing_is_quick():
    """No heavy package comes with the module: transformers alone takes longer than `import sdjax` may."""
    program = (
        "import sys, sdjax.text.tokenizer as t; print([m for m in ('transformers', 'tokenizers') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"


def test_equal_are_those_of_the_same_content(tokenizer):
    again, other = Tokenizer.train(SENTENCES, 600), Tokenizer.train(SENTENCES[:2], 600)
    assert tokenizer == again and hash(tokenizer) == hash(again)
    for different in (other, tokenizer.add("<me>"), dataclasses.replace(tokenizer, length=9), "tokenizer"):
        assert tokenizer != different
    assert tokenizer.add("<me>") == again.add("<me>") != tokenizer.add("<me>", 2)
