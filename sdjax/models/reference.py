"""Data of a model other than its parts, for methods and adapters.

sd = sd.with_reference(base={"unet": weights})
sd = sd.with_own(mine=statistics)                  # for a method without a field here
"""

from typing import Any

from flax import struct


class Reference(struct.PyTreeNode):
    """Weights and pictures that methods read and do not train; None: absent.

    base: {part: chosen weights} before training, see Full(keep=True).
    clip: {"text_projection": {"kernel" [C P]}, "logit_scale"}, from contrastive training, with CLIPModel's names.
    lpips: weights of LPIPS, see models/critics.py.
    attached: the adapters and the model before the first of them, see formats/adapters/attach.py.
    own: {method: tree} of methods, such as e4t.Seen under "e4t".
    """

    base: Any = None
    clip: Any = None
    lpips: Any = None
    attached: Any = None
    own: Any = struct.field(default_factory=dict)
