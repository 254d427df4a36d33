"""ComfyUI's graph of nodes in a picture.

PNG chunks `prompt`, {id: {"class_type", "inputs"}} with links [id, output], and `workflow`, the page's form of it,
whose values have no names.  PyTorch's CPU generator draws its noise.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from sdjax.service.foreign.kind import Kind, parsed, sampled, sized

MOST_NODES = 10_000
WORDS = ("text", "string", "value", "prompt")  # inputs that hold a prompt
VALUES = {  # the order of values in `workflow`; "": a value without an input
    "KSampler": ("seed", "", "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "KSamplerAdvanced": ("add_noise", "noise_seed", "", "steps", "cfg", "sampler_name", "scheduler"),
    "CLIPTextEncode": ("text",),
    "EmptyLatentImage": ("width", "height", "batch_size"),
}  # fmt: skip


def read(held: Mapping[str, str], name: str) -> dict[str, Any] | None:
    """Returns the settings of the first pass."""
    graph = _nodes(parsed(held, "prompt")) or _nodes(_named(parsed(held, "workflow")))
    samplers = [one for one in graph.values() if {"positive", "steps"} <= one.keys()]
    if not samplers:
        return None
    first = next((one for one in samplers if not _before(graph, one)), samplers[0])
    seed = first.get("seed", first.get("noise_seed"))
    places = [node for node in _behind(graph, first.get("latent_image")) if "width" in node]
    size = sized(places[0].get("width"), places[0].get("height")) if places else {}
    said = {"prompt": _text(graph, first.get("positive")), "negative_prompt": _text(graph, first.get("negative"))}
    said |= {
        "seed": _number(graph, seed),
        "steps": _number(graph, first["steps"]),
        "guidance": _number(graph, first.get("cfg")),
    }
    own = {"grammar": "comfyui", "noise_source": "torch-cpu"}
    return {**said, **sampled(first.get("sampler_name"), first.get("scheduler")), **size, **own}


KIND = Kind("ComfyUI", read)


def _nodes(graph: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {id: inputs} of a graph, {} for anything else."""
    if len(graph) > MOST_NODES:
        return {}
    found = {str(key): node.get("inputs") for key, node in graph.items() if isinstance(node, dict)}
    return {key: inputs for key, inputs in found.items() if isinstance(inputs, dict)}


def _named(workflow: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the graph of a workflow's nodes, with names for the values of the usual ones."""
    nodes, links = (some if isinstance(some := workflow.get(name), list) else [] for name in ("nodes", "links"))
    origin = {
        link[0]: [str(link[1]), link[2]]
        for link in links
        if isinstance(link, list) and len(link) > 3 and type(link[0]) is int
    }
    graph = {}
    for node in nodes[:MOST_NODES]:
        if not isinstance(node, dict):
            continue
        values = node.get("widgets_values")
        named = zip(VALUES.get(str(node.get("type")), ()), values if isinstance(values, list) else [], strict=False)
        inputs = {one: value for one, value in named if one}
        for one in node.get("inputs") or []:
            if isinstance(one, dict) and type(one.get("link")) is int and one["link"] in origin:
                inputs[str(one.get("name"))] = origin[one["link"]]
        graph[str(node.get("id"))] = {"inputs": inputs}
    return graph


def _link(graph: Mapping[str, Any], value: Any) -> dict[str, Any] | None:
    """Returns the inputs of the node that a value is linked to."""
    return graph.get(str(value[0])) if isinstance(value, list) and len(value) == 2 else None


def _behind(graph: Mapping[str, Any], value: Any) -> Iterator[dict[str, Any]]:
    """Yields the inputs of the node that a value is linked to, and of those behind it, nearest first."""
    waiting, seen = [value], set()
    while waiting:
        node = _link(graph, waiting.pop(0))
        if node is not None and id(node) not in seen:
            seen.add(id(node))
            yield node
            waiting += node.values()


def _before(graph: Mapping[str, Any], sampler: Mapping[str, Any]) -> bool:
    """Returns whether another sampler makes the latents of one."""
    return any({"positive", "steps"} <= node.keys() for node in _behind(graph, sampler.get("latent_image")))


def _text(graph: Mapping[str, Any], value: Any) -> str | None:
    """Returns the nearest text behind a value."""
    for node in _behind(graph, value):
        for name in WORDS:
            if isinstance(node.get(name), str):
                return node[name]
    return None


def _number(graph: Mapping[str, Any], value: Any) -> Any:
    """Returns a number, or the nearest one behind a link."""
    for node in ({"value": value}, *_behind(graph, value)):
        for one in node.values():
            if isinstance(one, (int, float)) and not isinstance(one, bool):
                return one
    return None
