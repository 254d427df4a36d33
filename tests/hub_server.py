"""A hub on this machine: as much of its protocol as a snapshot needs, so that downloads are tested without one.

with serving({"someone/model": {"model_index.json": b"{}"}}, tmp_path) as (env, asked):
    subprocess.run(command, env={**os.environ, **env})        # asked: the paths that were asked for

"datasets/someone/photos" is a data set, whose files are also read by range.
"""

import contextlib
import json

import file_server

COMMIT = "a" * 40
JSON = {"Content-Type": "application/json"}


def answer(request, repositories, asked):
    """Answers for the list of a repository's files, and for each file with its commit."""
    path = request.path.split("?")[0]
    asked.append(path)
    for repository, files in repositories.items():
        kind = repository if repository.startswith("datasets/") else f"models/{repository}"
        if path.startswith(f"/api/{kind}/tree/"):
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": "b" * 40} for name, data in files.items()
            ]
            return 200, json.dumps(listed).encode(), JSON
        if path.startswith(f"/api/{kind}"):
            siblings = [{"rfilename": name} for name in files]
            content = {"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
            return 200, json.dumps(content).encode(), JSON
        name = path.removeprefix(f"/{repository}/resolve/{COMMIT}/").removeprefix(f"/{repository}/resolve/main/")
        if name in files:
            headers = {"ETag": f'"{name.replace("/", "-")}"', "X-Repo-Commit": COMMIT}
            return file_server.ranged(request, files[name], headers)
    return 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}


@contextlib.contextmanager
def serving(repositories, home):
    """Yields (environment of a process that asks this hub, the list of paths asked for) of {id: {file: bytes}}."""
    asked = []
    with file_server.serving(lambda request: answer(request, repositories, asked)) as address:
        yield {"HF_ENDPOINT": address, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1"}, asked


@contextlib.contextmanager
def asking(repositories, home, monkeypatch):
    """Makes this process ask such a hub, with an empty cache in `home`; yields the list of paths asked for."""
    with serving(repositories, home) as (env, asked):
        template = f"{env['HF_ENDPOINT']}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", env["HF_ENDPOINT"])
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield asked


def files_of(folder):
    """Returns {name: bytes} of a folder's files."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
