"""The locked set is the tested set, each file with a hash."""

import re

from lock import LEFT_OUT, ROOT


def packages(name):
    lines = (ROOT / name).read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def plain(line):
    name, _, version = line.partition("==")
    return re.sub("[-_.]+", "-", name).lower(), version


def test_the_lock_holds_the_constraints():
    wanted = dict(map(plain, packages("constraints.txt")))
    for name in LEFT_OUT:
        wanted.pop(name)
    found = [line.split(" --hash=sha256:") for line in packages("constraints.lock")]
    assert dict(plain(one) for one, _ in found) == wanted
    assert all(re.fullmatch("[0-9a-f]{64}", hashed) for _, hashed in found)
