"""The whole page: its tabs, found by walking the folder tabs/, and its look.

The page loads nothing from another host: the server has its fonts, scripts and styles, and a Content-Security-Policy
enforces it.
"""

import importlib
import os
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import gradio as gr
from fastapi import FastAPI
from gradio.themes import Base

from sdjax.web.page import tabs
from sdjax.web.page.desk import Desk
from sdjax.web.page.policy import Policy
from sdjax.web.services import Services

HERE = Path(__file__).parent
MOST_FILE = "256mb"
CLEANED = (3600, 24 * 3600)  # every so many seconds, remove copies of pictures older than so many seconds


def found() -> list[ModuleType]:
    """Returns the modules of the tabs, in their order."""
    names = [one.name for one in pkgutil.iter_modules(tabs.__path__)]
    return sorted((importlib.import_module(f"{tabs.__name__}.{name}") for name in names), key=lambda tab: tab.ORDER)


def build(services: Services, tell: Callable[[Desk], Any] = lambda _: None) -> gr.Blocks:
    """Returns the page; tell: called with the Desk."""
    desk = Desk(services)
    tell(desk)
    with gr.Blocks(title="sdjax", analytics_enabled=False, fill_width=True, delete_cache=CLEANED) as made:
        desk.seen = gr.State()
        with gr.Tabs(elem_id="tabs", overflow_behavior="wrap") as desk.tabs:
            built = []
            for one in found():
                # A hidden tab that is not rendered would lose the values that draft.py restores.
                with gr.Tab(one.TITLE, id=one.ID, elem_id=f"tab-{one.ID}", render_children=True):
                    built.append(one)
                    one.build(desk)
        for one in built:
            one.wire(desk, made)
        desk.begin(made.load)
    return made


def mount(app: FastAPI, services: Services) -> None:
    """Adds the page to a server."""
    folder = services.place.root / "page"  # uploads of browsers, and copies of the pictures they show
    folder.mkdir(mode=0o700, exist_ok=True)
    os.environ["GRADIO_TEMP_DIR"] = str(folder)
    shown = [str(services.place.root / name) for name in ("pictures", "uploads")]
    more: dict[str, Any] = {"theme": theme(), "css_paths": [HERE / "page.css"], "head_paths": [HERE / "page.html"]}
    app.add_middleware(Policy)  # pyright: ignore[reportArgumentType]
    gr.mount_gradio_app(
        app, build(services), path="/", allowed_paths=shown, run_history=False, footer_links=[], show_error=False,
        max_file_size=MOST_FILE, enable_monitoring=False, favicon_path=str(HERE / "icon.png"), ssr_mode=False, **more,
    )  # fmt: skip


def theme() -> gr.Theme:
    """Returns the look of Gradio's own components; page.css has the rest."""
    fonts = ["ui-sans-serif", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    mono = ["ui-monospace", "SFMono-Regular", "Menlo", "monospace"]
    made = Base(primary_hue="indigo", neutral_hue="slate", radius_size="lg", font=fonts, font_mono=mono)
    return made.set(
        body_background_fill="*neutral_50", body_background_fill_dark="#0d1117",
        background_fill_primary_dark="#161b22", background_fill_secondary_dark="#0d1117",
        block_background_fill_dark="#161b22", input_background_fill_dark="#0d1117", border_color_primary_dark="#2b3240",
        block_border_width="1px", block_label_text_weight="600", block_title_text_weight="600",
        block_shadow="none", button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700", button_primary_text_color="white",
        input_background_fill="white", slider_color="*primary_500", input_border_width="1px",
        input_border_color="#d5dce6", input_border_color_dark="#333c4a", input_border_color_focus="*primary_400",
        block_title_text_color="#0f172a", block_title_text_color_dark="#e6edf3", input_radius="10px",
        block_radius="14px", container_radius="14px", button_large_radius="12px", button_small_radius="9px",
        block_info_text_color="#64748b", block_info_text_color_dark="#94a3b8",
        button_secondary_background_fill="#eef2f7",
        button_secondary_background_fill_dark="#1f2630", button_secondary_text_color="#0f172a",
        button_secondary_text_color_dark="#e6edf3", input_padding="9px 12px",
    )  # fmt: skip
