"""Installs sdjax: `pip install -e . -c constraints.txt`; `make demo` does that, `make test` with the extra `test`."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

CORE = [
    "jax>=0.10,<0.12",
    "flax>=0.12",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "tokenizers>=0.21",
    "safetensors>=0.6",
    "huggingface_hub>=1",
    "numpy>=2",
    "pillow>=11",
    "tqdm>=4.66",
    "jaxtyping>=0.3",  # shapes of arrays in annotations
    "pydantic>=2.11",  # the check of a picture's settings; programs and service alone import it
    "annotated-types>=0.7",
    "scipy>=1.13",  # filters of conditions; JAX has it along
]
TORCH = ["torch==2.13.0", "diffusers>=0.40", "transformers>=5", "peft>=0.18", "lycoris-lora>=4"]
TENSORBOARD = ["tensorboardX>=2.6"]
LINT = ["ruff>=0.14", "basedpyright>=1.30"]
CONDITIONS = ["opencv-python-headless>=4.10"]  # straight lines; edges need none
UI = ["fastapi>=0.140", "uvicorn>=0.40", "python-multipart>=0.0.20", "gradio>=6.29"]  # gradio: pillow and hub's newest
NOTEBOOK = ["nbclient>=0.10", "nbformat>=5.10", "ipykernel>=7"]  # run docs/colab.ipynb
CLIENTS = ["webuiapi>=0.9.17", "openai>=3"]  # of the APIs, which tests speak with
BROWSER = ["playwright>=1.50"]  # drives a Chromium that is there, in tests/ui alone
TABLES = ["pyarrow>=20"]  # parquet lists of jobs; pictures in parquet, Arrow files and tar shards; s3:// and gs://


class Build(build_py):
    """Copies the recipes of configs/ into a built package as sdjax/configs/, where training/recipes.py finds them."""

    def run(self):
        super().run()
        if not self.editable_mode:  # which uses those of the checkout
            place, unwanted = Path(self.build_lib, "sdjax", "configs"), shutil.ignore_patterns("__pycache__")
            shutil.copytree("configs", place, dirs_exist_ok=True, ignore=unwanted)


setup(
    name="sdjax",
    version="0.1.0",
    description="Stable Diffusion personalization in JAX: from one image, in seconds, to files for every PyTorch tool",
    license="Apache-2.0",
    python_requires=">=3.11,<3.14",
    packages=find_packages(include=["sdjax", "sdjax.*"]),
    package_data={"sdjax": ["pocket/**", "web/page/*.css", "web/page/*.html", "web/page/*.png"]},
    cmdclass={"build_py": Build},
    install_requires=CORE,
    entry_points={"console_scripts": ["sdjax=sdjax.__main__:main"]},
    extras_require={
        "torch": TORCH,
        "test": [
            *("pytest>=8", "pytest-xdist>=3.6"),
            *(*LINT, *TORCH, *TENSORBOARD, *TABLES, *CONDITIONS, *UI, *CLIENTS, *NOTEBOOK),
        ],
        "lint": [*LINT, *TENSORBOARD, *TABLES, *CONDITIONS, *UI],
        "conditions": CONDITIONS,
        "ui": UI,
        "test-ui": [*UI, *BROWSER, "pytest>=8", "pytest-xdist>=3.6"],
        "tables": TABLES,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
        "logging": [*TENSORBOARD, "wandb>=0.19"],
    },
)
