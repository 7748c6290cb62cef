"""The layout that Hugging Face's ``kernels`` loads from the Hub or a folder, made of our sources.

    python -m humanline.integrations.hub OUT_DIR

and then, on a machine that need not have humanline::

    humanline = kernels.get_local_kernel(Path("OUT_DIR"))
    humanline.token_logps(logits, labels)
    humanline.kernels.token_logps  # the Triton side, tensors in, tensors out

A variant a backend, each the library without its trainers and commands. What makes them kernels
(the package's requirements): imports are relative; the custom ops' namespace has a name of its own,
so that builds and an installed humanline live in one process.
"""

import argparse
import ast
import hashlib
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("", "kernels", "objectives", "ops", "ops/logits", "ops/hidden")
LEFT_OUT = ("__main__.py", "cli.py", "doctor.py")
BACKENDS = ("cpu", "cuda", "rocm")
#: The major version users ask the Hub for: raised when a caller would have to change.
API_VERSION = 1

_KERNELS_INIT = '''"""The Triton kernels: tensors in, tensors out."""

from importlib import import_module

__all__ = {names}


def __getattr__(name):
    if name not in __all__:
        raise AttributeError(f"{{__name__}} has no {{name}}")
    return import_module(f".{{name}}", __name__)  # only now: Triton may be missing
'''


def build(out: Path) -> list[Path]:
    """Write ``out/build/torch-BACKEND`` for every backend; the folders written.

    Raises:
        FileExistsError: ``out`` is there and not an empty folder.
    """
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise FileExistsError(f"{out} is not an empty folder")
    sources = {path: relative(path, text) for path, text in read_sources().items()}
    digest = hashlib.sha256("".join(sources.values()).encode()).hexdigest()[:7]
    return [_write_variant(out / "build", backend, sources, digest) for backend in BACKENDS]


def read_sources() -> dict[Path, str]:
    """The library's files, by their path in the package."""
    files = sorted(file for folder in FOLDERS for file in (ROOT / folder).glob("*.py"))
    kept = (file for file in files if file.name not in LEFT_OUT)
    sources = {file.relative_to(ROOT): file.read_text(encoding="utf-8") for file in kept}
    names = [path.stem for path in sources if path.parent == Path("kernels")]
    init = Path("__init__.py")
    own = sources[init].replace("__all__ = [\n", '__all__ = [\n    "kernels",\n')
    return sources | {
        init: own.replace("\n__all__", "\nfrom humanline import kernels\n\n__all__", 1),
        Path("kernels/__init__.py"): _KERNELS_INIT.format(names=names),
    }


def relative(path: Path, text: str) -> str:
    """A file's text with its imports of humanline made relative.

    Raises:
        ValueError: an absolute import is left that a kernel must not have.
    """
    dots = "." * len(path.parts)

    def make_relative(match: re.Match) -> str:
        return f"{match[1]}from {dots}{match[2].removeprefix('.')} import"

    text = re.sub(r"^( *)from humanline([.\w]*) import", make_relative, text, flags=re.M)
    for node in ast.walk(ast.parse(text)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        for module in modules:
            top = module.partition(".")[0]
            if top not in ("torch", "triton") and top not in sys.stdlib_module_names:
                raise ValueError(f"{path}:{node.lineno} imports {module}: a kernel must not")
    return text


def _write_variant(out: Path, backend: str, sources: dict[Path, str], digest: str) -> Path:
    folder, unique = out / f"torch-{backend}", f"_humanline_{backend}_{digest}"
    for path, text in sources.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        text = text.replace('custom_op("humanline::', f'custom_op("{unique}::')
        (folder / path).write_text(text, encoding="utf-8")
    metadata = {
        "name": "humanline",
        "id": unique,
        "version": API_VERSION,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n", encoding="utf-8")
    return folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m humanline.integrations.hub", description=__doc__.splitlines()[0]
    )
    parser.add_argument("out", type=Path, metavar="OUT_DIR", help="an empty folder, or a new one")
    try:
        for folder in build(parser.parse_args(argv).out):
            print(folder)
    except OSError as error:
        parser.exit(2, f"humanline: error: {error}\n")


if __name__ == "__main__":
    main()
