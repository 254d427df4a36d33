"""An image folder, or one image, as a source of training examples.

    source = Folder(Data(path="photos/cat", word="a sks cat", templates="object"), size=512)
    source.example(0, np.random.default_rng(0))     # {"picture" uint8 [512 512 3], "caption"[, "mask" [512 512]]}
"""

import numpy as np

from sdjax.data import images, prompts

CENTRE = (0.5, 0.5)


class Folder:
    """The pictures of a folder; what is random about an example comes from the generator that is given."""

    def __init__(self, data, size):
        self.data, self.size = data, size
        self.items = images.find(data.path)
        self.prompts = prompts.make(data.templates, data.word)
        groups = {}
        for i, item in enumerate(self.items):
            groups.setdefault(item.subject, []).append(i)
        self.groups = groups

    def __len__(self):
        return len(self.items)

    def picture(self, i):
        """Returns picture i, uint8 [size size 3], its centre."""
        return images.square(images.decode(self.items[i], self.size)[0], self.size)

    def caption(self, i, random):
        """Returns a caption: a template drawn at random, filled with the word and the picture's own caption."""
        return self.prompts(self.items[i].caption, random)

    def other(self, i, random):
        """Returns the number of another picture of the same sub-folder, or i where there is none."""
        rest = [j for j in self.groups[self.items[i].subject] if j != i]
        return rest[int(random.integers(len(rest)))] if rest else i

    def example(self, i, random):
        """Returns {"picture", "caption"[, "mask" float32 in [0, 1]]} of picture i, cut and flipped as the settings say."""
        place = tuple(random.random(2)) if self.data.crop == "random" else CENTRE
        flip = bool(random.random() < self.data.flip)
        picture, mask = images.decode(self.items[i], self.size, masked=self.data.mask)
        item = {"picture": images.square(picture, self.size, place, flip), "caption": self.caption(i, random)}
        if mask is not None:
            item["mask"] = images.square(mask, self.size, place, flip).astype(np.float32) / 255
        return item

    def fingerprint(self):
        """Returns what decides the pictures, for a cache's name."""
        return ["folder", images.digest(self.items)]
