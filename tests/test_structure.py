"""What imports what, read from the source: the rooms of the house and the doors between them."""

import ast
import sys

import pytest
from conftest import ROOT

ROOMS = ("hparams", "utils", "models", "experiments")
STDLIB = sys.stdlib_module_names
LIGHT = ("utils.errors", "utils.address", "utils.job", "utils.json_files")  # what parsing the command line may import


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted([*ROOT.glob("*.py"), *(p for room in ROOMS for p in (ROOT / room).rglob("*.py"))])
TREES = {module_name(p): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in FILES}
SCRIPTS = {name for name in TREES if "." not in name and name not in ROOMS}


def imports(name, nodes=None):
    """The modules that a module imports, each as deep as it names a file of ours."""
    for node in ast.walk(TREES[name]) if nodes is None else nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            for alias in node.names:
                deeper = f"{node.module}.{alias.name}"
                yield deeper if deeper in TREES else node.module


def at_the_top(name):
    """Imports that run when the module is imported: not those in functions."""
    nodes, stack = [], [TREES[name]]
    while stack:
        for child in ast.iter_child_nodes(stack.pop()):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                nodes.append(child)
                stack.append(child)
    return set(imports(name, nodes))


def room(name):
    return name.split(".")[0]


def of_room(wanted):
    return [name for name in TREES if room(name) == wanted]


def test_there_is_something_to_read():
    assert {"train_vqgan", "train_sampler"} <= SCRIPTS
    assert all(len(of_room(r)) > 3 for r in ROOMS)
    assert "hparams.config" in imports("hparams.resolve") and "utils.errors" in imports("hparams.resolve")


@pytest.mark.parametrize(
    ("source", "forbidden"),
    [
        ("hparams", {"models", "experiments", *SCRIPTS}),
        ("utils", {"models", "hparams", "experiments", *SCRIPTS}),
        ("models", {"experiments", *SCRIPTS}),
        ("experiments", SCRIPTS),
    ],
)
def test_imports_run_one_way(source, forbidden):
    for name in of_room(source):
        if name == "experiments.jobs":  # of the benchmark, which times what the scripts do: it stands above them
            continue
        assert not {m for m in imports(name) if room(m) in forbidden}, name


@pytest.mark.parametrize("name", [*of_room("hparams"), *LIGHT])
def test_parsing_the_command_line_imports_the_standard_library_only(name):
    ours = {m for m in imports(name) if room(m) == "hparams" or m in LIGHT}
    others = {m for m in imports(name) if room(m) not in STDLIB} - ours
    assert others <= {"yaml"}
    assert "yaml" not in at_the_top(name)


def test_no_circles():
    graph = {name: {m for m in at_the_top(name) if m in TREES} - {name} for name in TREES}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert free, f"these modules import each other in a circle: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_ascii():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert path.read_bytes().isascii(), path


@pytest.mark.parametrize("name", of_room("models"))
def test_models_name_no_device(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.split(":")[0] not in ("cuda", "mps"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("cuda", "mps"), f"line {node.lineno}"
