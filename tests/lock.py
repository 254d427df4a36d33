"""Writes constraints.lock: the packages of constraints.txt with the hashes of the files that pip takes here.

    python tests/lock.py            # anew, from a report of pip's, which installs nothing

`make audit` asks pip whether an index still gives these files.  torch is left out: each kind of accelerator has a file
of its own.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = ("torch",)
PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet"]


def lines(report: dict) -> list[str]:
    """Returns "name==version --hash=sha256:..." of each package of a report, sorted."""
    found = []
    for item in report["install"]:
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        if name not in LEFT_OUT:
            found.append(f"{name}=={version} --hash=sha256:{item['download_info']['archive_info']['hashes']['sha256']}")
    return sorted(found, key=str.lower)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        subprocess.run([*PIP, "--report", str(report), "-r", str(ROOT / "constraints.txt")], check=True)
        made = lines(json.loads(report.read_text()))
    head = "# Written by tests/lock.py for `make audit`: the files of constraints.txt on Linux, x86_64, Python 3.11."
    (ROOT / "constraints.lock").write_text("\n".join([head, *made]) + "\n")


if __name__ == "__main__":
    main()
