"""Where pictures and words come from: an image folder, one image, or the drawn world.

A source has len(), example(i, random) -> {"picture" uint8 [S S 3], "caption"[, "mask" [S S]]}, picture(i) without
random augmentation, caption(i, random), other(i, random) -> the number of another picture of the same subject,
epoch() -> the numbers that an epoch shows, in no order, fingerprint(), and about(), what a run says of it in one line.
"""

from sdjax.data.sources.drawn import Drawn
from sdjax.data.sources.folder import Folder


def open(data, size):
    """Returns the source that a run's Data settings name, at `size` pixels.

    Raises ValueError for a path that is empty, does not exist or holds no pictures, and for settings that are not for
    such pictures.
    """
    if data.path == "pocketland":
        return Drawn(data, size)
    if not data.path:
        raise ValueError("data.path='': no pictures; give a folder of images, one image, or 'pocketland'")
    for name, accepted in (("domain", ""), ("looks", False), ("named", 0)):
        value = getattr(data, name)
        if value:
            raise ValueError(
                f"data.{name}={value!r}: is for data.path=pocketland; accepted for a folder is {accepted!r}"
            )
    return Folder(data, size)
