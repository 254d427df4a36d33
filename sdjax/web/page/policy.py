"""The page's Content-Security-Policy: the browser loads nothing from another host, whatever the page contains."""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Gradio's scripts are inline and evaluate text; its image editor uses a blob.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' blob: data:; worker-src 'self' blob:;"
    " object-src 'none'; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class Policy:
    """An ASGI app that adds the policy to pages of another app without one."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and adds the header."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def sends(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", []))
                there = {name.lower() for name, _ in headers}
                if b"content-security-policy" not in there:
                    headers.append((b"content-security-policy", POLICY.encode()))
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, sends)
