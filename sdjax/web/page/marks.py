"""Builds HTML and always escapes text from outside.

    marks.tag("p", prompt, cls="prompt")                # Markup: <p class="prompt">&lt;b&gt;a cat&lt;/b&gt;</p>
    marks.button("Stop", do="stop", job=7)              # CLICKS reports a click on it, with its data

Markup is markupsafe's: it escapes a str on insertion, but not Markup.
"""

from typing import Any

import gradio as gr
from markupsafe import Markup, escape

VOID = ("img", "input", "br")
# Runs in the browser once per gr.HTML: a click on an element with data-do triggers the component's event "act", or
# "send" if the element has data-to; one on an element with data-do="copy" copies its data-text.
CLICKS = """
element.addEventListener('click', event => {
    const found = event.target.closest('[data-do]');
    if (!found || found.disabled) return;
    event.preventDefault();
    if (found.dataset.do === 'copy') {
        if (navigator.clipboard) navigator.clipboard.writeText(found.dataset.text);
        return;
    }
    if (found.dataset.to) trigger('send', {...found.dataset});
    else trigger('act', {...found.dataset});
});
element.addEventListener('change', event => {
    const found = event.target.closest('[data-change]');
    if (found) trigger('act', {...found.dataset, do: found.dataset.change, value: found.value});
});
element.addEventListener('keydown', event => {
    if (event.target.matches('[data-do]:not(button)') && (event.key === 'Enter' || event.key === ' ')) {
        event.preventDefault();
        event.target.click();
    }
});
"""


def area(value: Any = None, elem_id: str | None = None) -> Any:
    """Returns a component that shows Markup; clicks on its buttons trigger its events act and send."""
    return gr.HTML(value, elem_id=elem_id, js_on_load=CLICKS, apply_default_css=False, elem_classes="drawn")


def tag(name: str, *inside: Any, cls: str = "", data: dict[str, Any] | None = None, **attributes: Any) -> Markup:
    """Returns an element; inside: texts and Markup, without None.  data: data-NAME attributes.

    Leaves out attributes that are None or False; writes True without a value; writes _ in names as -.
    """
    named = {**({"class": cls} if cls else {}), **attributes}
    named |= {f"data-{key}": value for key, value in (data or {}).items()}
    said = Markup("").join(
        Markup(" {}").format(key.rstrip("_").replace("_", "-"))
        if value is True
        else Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value)
        for key, value in named.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Markup("<{}{}>").format(name, said)
    return Markup("<{}{}>{}</{}>").format(name, said, join(inside), name)


def join(parts: Any) -> Markup:
    """Returns texts and Markup joined, without None."""
    return Markup("").join(escape(part) for part in parts if part is not None)


def button(label: Any, do: str, cls: str = "", title: str = "", disabled: bool = False, **data: Any) -> Markup:
    """Returns a button whose click triggers the event "act" with do and data."""
    return tag("button", label, cls=f"act {cls}".strip(), type="button", title=title or None, disabled=disabled,
               data={"do": do, **data})  # fmt: skip


def empty(title: str, text: str) -> Markup:
    """Returns a placeholder for an empty list: a title and what to do."""
    return tag("div", tag("strong", title), tag("p", text), cls="empty")


def problem(text: str) -> Markup:
    """Returns an error message; "" for none."""
    return tag("p", text, cls="problem", role="alert") if text else Markup("")


def said(text: str) -> Markup:
    """Returns a line that reports success."""
    return tag("p", text, cls="said", role="status")


def bar(share: float, label: str) -> Markup:
    """Returns a progress bar; share: 0 to 1, negative if unknown."""
    known = share >= 0
    inner = tag("i", style=f"width:{100 * share:.1f}%" if known else None)
    now = f"{100 * share:.0f}" if known else None
    return tag("div", inner, cls="bar" if known else "bar unknown", role="progressbar", aria_label=label,
               aria_valuenow=now, aria_valuemin="0", aria_valuemax="100")  # fmt: skip
