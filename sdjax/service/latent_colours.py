"""Previews latents without the autoencoder: each latent pixel's colour is linear in its channels.

    colours = Colours.fit(latents, pictures)            # once per autoencoder, from existing pictures
    colours.picture(latents)                            # uint8 [h w 3]

The map is rgb = W z + b, fitted by least squares with a small ridge.  A preview takes microseconds; decoding takes as
long as a step.  Source of the idea: A1111's "Approx cheap" previews.

Shapes: B batch, h w latent pixels, c channels, H W pixels.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sdjax.formats.storage import files
from sdjax.images import writing
from sdjax.stable_diffusion import StableDiffusion

RIDGE = 1e-3  # of the mean square of latents: one picture may have few colours
SIDE = 384  # pixels that a preview's longer side has at most


@dataclass(frozen=True)
class Colours:
    """The map of an autoencoder: weights [c + 1, 3], the last row the constant, of colours 0 to 255."""

    weights: np.ndarray

    @classmethod
    def fit(cls, latents: Float[np.ndarray, "B h w c"], pictures: UInt8[np.ndarray, "B H W 3"]) -> "Colours":
        """Returns the map that is nearest to pictures which were decoded from latents.

        Raises ValueError where the pictures' sides are no multiple of the latents'.
        """
        (count, h, w, c), (height, width) = latents.shape, pictures.shape[1:3]
        if height % h or width % w or height // h != width // w:
            raise ValueError(f"latents {h} x {w}, pictures {height} x {width}: expected a multiple")
        small = pictures.reshape(count, h, height // h, w, width // w, 3).mean((2, 4)).reshape(-1, 3)
        rows = np.concatenate([latents.reshape(-1, c), np.ones((count * h * w, 1))], 1).astype(np.float64)
        ridge = RIDGE * len(rows) * np.eye(c + 1) * np.array([*[np.mean(rows[:, :c] ** 2)] * c, 0])
        return cls(np.linalg.solve(rows.T @ rows + ridge, rows.T @ small).astype(np.float32))

    def picture(self, latents: Float[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w 3"]:
        """Returns the colours of latents."""
        colours = np.asarray(latents, np.float32) @ self.weights[:-1] + self.weights[-1]
        return np.clip(np.nan_to_num(colours), 0, 255).astype(np.uint8)

    def png(self, latents: Float[np.ndarray, "h w c"], factor: int) -> bytes:
        """Returns a PNG of latents, enlarged by up to `factor` and to at most SIDE pixels."""
        image = Image.fromarray(self.picture(latents))
        scale = max(1, min(factor, SIDE // max(image.size)))
        return writing.png(image.resize((image.width * scale, image.height * scale), Image.Resampling.BILINEAR))


class Kept:
    """The maps of autoencoders that were met, in a file for each below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.known = folder, {}

    def of(self, sd: StableDiffusion) -> Colours | None:
        """Returns the map of a model's autoencoder, None where it was not met yet."""
        name = _name(sd)
        if name not in self.known:
            try:
                weights = np.asarray(files.read_json(self._path(name))["weights"], np.float32)
                fits = (
                    weights.shape == (sd.networks["vae"].config.latent_channels + 1, 3) and np.isfinite(weights).all()
                )
            except (ValueError, KeyError, TypeError):
                return None
            self.known[name] = Colours(weights) if fits else None
        return self.known[name]

    def learn(self, sd: StableDiffusion, latents: np.ndarray, pictures: np.ndarray) -> None:
        """Fits and keeps the map of a model's autoencoder, where there is none yet."""
        if self.of(sd) is None:
            colours = self.known[_name(sd)] = Colours.fit(latents, pictures)
            with files.new_file(self._path(_name(sd))) as temporary:
                temporary.write_text(json.dumps({"weights": colours.weights.tolist()}))

    def _path(self, name: str) -> Path:
        return self.folder / f"colours-{name}.json"


def _name(sd: StableDiffusion) -> str:
    """Returns what tells an autoencoder from others: of the decoder's first layer, which is read at every preview."""
    first = np.asarray(sd.parts["vae"]["decoder"]["conv_in"]["kernel"], np.float32)
    return hashlib.sha256(first.tobytes()).hexdigest()[:16]
