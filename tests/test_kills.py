"""What kills programs again and again finds what is lost, made twice or other; and real programs lose nothing.

`make kills` does 60 and `make kills ARGS="--kills 150"` 150, over training, lists, class pictures, caches, conversions.
A short form of one kill is quick: test_buckets.py (buckets, shuffled captions, cache) and test_classes.py (class rows).
"""

import json

import pytest
from faults import kills, works

COUNT = 12
PROGRAM = """
import os, pathlib, random, sys, time
place, fault = pathlib.Path(sys.argv[1]), sys.argv[2]
done = sorted(place.glob("*.txt"))
if fault == "loses" and done:
    done[0].unlink()
for i in range({count}):
    path = place / f"{{i}}.txt"
    if path.exists() and fault != "makes twice" or fault == "loses" and done and i == 0:
        continue
    new = place / f".{{i}}.saving-x"
    new.write_text(str(random.random() if fault == "other bits" else i))
    time.sleep(0.02)
    if fault == "leaves":
        (place / f".{{i}}.saving-y").write_text("")
    new.replace(path)
sys.exit(7 if fault == "fails" and done else 0)
"""


def fake(fault):
    class Fake(works.Work):
        def line(self):
            self.files.mkdir(exist_ok=True)
            return ["-c", PROGRAM.format(count=COUNT), str(self.files), fault if "struck" in str(self.place) else ""]

        @property
        def files(self):
            return self.place / "files"

        def done(self):
            return {path.name: works._identity(path) for path in self.files.glob("*.txt")}

        def result(self):
            assert len(self.done()) == COUNT
            return {path.name: path.read_bytes() for path in self.files.glob("*.txt")}

    return Fake


@pytest.mark.parametrize(
    ("fault", "found"),
    [("", None), ("loses", "lost"), ("makes twice", "twice"), ("other bits", "other bits"), ("leaves", "else"),
     ("fails", "else")],
)  # fmt: skip
def test_what_is_wrong_is_found(fault, found, tmp_path):
    state = {}
    for seed in (1, 2):  # a kill may miss
        (tmp_path / "outside").mkdir(exist_ok=True)
        kills.run(fake(fault), 2 * seed, tmp_path, [["KILL"]], seed, state, lambda: None)
        state["Fake"].pop("over", None)
    mine = state["Fake"]
    assert mine["kills"] >= 2 and mine["rounds"] + len(mine["wrong"]) >= 1
    assert {kind for kind, _ in mine["wrong"]} & {found} if found else mine["wrong"] == [], mine["wrong"]
    assert len(kills.table(state)) == 3


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch, capsys):
    kind = fake("")
    monkeypatch.setattr(kills, "WORKS", {kind: 30})
    assert kills.main(["--kills", "2", "--out", str(tmp_path)]) == 0
    state = tmp_path / "1-KILL" / "state.json"
    first = json.loads(state.read_text())["Fake"]
    assert kills.main(["--kills", "2", "--out", str(tmp_path)]) == 0
    assert json.loads(state.read_text())["Fake"] == first
    assert kills.main(["--kills", "3", "--out", str(tmp_path)]) == 0
    assert json.loads(state.read_text())["Fake"]["kills"] == 3 > first["kills"]
    assert "Fake" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", [kind.__name__ for kind in works.WORKS])
def test_killed_programs_end_in_the_same_bits(name, tmp_path):
    assert kills.main(["--kills", "4", "--only", name, "--out", str(tmp_path)]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Run", "Pictures", "Classes", "Conversion"])
def test_programs_that_are_asked_to_end(name, tmp_path):
    """SIGTERM and Ctrl-C, once and twice."""
    ways = ["--ways", "TERM", "TERM,TERM", "INT", "INT,INT"]
    assert kills.main(["--kills", "6", "--only", name, "--out", str(tmp_path), *ways]) == 0
