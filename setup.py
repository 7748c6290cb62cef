import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "humanline/version.py").read_text(encoding="utf-8"), re.M
).group(1)
README = HERE / "README.md"

# What `humanline train` needs for a Hugging Face model read from a GGUF file: gguf to load it,
# jinja2 for its chat template, matplotlib for the curves.
TRAIN = [
    "transformers>=5",
    "gguf>=0.10",
    "jinja2>=3.1.6",
    "matplotlib",
    "numpy",
    "peft>=0.18",
    "pyarrow",
    "safetensors",
    "tqdm",
]
# The versions in humanline/integrations/trl/version.py: what is called there is TRL's own business.
TRL = ["trl>=1.15,<1.17", "peft>=0.18"]
BENCH = ["pytest-benchmark"]
TEST = [
    *TRAIN,
    *(f'{name}; python_version >= "3.11"' for name in TRL),  # TRL has none for 3.10
    *BENCH,
    "accelerate",
    "datasets",
    "kernels",
    "mypy",
    "pytest>=8.2",  # reads arguments from @tests/core.txt
    "pytest-xdist",
    "ruff",
    "setuptools>=77",  # tests/test_packaging.py builds without isolation, hence without downloads
    "wheel",
]

setup(
    name="humanline",
    version=VERSION,
    description="Preference and RL post-training losses, fused with their log-probs and backward, "
    "with or without human perception (humanline)",
    long_description=README.read_text(encoding="utf-8") if README.exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    # humanline/kernels is a symbolic link to ../kernels, which has no __init__.py (a top-level
    # regular package `kernels` would shadow Hugging Face's), so find_packages does not see it.
    packages=[*find_packages(include=["humanline", "humanline.*"]), "humanline.kernels"],
    # Said because an editable install then is a path, which type checkers follow; left out, it is
    # an import hook, which they do not run.
    package_dir={"": "."},
    package_data={"humanline": ["py.typed", "training/data/*.jsonl"]},
    include_package_data=False,
    zip_safe=False,
    install_requires=["torch>=2.11", 'triton>=3.6; platform_system == "Linux"'],
    extras_require={
        "train": TRAIN,
        "trl": TRL,
        "data": ["reasoning-gym"],
        "bench": BENCH,
        "test": TEST,
        # Peers of humanline.integrations. They pin much: their tests use them where they are there.
        "verl": ["verl>=0.9"],
        "axolotl": ["axolotl>=0.19"],
    },
    entry_points={"console_scripts": ["humanline = humanline.cli:main"]},
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
