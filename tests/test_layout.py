"""The house rules, read off the source: which room may import which, how long things are, what an import does.

A room is a file or folder directly under grace_plugin. Rooms stand in one order and import only rooms before them, so data
flows one way; losses, quantizer and controller never import each other; one border file names what is used of
llm-compressor and compressed-tensors. `cli` comes last and sees everything; the package's own file only re-exports.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "grace_plugin"
ROOMS = (
    "deprecation", "locks", "upstream", "recipe", "presets", "losses", "quantizer", "controller", "vlm", "schemes",
    "vllm_constraints", "trainable", "data", "digest", "teacher", "export", "objective", "modifier", "run", "serve",
    "report", "cli",
)  # fmt: skip
APART = {"losses", "quantizer", "controller"}
LEAST = {  # what the small rooms may import from outside the standard library
    "deprecation": set(),
    "controller": set(),
    "recipe": {"pydantic"},
    "presets": {"pydantic"},
    "losses": {"torch", "triton"},
    "quantizer": {"torch", "triton"},
    "serve": {"PIL", "numpy", "vllm"},
    "upstream": {"llmcompressor", "compressed_tensors", "torch", "transformers"},
}
BORDER = {"llmcompressor", "compressed_tensors"}
ROW_FORMAT = ("llava_format", "from_llava", "is_llava", "LLaVA format")  # of rows; any family trains on them
FILE_LINES, TEST_LINES, FUNCTION_LINES = 400, 800, 60


@lru_cache
def tree(path: Path) -> ast.Module:
    """The parsed source of `path`."""
    return ast.parse(path.read_text(), str(path))


def tracked(*endings: str) -> list[Path]:
    """Files git knows of (or would, were they added) that end so, without build outputs."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    names = [ROOT / name for name in listed.stdout.splitlines() if name.endswith(endings)]
    return [path for path in names if path.is_file()]


def sources() -> list[Path]:
    """Every Python file of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    """The room a file of the package stands in; "" for the package's own file."""
    first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imported(path: Path) -> Iterator[str]:
    """Full names of the modules a file imports, inside functions too (`from p import q` counts as p.q for our package)."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                package = path.relative_to(ROOT).parts[: -node.level]
                module = ".".join([*package, *([module] if module else [])])
            if module == "grace_plugin":
                yield from (f"grace_plugin.{name.name}" for name in node.names)
            else:
                yield module


def rooms_imported(path: Path) -> set[str]:
    """Rooms a file imports; names of the package's own file are no room."""
    parts = [name.split(".") for name in imported(path)]
    return {part[1] for part in parts if part[0] == "grace_plugin" and len(part) > 1 and part[1] in ROOMS}


def identity(path: Path) -> str:
    """How a file is called in a test report."""
    return str(path.relative_to(ROOT))


def test_every_room_has_its_place() -> None:
    assert {room_of(path) for path in sources()} - {""} <= set(ROOMS)


@pytest.mark.parametrize("path", sources(), ids=identity)
def test_a_room_imports_only_rooms_before_it(path: Path) -> None:
    room = room_of(path)
    if not room:
        return
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    assert not rooms_imported(path) & later
    if room in APART:
        assert not rooms_imported(path) & (APART - {room})


@pytest.mark.parametrize("path", sources(), ids=identity)
def test_outside_packages_stay_where_they_belong(path: Path) -> None:
    outside = {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"grace_plugin"}
    room = room_of(path)
    assert outside <= LEAST.get(room, outside)
    if room != "upstream":
        assert not outside & BORDER, "go through grace_plugin/upstream.py"
    assert "triton" not in outside or path.stem.endswith("_triton"), (
        "kernels stand apart, and every machine runs without them"
    )
    if path.name != "probe.py" or room != "serve":
        assert "vllm" not in outside, "vLLM lives in another interpreter"


@pytest.mark.parametrize("path", tracked(".py"), ids=identity)
def test_files_and_functions_are_short_and_explained(path: Path) -> None:
    most = FILE_LINES if path.is_relative_to(PACKAGE) else TEST_LINES
    assert len(path.read_text().splitlines()) <= most
    if path.is_relative_to(PACKAGE) or path.name.startswith("test_"):
        assert ast.get_docstring(tree(path)), "a file opens by saying what it does"
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert code_lines(node) <= FUNCTION_LINES, f"{node.name} (line {node.lineno})"


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring."""
    first = node.body[0]
    text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)
    docstring = (first.end_lineno or 0) - first.lineno + 1 if text else 0
    return (node.end_lineno or 0) - node.lineno + 1 - docstring


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p)], ids=identity)
def test_what_is_public_has_a_docstring(path: Path) -> None:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    bare = [
        node.name
        for node in tree(path).body
        if isinstance(node, kinds) and not node.name.startswith("_") and not ast.get_docstring(node)
    ]
    assert not bare


@pytest.mark.parametrize("path", tracked(".py", ".md", ".toml", ".yaml", ".txt", "Makefile", "run"), ids=identity)
def test_nothing_names_the_place_it_was_made(path: Path) -> None:
    words = [
        "/wo" + "rk/",
        r"pypi\.o" + "rg",
        r"registry\.npm" + "js",
        r"\bA[I]\b",
        r"\bag" + r"ents?\b",
        "/op" + "t/wheels",
        "<{7} |>{7} ",  # a conflict that was committed
    ]
    found = re.findall("|".join(words), path.read_text())
    assert not found


@pytest.mark.parametrize(
    "path", [p for p in tracked(".py") if "tests" in p.parts or "integration" in p.parts], ids=identity
)
def test_no_test_replaces_what_it_tests(path: Path) -> None:
    assert not {name for name in imported(path) if name.startswith("unittest.mock")}
    calls = [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    replaced = [
        call.func.attr
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and ast.unparse(call.func.value) == "monkeypatch"
        and [ast.unparse(argument) for argument in call.args[:2]] != ["sys", "'argv'"]
    ]
    assert set(replaced) <= {"setenv", "delenv", "chdir", "syspath_prepend"}


def words(path: Path) -> Iterator[str]:
    """Names and strings of a file's code; comments and docstrings may speak of anything."""
    owners = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    explained = {id(n.body[0].value) for n in ast.walk(tree(path)) if isinstance(n, owners) and ast.get_docstring(n)}  # type: ignore[attr-defined]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in explained:
            yield node.value
        for field in ("id", "attr", "name", "asname", "arg", "module"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@lru_cache
def family_names() -> str:
    """Regular expression of the registered families' names without their versions, and of a tower that one class serves."""
    from grace_plugin.vlm import FAMILIES

    return "|".join(sorted({re.split(r"[\d_]", name)[0] for name in FAMILIES} | {"pixtral"}))


@pytest.mark.parametrize("path", [p for p in sources() if room_of(p) != "vlm"], ids=identity)
def test_nothing_outside_vlm_names_a_family(path: Path) -> None:
    named = []
    for word in words(path):
        rest = re.sub("|".join(ROW_FORMAT), "", word)
        named += re.findall(family_names(), rest, re.IGNORECASE)
    assert not named, "what is special about a family belongs into grace_plugin/vlm/"


def test_family_names__of_the_registry__found_in_vlm() -> None:
    assert {"llava", "qwen", "gemma", "idefics"} <= set(family_names().split("|"))
    found = [word for path in sources() if room_of(path) == "vlm" for word in words(path)]
    assert any(re.search(family_names(), word) for word in found)


def test_importing_the_package_does_nothing_else() -> None:
    script = """
import logging, sys, torch
import llmcompressor, llmcompressor.modifiers, llmcompressor.pipelines
state = lambda: (logging.root.handlers[:], logging.root.level, torch.get_default_dtype(), torch.is_grad_enabled())
before, known = state(), set(sys.modules)
import grace_plugin
assert state() == before, (before, state())
new = set(sys.modules) - known
assert not {name for name in new if name.split(".")[0] in ("vllm", "optimum", "rich")}, new
assert not {name for name in new if name.startswith(("grace_plugin.serve", "examples.bundled_demo", "grace_plugin.cli"))}, new
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    "command", ["optimum-cli --help", "optimum-cli grace --help", "grace --help", "grace train --help"]
)
def test_help_comes_without_loading_torch(command: str) -> None:
    name, *arguments = command.split()
    script = f"""
import sys
from importlib.metadata import entry_points
start = entry_points(group="console_scripts", name={name!r})[{name!r}].load()
sys.argv = {[name, *arguments]}
try:
    start()
finally:
    print("loaded", sorted({{"torch", "llmcompressor", "transformers"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "grace" in done.stdout
    assert "loaded []" in done.stdout
