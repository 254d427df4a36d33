"""The page of the server, at `/`: it shows and submits; queue, library and worker do the rest.

mount(app, services)            # what sdjax.web.server calls where gradio is installed
"""

import importlib
import os
from typing import Any


def mount(app: Any, services: Any) -> None:
    """Adds the page to a server; Gradio, which takes seconds and would ask other hosts, is imported here."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    importlib.import_module("sdjax.web.page.whole").mount(app, services)
