"""The embedded corpus: docstrings of a fixed list of libraries, read as text and never imported.

Every machine that can run this project has these libraries, so there is real text to train on
without a download. The text follows the versions that are installed: they are recorded.
"""

import ast
import hashlib
import importlib.metadata
import pathlib
import platform
import sys
import sysconfig
import warnings
from collections.abc import Iterator

from qkjax import errors

# Distribution on the package index, and its top folder that is read. All are core dependencies.
_DISTRIBUTIONS = (
    ("numpy", "numpy"),
    ("scipy", "scipy"),
    ("jax", "jax"),
    ("flax", "flax"),
    ("optax", "optax"),
    ("orbax-checkpoint", "orbax"),
    ("grain", "grain"),
    ("ml-collections", "ml_collections"),
    ("absl-py", "absl"),
    ("tensorflow-datasets", "tensorflow_datasets"),
)
# Parts of the standard library that Linux distributions ship separately or not at all: with them
# the corpus would depend on which system packages are installed.
_OPTIONAL_STANDARD = {
    "distutils",
    "ensurepip",
    "idlelib",
    "lib2to3",
    "msilib",
    "tkinter",
    "turtle",
    "turtledemo",
    "venv",
}
_TEST_FOLDERS = {"test", "tests", "testing", "_testing", "idle_test", "testdata", "test_data"}
# A module's text is cut at definitions into documents of about this many characters, so that no
# single module (some hold 300 kB) decides how much text the 5% validation pool gets.
_DOCUMENT_CHARACTERS = 8_000
_MIN_CHARACTERS = 20


def versions() -> dict[str, str]:
    """Version of Python and of every library of the list.

    Raises:
        UsageError: names the libraries that are not installed.
    """
    found, missing = {"python": platform.python_version()}, []
    for name, _ in _DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        raise errors.UsageError(
            f"docstrings: the corpus needs {', '.join(missing)}, which this environment lacks. "
            f"Run: {sys.executable} -m pip install {' '.join(missing)}"
        )
    return found


def documents() -> Iterator[tuple[str, str]]:
    """Yields (name, text) of every document, in an order that the names alone decide.

    The order is by a hash of the name: the libraries are mixed, so that the first N validation
    tokens come from all of them.
    """
    pieces = [*_module_documents(), *_topic_documents()]
    pieces.sort(key=lambda piece: hashlib.sha256(piece[0].encode()).digest())
    yield from pieces


def modules() -> list[tuple[str, pathlib.Path]]:
    """(dotted module name, file) of every module that is read, sorted by name."""
    result = _standard_library() + [
        pair for name, folder in _DISTRIBUTIONS for pair in _distribution(name, folder)
    ]
    return sorted((_dotted(parts), path) for parts, path in result)


def _standard_library() -> list[tuple[tuple[str, ...], pathlib.Path]]:
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    names = sys.stdlib_module_names - _OPTIONAL_STANDARD
    files = [root / f"{name}.py" for name in names]
    for name in names:
        files += (root / name).rglob("*.py")
    return [
        (path.relative_to(root).parts, path)
        for path in files
        if path.is_file() and not _is_test(path.relative_to(root).parts)
    ]


def _distribution(name: str, folder: str) -> list[tuple[tuple[str, ...], pathlib.Path]]:
    files = importlib.metadata.distribution(name).files
    if not files:
        raise errors.UsageError(
            f"docstrings: {name} does not list its files. Install it again with pip."
        )
    return [
        (file.parts, pathlib.Path(str(file.locate())))
        for file in files
        if file.parts[0] == folder and file.suffix == ".py" and not _is_test(file.parts)
    ]


def _is_test(parts: tuple[str, ...]) -> bool:
    name = parts[-1]
    return (
        bool(_TEST_FOLDERS.intersection(parts[:-1]))
        or name.startswith(("test_", "conftest"))
        or name.endswith(("_test.py", "_tests.py"))
    )


def _dotted(parts: tuple[str, ...]) -> str:
    dotted = ".".join(parts).removesuffix(".py")
    return dotted.removesuffix(".__init__")


def _module_documents() -> Iterator[tuple[str, str]]:
    seen: set[bytes] = set()
    for module, path in modules():
        piece: list[str] = []
        number = characters = 0
        for name, docstring in _docstrings(module, path):
            digest = hashlib.sha256(" ".join(docstring.split()).encode()).digest()
            # Copied docstrings (overrides, aliases) count once in the whole corpus.
            if len(docstring) < _MIN_CHARACTERS or digest in seen:
                continue
            seen.add(digest)
            if characters > _DOCUMENT_CHARACTERS:
                yield f"{module}#{number}", "".join(piece)
                piece, characters, number = [], 0, number + 1
            piece.append(f"{name}\n\n{docstring}\n\n")
            characters += len(piece[-1])
        if piece:
            yield f"{module}#{number}", "".join(piece)


def _docstrings(module: str, path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """(qualified name, docstring) of the module and of what it defines, in source order."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's strings
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # templates and files for other Python versions
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = ast.get_docstring(node)
            if docstring and _is_clean(docstring):
                yield name, docstring.strip()
        children: list[tuple[str, ast.AST]] = []
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                children.append((f"{name}.{child.name}", child))
            elif isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
                children.append((name, child))
        stack.extend(reversed(children))


def _is_clean(text: str) -> bool:
    """Lone surrogates, which a string literal may hold, cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _topic_documents() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics  # half a megabyte: nothing but a dictionary of texts

    for name, text in sorted(topics.items()):
        yield f"pydoc topic {name}", text
