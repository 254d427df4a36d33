"""Hypernetworks as files: a pickle of A1111's, see hypernetworks.py."""

from sdjax.formats.adapters import hypernetworks
from sdjax.formats.adapters.file import File
from sdjax.formats.adapters.format import Format
from sdjax.methods.adapter import Adapter
from sdjax.stable_diffusion import StableDiffusion


class HypernetworkFile(Format):
    """Pairs of networks by width, and A1111's settings."""

    name, called, tags, listed = "hypernetwork", "hypernet", ("hypernet",), "Hypernet hashes"  # the last is ours
    suffixes = (".pt", ".ckpt", ".bin")

    def matches(self, file: File) -> bool:
        """Returns whether a pickle holds networks by width."""
        return hypernetworks.recognised(file.keys)

    def read(self, file: File, sd: StableDiffusion) -> Adapter:
        """Returns the hook of a file."""
        return Adapter(hook=hypernetworks.read(file.content, file.path))
