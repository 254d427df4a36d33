"""A hub on this machine: as much of its protocol as a snapshot needs, so that downloads are tested without one.

with serving({"someone/model": {"model_index.json": b"{}"}}, tmp_path) as (env, asked):
    subprocess.run(command, env={**os.environ, **env})        # asked: the paths that were asked for

"datasets/someone/photos" is a data set, whose files are also read by range.
"""

import contextlib
import http.server
import json
import threading

COMMIT = "a" * 40


class Hub(http.server.BaseHTTPRequestHandler):
    """Answers for the list of a repository's files, and for each file with its commit."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        path = self.path.split("?")[0]
        self.server.asked.append(path)
        for repository, files in self.server.repositories.items():
            kind = repository if repository.startswith("datasets/") else f"models/{repository}"
            if path.startswith(f"/api/{kind}/tree/"):
                listed = [
                    {"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in files.items()
                ]
                return self.send(json.dumps(listed).encode(), body, {"Content-Type": "application/json"})
            if path.startswith(f"/api/{kind}"):
                siblings = [{"rfilename": name} for name in files]
                content = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
                return self.send(json.dumps(content).encode(), body, {"Content-Type": "application/json"})
            name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/").removeprefix(f"/{repository}/resolve/main/")
            if name in files:
                headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
                if wanted := self.headers.get("Range"):
                    first, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                    return self.send(files[name][first : last + 1], body, headers, status=206)
                return self.send(files[name], body, headers)
        self.send(b'{"error": "Repository not found"}', body, {"X-Error-Code": "RepoNotFound"}, status=404)

    def send(self, data, body, headers, status=200):
        self.send_response(status)
        for name, value in {"Content-Length": len(data), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if body:
            self.wfile.write(data)


@contextlib.contextmanager
def serving(repositories, home):
    """Yields (environment of a process that asks this hub, the list of paths asked for) of {id: {file: bytes}}."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repositories, server.asked = repositories, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}, server.asked
    finally:
        server.shutdown()
        server.server_close()


def files_of(folder):
    """Returns {name: bytes} of a folder's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
