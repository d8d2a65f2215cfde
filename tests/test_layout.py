"""The shape of the project: one direction of imports, small folders, files and functions, and code at a low density."""

import ast
import io
import re
import tokenize
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "jaxlm").rglob("*.py"))
# Each folder may import those before it, and itself; the programs stand side by side.
ORDER = "errors cli config data parallel kernels models step run plan generate evaluate programs".split()
PROGRAMS = ("train", "verify", "tune", "bench", "lora", "fitting")
TOP = {"__init__", "__main__"}  # jaxlm.load, and the list of programs: each imports what it starts
NO_JAX = ("data", "errors", "cli", "config")


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def folder_of(module: str) -> str:
    """'jaxlm.data.files.tables' -> 'data', of a program's 'programs'."""
    name = module.split(".")[1]
    if name in PROGRAMS:
        return "programs"
    return name


def is_top(file: Path) -> bool:
    return file.parent == ROOT / "jaxlm" and file.stem in TOP


INSIDE = [file for file in FILES if not is_top(file)]
KNOWN = {module_of(file) for file in FILES}


def imports(file: Path):
    """The modules that a file imports, deferred imports too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield name if name in KNOWN else node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def own_imports(file: Path) -> set[str]:
    return {name for name in imports(file) if name.startswith("jaxlm.")}


@pytest.mark.parametrize("file", INSIDE, ids=module_of)
def test_imports_point_one_way(file):
    here = folder_of(module_of(file))
    for name in own_imports(file):
        there = folder_of(name)
        assert ORDER.index(there) <= ORDER.index(here), f"{module_of(file)} imports {name}"
        if here == there == "programs":
            assert name.split(".")[1] == module_of(file).split(".")[1], (
                f"{module_of(file)} imports {name}"
            )


def test_no_cycles():
    graph = {}
    for file in INSIDE:
        graph[module_of(file)] = own_imports(file)
    done = set()
    open_ = []

    def visit(module):
        assert module not in open_, f"cycle: {open_[open_.index(module) :]}"
        if module not in done:
            open_.append(module)
            for name in graph.get(module, ()):
                visit(name)
            done.add(open_.pop())

    for module in graph:
        visit(module)


@pytest.mark.parametrize("name", NO_JAX)
def test_the_front_needs_no_jax(name):
    for file in INSIDE:
        if folder_of(module_of(file)) == name:
            found = set()
            for module in imports(file):
                found.add(module.split(".")[0])
            assert not found & {"jax", "flax", "optax"}, file


def test_folders_are_small():
    """At most 14 modules in a folder; four files at the top."""
    sizes = Counter(file.parent for file in FILES if file.name != "__init__.py")
    assert max(sizes.values()) <= 14, sizes.most_common(3)
    assert sorted(file.name for file in (ROOT / "jaxlm").glob("*.py")) == [
        "__init__.py",
        "__main__.py",
        "cli.py",
        "errors.py",
    ]


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_sizes(file):
    """A file has at most 500 lines, a function 60."""
    text = file.read_text()
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and node.name != "base":  # base() is the table of keys
            length = node.end_lineno - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


# ---------------------------------------------------------------- density

COUNTED = (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
TOKENS = {"jaxlm": 9, "tests": 10}  # a line of code, at most
CONSTRUCTS = {  # per 1,000 lines of the product, at most
    "conditional": 12,
    "tuple assignment": 6,
    "comprehension": 20,
    "lambda": 8,
    "nested conditional": 0,
    "nested comprehension": 0,
    "named lambda": 0,
}
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def code_tokens(text: str) -> list[int]:
    """The line of each token of code; docstrings and comments don't count."""
    docs = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node) is not None:
            docs.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return [
        token.start[0] for token in tokens if token.type in COUNTED and token.start[0] not in docs
    ]


def tokens_per_line(files) -> float:
    tokens = 0
    lines = 0
    for file in files:
        found = code_tokens(file.read_text())
        tokens += len(found)
        lines += len(set(found))
    return tokens / lines


def holds(node: ast.AST, kinds) -> bool:
    return any(isinstance(inner, kinds) for inner in ast.walk(node) if inner is not node)


def constructs(files) -> Counter:
    """How many there are of what makes a line hard to read, and of lines."""
    found = Counter()
    for file in files:
        text = file.read_text()
        found["lines"] += len(text.splitlines())
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.IfExp):
                found["conditional"] += 1
                found["nested conditional"] += holds(node, ast.IfExp)
            elif isinstance(node, COMPREHENSIONS):
                found["comprehension"] += 1
                nested = len(node.generators) > 1 or holds(node, COMPREHENSIONS)
                found["nested comprehension"] += nested
            elif isinstance(node, ast.Lambda):
                found["lambda"] += 1
            elif isinstance(node, ast.Assign):
                pair = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
                found["tuple assignment"] += pair
                found["named lambda"] += isinstance(node.value, ast.Lambda)
    return found


@pytest.mark.parametrize(("folder", "most"), TOKENS.items())
def test_lines_are_short(folder, most):
    assert tokens_per_line(sorted((ROOT / folder).rglob("*.py"))) <= most


def test_what_is_hard_to_read_is_rare():
    found = constructs(FILES)
    for name, most in CONSTRUCTS.items():
        rate = 1000 * found[name] / found["lines"]
        assert rate <= most, f"{name}: {rate:.1f} per 1,000 lines"


def test_the_train_step_fits_a_screen():
    """With all that it calls in its file: at most 80 lines and 500 tokens of code."""
    text = (ROOT / "jaxlm/step/state.py").read_text()
    functions = {}
    for n in ast.parse(text).body:
        if isinstance(n, ast.FunctionDef):
            functions[n.name] = n
    called = set()
    to_visit = ["train_step", "gradients", "apply_gradients"]
    while to_visit:
        name = to_visit.pop()
        if name not in called:
            called.add(name)
            inside = ast.walk(functions[name])
            to_visit += [n.id for n in inside if isinstance(n, ast.Name) and n.id in functions]
    own = set()
    for name in called:
        own.update(range(functions[name].lineno, functions[name].end_lineno + 1))
    tokens = []
    for line in code_tokens(text):
        if line in own:
            tokens.append(line)
    assert len(set(tokens)) <= 80
    assert len(tokens) <= 500


# ---------------------------------------------------------------- what is written once


def test_no_hidden_defaults():
    """Every key has its default in config.base, never at the place of use."""
    for file in FILES:
        assert not re.search(r"config(\.\w+)*\.get\(", file.read_text()), file


def test_every_key_has_a_reason():
    source = (ROOT / "jaxlm/config/keys.py").read_text()
    lines = source[source.index("def base()") : source.index("return c.lock()")].splitlines()
    for above, line in pairwise(lines):
        if re.match(r"    c?[a-z.]+ = ", line) and "ConfigDict()" not in line:
            assert "#" in line or above.strip().startswith("#"), line


def test_readme_names_every_recipe():
    readme = (ROOT / "README.md").read_text()
    assert not [p.name for p in (ROOT / "configs").glob("*.py") if p.name not in readme]


def test_the_map_names_every_file():
    """CONTRIBUTING.md has a line for each file, below its folder."""
    page = (ROOT / "CONTRIBUTING.md").read_text()
    named = set()
    folders = []
    for line in page[page.index("jaxlm/\n") :].split("```")[0].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders[depth:] = [name]
        if name.endswith(".py"):
            named.add("".join(folders))
    assert named == {str(file.relative_to(ROOT)) for file in FILES if file.name != "__init__.py"}


def test_the_table_of_laws_names_files_that_exist():
    page = (ROOT / "tests/README.md").read_text()
    named = re.findall(r"`(\w[\w/]*/|[\w/]*test_\w+\.py)`", page)
    assert len(named) > 40
    for name in named:
        assert list((ROOT / "tests").rglob(name)), name


def test_launchers_are_short():
    for script in (ROOT / "launch").glob("*.sh"):
        assert len(script.read_text().splitlines()) < 80, script
