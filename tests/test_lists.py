"""Lists of pictures to make: what rows mean, what combinations they become, and what is wrong with bad ones."""

import json

import numpy as np
import pytest

from sdjax.sampling.settings import ImageToImage, TextToImage
from sdjax.service import lists
from sdjax.service.request import Request, grouped, taken_apart


def write(folder, rows, name="jobs.jsonl"):
    path = folder / name
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_rows_become_pictures_with_defaults(tmp_path):
    rows = [{"prompt": "a fox", "seed": 7, "churn_high": float("inf")}, {"prompt": "an owl", "steps": 9, "name": "owl"}]
    path = write(tmp_path, rows)
    pictures, errors = lists.read(path, {"steps": 20})
    assert errors == []
    here = tmp_path.resolve()
    assert pictures == [
        Request(TextToImage(prompt="a fox", seed=7, churn_high=float("inf"), steps=20), here, "000001", 1),
        Request(TextToImage(prompt="an owl", steps=9, seed=2), here, "owl", 2),
    ]


def test_lists_are_a_matrix_first_field_slowest(tmp_path):
    path = write(tmp_path, [{"prompt": ["a", "b"], "seed": "3-5", "guidance": "2|7.5"}])
    pictures, _ = lists.read(path)
    assert len(pictures) == 12
    assert [p.name for p in pictures][:2] == ["000001-00000", "000001-00001"]
    assert pictures[1].settings == TextToImage(prompt="a", seed=3, guidance=7.5)
    assert pictures[-1].settings == TextToImage(prompt="b", seed=5, guidance=7.5)


def test_csv_reads_the_same(tmp_path):
    path = write(tmp_path, ["prompt,seed,size,guidance", '"a fox, red",0-1,512x768,', "b,4,64|96,3"], "jobs.csv")
    pictures, errors = lists.read(path)
    assert errors == []
    assert [p.settings for p in pictures] == [
        TextToImage(prompt="a fox, red", seed=0, size=(768, 512)),
        TextToImage(prompt="a fox, red", seed=1, size=(768, 512)),
        TextToImage(prompt="b", seed=4, size=64, guidance=3.0),
        TextToImage(prompt="b", seed=4, size=96, guidance=3.0),
    ]


def test_parquet_reads_the_same(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"prompt": ["a", "b"], "seed": [1, None]})
    parquet.write_table(table, tmp_path / "jobs.parquet")
    pictures, errors = lists.read(tmp_path / "jobs.parquet")
    assert [p.settings for p in pictures] == [TextToImage(prompt="a", seed=1), TextToImage(prompt="b", seed=2)]
    assert errors == []


def test_a_cell_of_parquet_that_is_no_text_is_one_row(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bytes_, ends = b"a\xffb", np.array([0, 1, 2, 3], np.int32)
    texts = pyarrow.StringArray.from_buffers(3, pyarrow.py_buffer(ends), pyarrow.py_buffer(bytes_))
    parquet.write_table(pyarrow.table({"prompt": texts}), tmp_path / "jobs.parquet")
    pictures, errors = lists.read(tmp_path / "jobs.parquet")
    assert [p.settings.prompt for p in pictures] == ["a", "b"]
    assert [error["row"] for error in errors] == [2] and "utf-8" in errors[0]["error"]


@pytest.mark.parametrize(
    "row, said",
    [
        ({"seed": 1}, "prompt: missing; expected a text"),
        ({"prompt": "a", "colour": "red"}, "colour: no such field; expected one of prompt, "),
        ({"prompt": "a", "seed": "x"}, "seed='x': expected a whole number"),
        ({"prompt": "a", "seed": 1.5}, "seed=1.5: expected a whole number"),
        ({"prompt": "a", "steps": True}, "steps=True: expected a whole number, 1 or more"),
        ({"prompt": "a", "guidance": []}, r"guidance=\[\]: expected at least one value"),
        ({"prompt": 3}, "prompt=3: expected a text"),
        ({"prompt": "a", "size": "big"}, "size='big': expected pixels, or WIDTHxHEIGHT"),
        ({"prompt": "a", "name": "../a"}, "name='../a': expected letters"),
        ({"prompt": "a", "name": "/etc/a"}, "name='/etc/a': expected letters"),
        ({"prompt": "a", "seed": "0-99999999"}, "seed='0-99999999': expected at most 100000 numbers"),
        ({"prompt": ["a"] * 400, "seed": "0-400"}, "160400 pictures in one row; expected 1 to 100000"),
        ("{broken", "'{broken': "),
        ("[1]", r"'\[1\]': expected an object"),
        ({"prompt": "a", "seed": float("inf")}, "seed=inf: expected a whole number"),
        ({"prompt": "a", "guidance": float("nan")}, "guidance=nan: expected a finite number"),
        ({"prompt": "a", "seed": 10**400}, r"seed=10+\.\.\.0+: expected a whole number"),
        ({"prompt": "a", "guidance": 10**400}, r"guidance=10+\.\.\.0+: expected a finite number"),
        ('{"prompt": "a", "seed": ' + "9" * 5000 + "}", "a number has too many digits"),
        ({"prompt": "a", "seed": "9" * 5000}, r"seed='9+\.\.\.9+.: expected a whole number"),
        ("[" * 100_000, "nested too deep"),
        ({"prompt": "a", "name": "ä" * 101}, "name='ä+...ä+.: expected at most 200 bytes"),
        ({"prompt": "a", "strength": 0.5}, "strength=0.5: expected together with image"),
        ({"prompt": "a", "mask": "m.png"}, "mask='m.png': expected together with image"),
        ({"prompt": "a", "image": "a.png", "margin": 4}, "margin=4: expected together with mask"),
        ({"prompt": "a", "variation": 2}, "variation=2: expected 0 to 1"),
        (
            {"prompt": "a", "adapter": "ink:0.8"},
            "adapter='ink:0.8': expected <hypernet:name:strength>",
        ),
        ({"prompt": "a", "negative": "red"}, "negative: is called otherwise now; expected negative_prompt"),
        ({"prompt": "a", "skip": 1}, "skip: is called otherwise now; expected clip_skip, which is 1 more"),
        ({"prompt": "a", "adapters": "<lora:a>"}, "adapters: is called otherwise now; expected adapter"),
        ({"prompt": "a", "model": "/etc"}, "model: is not for rows; expected --model of the command line"),
        ({"prompt": "a", "task": "dance"}, "task='dance': expected one of text2img, img2img"),
        ({"prompt": "a", "task": "upscale"}, "image: missing; expected a text"),
    ],
)
def test_bad_rows_are_named_and_the_others_stay(tmp_path, row, said):
    pictures, errors = lists.read(write(tmp_path, [{"prompt": "first"}, row, {"prompt": "last"}]))
    assert [p.settings.prompt for p in pictures] == ["first", "last"]
    assert [error["row"] for error in errors] == [2]
    with pytest.raises(ValueError, match=said):
        raise ValueError(errors[0]["error"])


def test_lines_end_at_line_feeds_alone_and_bytes_that_are_no_text_are_one_row(tmp_path):
    rows = [b'{"prompt": "a"}', b'{"prompt": "\xff"}', json.dumps({"prompt": "b\u2028c"}, ensure_ascii=False).encode()]
    (tmp_path / "jobs.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(rows))
    pictures, errors = lists.read(tmp_path / "jobs.jsonl")
    assert [p.settings.prompt for p in pictures] == ["a", "b\u2028c"]
    assert [error["row"] for error in errors] == [2] and "byte 13 is not UTF-8" in errors[0]["error"]


def test_bad_cells_are_one_row(tmp_path):
    rows = [b"prompt,seed", b"a,1", b"\xff,2", b"x" * 140_000 + b",3", b"b,4"]
    (tmp_path / "jobs.csv").write_bytes(b"\n".join(rows))
    pictures, errors = lists.read(tmp_path / "jobs.csv")
    assert [(p.settings.prompt, p.settings.seed) for p in pictures] == [("a", 1), ("b", 4)]
    assert [error["row"] for error in errors] == [2, 3]
    assert errors[0]["error"] == "line 3: not UTF-8" and "field limit" in errors[1]["error"]


def test_defaults_are_for_rows_that_can_use_them(tmp_path):
    path = write(tmp_path, ["prompt,image,steps,strength", "a,,,", "b,b.png,7,", "c,c.png,,0.2"], "jobs.csv")
    pictures, errors = lists.read(path, {"steps": "5", "strength": "0.5", "feather": "2"})
    assert errors == []
    assert [p.settings for p in pictures] == [
        TextToImage(prompt="a", steps=5, seed=1),
        ImageToImage(prompt="b", image="b.png", steps=7, strength=0.5, seed=2),
        ImageToImage(prompt="c", image="c.png", steps=5, strength=0.2, seed=3),
    ]
    with pytest.raises(ValueError, match="colour: no such field"):
        lists.read(path, {"colour": "red"})


def test_adapters_come_from_prompt_and_field(tmp_path):
    row = {"prompt": "a <lora:ink>", "adapter": ["", "<lora:oil:0.5>"]}
    for grammar, text, own in (("plain", "a <lora:ink>", []), ("a1111", "a ", ["ink"])):
        pictures, _ = lists.read(write(tmp_path, [{**row, "grammar": grammar}]))
        found = [taken_apart(picture.settings) for picture in pictures]
        assert [text for text, _ in found] == [text, text]
        assert [[adapter.name for adapter in wanted] for _, wanted in found] == [own, [*own, "oil"]]
        assert [len(group) for group in grouped(pictures)] == [1, 1]


def test_a_name_is_taken_once(tmp_path):
    _, errors = lists.read(write(tmp_path, [{"prompt": "a", "name": "x"}, {"prompt": "b", "name": "x"}]))
    assert errors == [{"row": 2, "error": "name='x': another picture has this name"}]


def test_groups_share_all_but_words_seeds_and_files(tmp_path):
    rows = [
        {"prompt": "a", "seed": 1, "steps": 5},
        {"prompt": "b", "seed": 2, "steps": 9},
        {"prompt": "c", "seed": 3, "steps": 5, "negative_prompt": "grey"},
        {"prompt": "d", "steps": 5, "image": "d.png"},
    ]
    pictures, _ = lists.read(write(tmp_path, rows))
    assert [[p.row for p in group] for group in grouped(pictures)] == [[1, 3], [2], [4]]
    parted = [[p.row for p in group] for group in grouped(pictures, lambda p: p.row == 3)]
    assert parted == [[1], [2], [3], [4]]


@pytest.mark.parametrize("name", ["jobs.txt", "missing.jsonl"])
def test_files_that_are_none(tmp_path, name):
    (tmp_path / "jobs.txt").write_text("a")
    with pytest.raises(ValueError, match="expected a file ending in|no such file"):
        lists.read(tmp_path / name)


def test_a1111s_names_of_samplers_are_understood(tmp_path):
    rows = [{"prompt": "a", "sampler": ["Euler a", "DPM++ 2M Karras"]}]
    rows += [{"prompt": "a", "sampler": "DPM++ 2M Karras", "schedule": "simple"}]
    pictures, errors = lists.read(write(tmp_path, rows))
    found = [(p.settings.sampler, p.settings.schedule) for p in pictures]
    assert found == [("euler_a", "normal"), ("dpmpp_2m", "karras"), ("dpmpp_2m", "simple")] and not errors


def test_a_seed_of_minus_one_is_drawn(tmp_path):
    rows = [
        {"prompt": "a", "seed": -1},
        {"prompt": "a", "seed": [-1, 5, "-1"], "guidance": [2, 3], "variation_seed": -1},
    ]
    rows += [{"prompt": "b"}, {"prompt": "b", "seed": "-1|7"}]
    path = write(tmp_path, rows)
    drawn = [[p.settings.seed for p in lists.read(path, {"seed": -1})[0]] for _ in range(2)]
    for seeds in drawn:
        assert all(0 <= seed < 1 << 32 for seed in seeds) and len(seeds) == 10
        assert seeds[1] == seeds[2] and seeds[3:5] == [5, 5] and seeds[5] == seeds[6] and seeds[9] == 7
        assert len(set(seeds)) == 7  # rows and places have their own
    assert not set(drawn[0]) & set(drawn[1]) - {5, 7}
    pictures, _ = lists.read(path, None, lambda: "a word")
    assert pictures == lists.read(path, None, lambda: "a word")[0]
    assert 0 <= pictures[1].settings.variation_seed != pictures[1].settings.seed
