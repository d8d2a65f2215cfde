"""The shape of the project: one direction of imports, small files, a README that names every file."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxlm").rglob("*.py"))
# Each may import those before it, and its own folder.
ORDER = (
    "errors cli keys arguments config meshes check data bits parallel kernels models losses optim rounding topology "
    "state decode costs count predict measure page search workdir checkpoint process start monitor respond metrics "
    "absent pictures score evaluator report neighbors lm laws space feasible trial study dissect programs"
).split()
PROGRAMS = {"train", "evaluate", "generate", "verify", "plan", "bench", "tune", "lora", "fitting"}


def box(module: str) -> str:
    """'jaxlm.data.store' -> 'data'."""
    name = module.split(".")[1]
    return "programs" if name in PROGRAMS else name


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(file: Path):
    """The jaxlm modules that a file imports, deferred imports too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            known = {module_of(f) for f in FILES}
            yield from (name if name in known else node.module for name in names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize(
    "file", [f for f in FILES if f.parent.name != "jaxlm" or f.name != "__init__.py"], ids=module_of
)
def test_imports_point_one_way(file):
    here = box(module_of(file))
    for name in imports(file):
        if name.startswith("jaxlm."):
            assert ORDER.index(box(name)) <= ORDER.index(here), f"{module_of(file)} imports {name}"
            if here == "programs":
                assert box(name) != "programs" or (module_of(file), name) == ("jaxlm.train", "jaxlm.evaluate")


def test_no_cycles():
    graph = {
        module_of(f): {n for n in imports(f) if n.startswith("jaxlm.")}
        for f in FILES
        if f.parent.name != "jaxlm" or f.name != "__init__.py"
    }
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, f"cycle: {open_[open_.index(module) :]}"
        if module not in done:
            open_.append(module)
            for name in graph.get(module, ()):
                visit(name)
            done.add(open_.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("name", ["data", "errors", "cli", "arguments", "keys", "config", "meshes", "check"])
def test_the_front_needs_no_jax(name):
    for file in FILES:
        if box(module_of(file) + "._") == name:
            assert not any(n.split(".")[0] in ("jax", "flax", "optax") for n in imports(file)), file


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_sizes(file):
    """A file has at most 500 lines, a function 60."""
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "base":  # base() is the table of keys
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


def test_the_train_step_fits_a_screen():
    tree = ast.parse((ROOT / "jaxlm/state.py").read_text())
    (step,) = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "train_step"]
    assert step.end_lineno - step.lineno + 1 <= 45


def test_no_hidden_defaults():
    """Every key has its default in config.base, never at the place of use."""
    for file in FILES:
        assert not re.search(r"config(\.\w+)*\.get\(", file.read_text()), file


def test_every_key_has_a_reason():
    source = (ROOT / "jaxlm/keys.py").read_text()
    lines = source[source.index("def base()") : source.index("return c.lock()")].splitlines()
    for above, line in pairwise(lines):
        if re.match(r"    c?[a-z.]+ = ", line) and "ConfigDict()" not in line:
            assert "#" in line or above.strip().startswith("#"), line


def test_readme_names_every_file():
    readme = (ROOT / "README.md").read_text()
    missing = [module_of(f) for f in FILES if f.name != "__init__.py" and f.name not in readme]
    assert not missing
    assert not [p.name for p in (ROOT / "configs").glob("*.py") if p.name not in readme]


def test_launchers_are_short():
    for script in (ROOT / "launch").glob("*.sh"):
        assert len(script.read_text().splitlines()) < 80, script
