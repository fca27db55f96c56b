"""What `pip install` needs to know: the five folders are imported as r1zero.kernels and so on.

They are namespace packages (no __init__.py), so that a package of the same name in another project
can never take their place. Each of them, and each sub-folder, is listed here by name.
"""

from setuptools import setup

PACKAGES = {
    "r1zero.kernels": "kernels",
    "r1zero.kernels.cpu": "kernels/cpu",
    "r1zero.model": "model",
    "r1zero.model.engine": "model/engine",
    "r1zero.model.tokens": "model/tokens",
    "r1zero.eval": "eval",
    "r1zero.eval.tasks": "eval/tasks",
    "r1zero.rl": "rl",
    "r1zero.train": "train",
    "r1zero.train.cli": "train/cli",
    "r1zero.train.lab": "train/lab",
    "r1zero.train.recipes": "train/recipes",
    "r1zero.train.report": "train/report",
}

DEPENDENCIES = [
    "torch>=2.11,<2.14",
    'triton>=3.6,<3.8; sys_platform == "linux"',
    "einops>=0.8",
    "numpy>=2.0",
    "numba>=0.62",  # compiles the loops of a CPU; without it they run as plain PyTorch, slower
    "tiktoken>=0.9",
    "regex",  # tiktoken's own; splits the rare text whose bytes have no token
    "wandb>=0.19",
    "safetensors>=0.5",
    "tyro>=0.9",
    "tqdm>=4.66",
    "matplotlib>=3.9",
    "math-verify>=0.9,<0.10",  # grades mathematics, in a process of its own
]

EXTRAS = {
    "hf": ["jinja2>=3.1.6"],  # renders chat templates
    "bpe": ["tokenizers>=0.21"],  # trains a byte-level BPE; reads those of SentencePiece's kind
    "trl": ["trl>=1.0", "transformers>=5.0"],  # the peer in benchmarks/vs_trl.py
    "dev": [
        "pytest>=8.3",
        "pytest-xdist>=3.6",
        "hypothesis>=6.100",
        "ruff>=0.9",
        "tokenizers>=0.21",  # open models are held against these two
        "transformers>=5.0",
        "peft>=0.18",
    ],
}

setup(
    name="r1zero",
    version="0.1.0",
    description="DeepSeek-R1-Zero on one GPU or a laptop, in files that a person can read",
    license="MIT",
    python_requires=">=3.11",
    packages=list(PACKAGES),
    package_dir=PACKAGES,
    install_requires=DEPENDENCIES,
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["r1zero = r1zero.train.cli.main:main"]},
)
