"""The training program, which also draws class pictures before a run that asks for them.

main(["dreambooth", "data.path=photos/dog", "class_data.draw=true"])
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdjax.training import program


def main(arguments: Sequence[str], prog: str = "sdjax train") -> int:
    """Runs one recipe, see program.main; returns the exit status."""
    return program.main(arguments, prog, prepared)


def prepared(settings: Any, out: Path) -> Any:
    """Returns the settings of a run in the folder `out`, after drawing the class pictures that it asks for."""
    if not settings.class_data.draw:
        return settings
    from sdjax.service import class_images  # only here: it loads what draws pictures

    return class_images.drawn(settings, out)
