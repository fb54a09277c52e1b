"""llmjax: train large language models in JAX with large batches, long packed sequences and gradient accumulation."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
DATA = ["pyarrow>=15", "zstandard>=0.22", "charset-normalizer>=3"]
CONVERT = ["safetensors>=0.5", "gguf>=0.17", "tokenizers>=0.21", "jinja2>=3.1"]
TRANSLATE = ["sacrebleu>=2.4"]
SERVE = ["starlette>=0.40", "uvicorn>=0.30"]
NOTEBOOK = ["ipykernel>=6.29", "nbclient>=0.10", "matplotlib>=3.9"]
TEST = [
    "pytest>=8",
    "pytest-timeout>=2.3",
    "pytest-xdist>=3.6",
    "ruff>=0.8",
    "mypy>=1.14",
    *DATA,
    *CONVERT,
    *NOTEBOOK,
    *TRANSLATE,
    *SERVE,
]

setup(
    name="llmjax",
    version=re.search(r'__version__ = "(.+)"', (HERE / "llmjax" / "__init__.py").read_text())[1],
    description=__doc__,
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["llmjax", "llmjax.*"]), "llmjax.configs"],
    package_dir={"llmjax.configs": "configs"},
    entry_points={"console_scripts": ["llmjax=llmjax.main:console"]},
    install_requires=[
        "jax>=0.10",
        "flax>=0.12",
        "optax>=0.2.8",
        "orbax-checkpoint>=0.12",
        "grain>=0.2.18",
        "sentencepiece>=0.2.1",
        "ml_collections>=1.1",
        "numpy>=2",
        "absl-py>=2.1",
        "tensorboardX>=2.6.2",
        "tqdm>=4.66",
    ],
    package_data={"llmjax.report": ["report.css", "report.js"], "llmjax.serve": ["page.html"]},
    extras_require={
        "data": DATA,
        "convert": CONVERT,
        "notebook": NOTEBOOK,
        "tpu": ["jax[tpu]>=0.10"],
        "cuda": ["jax[cuda12]>=0.10"],
        "wandb": ["wandb>=0.19.10"],
        "translate": TRANSLATE,
        "serve": SERVE,
        "test": TEST,
        "interop": [
            "torch==2.13.0",
            "transformers>=4.50",
            "accelerate>=1.1",
            "peft>=0.15",
            "openai>=1.50",
            *CONVERT,
        ],
    },
)
