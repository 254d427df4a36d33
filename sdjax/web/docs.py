"""/docs: the server's endpoints on one plain page without external files; /openapi.json for programs."""

import json
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222;background:#fff}
summary{cursor:pointer;padding:.3rem 0}code{background:#eee;padding:0 .2rem}pre{background:#f4f4f4;padding:.6rem;
overflow:auto;max-height:30rem}.m{display:inline-block;min-width:4.5rem;font-weight:600}h2{margin-top:2rem}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}code,pre{background:#2a2a2a}}
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


def add(app: FastAPI) -> None:
    """Adds the page for the endpoints that an app has so far."""

    @app.get("/docs", include_in_schema=False)
    def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()), headers={"Content-Security-Policy": POLICY})


def page(api: dict[str, Any]) -> str:
    """Returns the HTML page of an OpenAPI description."""
    groups: dict[str, list[str]] = {}
    for path, methods in api["paths"].items():
        for method, about in methods.items():
            groups.setdefault((about.get("tags") or ["more"])[0], []).append(_endpoint(path, method, about))
    body = "".join(f"<h2>{escape(name)}</h2>{''.join(items)}" for name, items in groups.items())
    head = f"<title>{escape(api['info']['title'])}</title><meta charset=utf-8><style>{STYLE}</style>"
    about = "<p>The same for programs: <a href=/openapi.json><code>/openapi.json</code></a></p>"
    return f"<!doctype html><html lang=en><head>{head}</head><body><h1>API</h1>{about}{body}</body></html>"


def _endpoint(path: str, method: str, about: dict[str, Any]) -> str:
    said = about.get("description") or about.get("summary") or ""
    parts = [f"<p>{escape(said)}</p>"]
    for one in about.get("parameters", []):
        parts.append(f"<p><code>{escape(one['name'])}</code> in the {escape(one['in'])}</p>")
    for kind, content in about.get("requestBody", {}).get("content", {}).items():
        parts.append(f"<p>{escape(kind)}</p><pre>{escape(json.dumps(content.get('schema', {}), indent=1))}</pre>")
    head = f"<span class=m>{escape(method.upper())}</span><code>{escape(path)}</code>"
    return f"<details><summary>{head}</summary>{''.join(parts)}</details>"
