"""The server's page at `/`: shows and submits jobs; queue, library and worker do the rest.

mount(app, services)            # sdjax.web.server calls it if gradio is installed
"""

import importlib
import os
from typing import Any


def mount(app: Any, services: Any) -> None:
    """Adds the page to a server; imports Gradio only here, because that takes seconds and contacts other hosts."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    importlib.import_module("sdjax.web.page.whole").mount(app, services)
