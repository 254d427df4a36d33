"""Keeps typed values in the browser, so that a reload or a closed tab loses nothing."""

import json
from collections.abc import Sequence
from typing import Any

import gradio as gr

from sdjax.web.page.desk import QUIET

KEY = "sdjax.draft"


def keep(components: Sequence[Any], opened: Any, part: str = "pictures") -> None:
    """Stores the values of components in the browser and restores them after `opened`; part: of the page."""
    key, ready = f"{KEY}.{part}", f"sdjax_{part}"
    names = json.dumps([getattr(one, "elem_id", None) or str(i) for i, one in enumerate(components)])
    save = f"""(...values) => {{
        const names = {names};
        if (window.{ready}) localStorage.setItem('{key}', JSON.stringify(
            Object.fromEntries(names.map((name, i) => [name, values[i]]))));
    }}"""
    show = f"""() => {{
        const names = {names};
        let kept = {{}};
        try {{ kept = JSON.parse(localStorage.getItem('{key}')) || {{}}; }} catch (error) {{ }}
        window.{ready} = true;
        return names.map(name => ({{__type__: 'update', ...(name in kept ? {{value: kept[name]}} : {{}})}}));
    }}"""
    gr.on([one.change for one in components], None, list(components), None, js=save, **QUIET)
    opened.then(None, None, list(components), js=show, **QUIET)
