"""Installs qkjax. The exact versions that the scripts use are in constraints.txt."""

from setuptools import find_packages, setup

setup(
    name="qkjax",
    version="0.1.0",
    description="Does QK-Norm collapse attention keys? A reimplementation in JAX and Flax.",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["qkjax", "qkjax.*"]),
    install_requires=[
        "absl-py>=2.1",
        "array-record>=0.8.1",
        "clu>=0.0.12",
        "etils[epath]>=1.9",
        "flax>=0.12",
        "grain>=0.2.12",
        "jax>=0.10.2,<0.12",
        "ml-collections>=1.0",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.11.25",
        "pyarrow>=17",
        "scipy>=1.13",
        "tensorboardX>=2.6.2",
        "tensorflow-datasets>=4.9.9",
        "tokenizers>=0.21",
    ],
    extras_require={
        "cuda": ["jax[cuda13]>=0.10.2,<0.12"],
        "data": ["datasets>=4.0", "zstandard>=0.23"],
        "tpu": ["jax[tpu]>=0.10.2,<0.12"],
        "export": ["torch==2.13.0", "transformers>=5.0", "safetensors>=0.5"],
        "eval": ["torch==2.13.0", "transformers>=5.0", "lm-eval>=0.4.13", "accelerate>=1.10"],
        "report": ["matplotlib>=3.9"],
        "bench": ["torch==2.13.0"],
        "test": [
            "datasets>=4.0",
            "matplotlib>=3.9",
            "mypy>=1.15",
            "pytest>=8.3",
            "pytest-xdist>=3.6",
            "ruff>=0.11",
            "tensorboard>=2.19",
            "zstandard>=0.23",
        ],
    },
)
