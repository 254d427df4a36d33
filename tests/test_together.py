"""Two, three and eight processes at once on one folder: one works, the others are refused or share it."""

import pytest
from faults import kills, works

pytestmark = pytest.mark.slow
HAS = "has it"


def all_at_once(work, count):
    """Returns [(status, its lines)] of programs that are started at once on one folder."""
    started = []
    for i in range(count):
        work.said = work.place / f"said-{i}.txt"
        started.append((work.start(), work.said))
    return [(process.wait(), said.read_text()) for process, said in started]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Returns what a program ends with that is alone."""
    out = tmp_path_factory.mktemp("alone")
    (out / "outside").mkdir()
    return lambda kind: (kills.whole(kind, out), out / "outside")


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("kind", [works.Run, works.Pictures, works.Classes], ids=lambda kind: kind.__name__)
def test_one_works_and_the_others_are_refused(kind, count, alone, tmp_path):
    wanted, outside = alone(kind)
    work = kind(outside, tmp_path / "folder")
    found = all_at_once(work, count)
    refused = [said for status, said in found if status]
    assert any(status == 0 for status, _ in found) and all(status in (0, 1, 2) for status, _ in found)
    assert refused, "they did not meet"
    for said in refused:
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and HAS in lines[0] and "Traceback" not in said, said
    assert work.result() == wanted


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize(
    "kind", [works.Cache, works.Conversion, works.SingleFile], ids=lambda kind: kind.__name__
)  # fmt: skip
def test_all_work_and_the_result_is_whole(kind, count, alone, tmp_path):
    """A cache is shared, record by record; of conversions to one place each is whole, and the later one stays."""
    wanted, outside = alone(kind)
    work = kind(outside, tmp_path / "folder")
    found = all_at_once(work, count)
    assert [status for status, _ in found] == [0] * count, found
    assert work.result() == wanted and not list(work.place.rglob("*saving-*"))
