"""What imports what, read from the source, imports inside functions included; how many files an update reads."""

import ast
import sys

import pytest
import torch
from conftest import ROOT
from scripts import vqgan_flags

import train_vqgan
from hparams import get_hparams
from models.build import build_vqgan
from utils.core.seed import StepRandom
from utils.training.amp import Precision

FOLDERS = ("hparams", "utils", "models", "experiments")
# The folders, and what each may import besides itself. docs: the first lines of their __init__.py.
CORE = {"utils.core"}
MAY_IMPORT = {
    "utils.core": set(),
    "utils.data": CORE,
    "utils.evaluation": CORE,
    "utils.display": CORE,
    "utils.training": CORE | {"utils.data", "utils.evaluation", "utils.display"},
    "hparams": CORE,
    "models": CORE | {"utils.data"},
}
MAY_IMPORT["experiments.common"] = set(MAY_IMPORT)
# The exceptions: modules that may import more than their folder. docs/developing.md names them.
ALSO = {"models.pretrained": {"hparams"}}
# The benchmark times what the scripts do.
BENCHMARK = {"experiments.benchmark", "experiments.scaling", "experiments.common.jobs"}
# What parsing the command line may import: standard library only, so that --help is fast.
LIGHT = {"utils.core.errors", "utils.core.address", "utils.core.job", "utils.core.json_files"}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted([*ROOT.glob("*.py"), *(p for folder in FOLDERS for p in (ROOT / folder).rglob("*.py"))])
TREES = {module_name(p): ast.parse(p.read_text(encoding="utf-8"), str(p)) for p in FILES}


def folder_of(name):
    """The folder of MAY_IMPORT that a module is in; None for scripts."""
    return next((f for f in sorted(MAY_IMPORT, key=len, reverse=True) if name == f or name.startswith(f + ".")), None)


PACKAGES = {module_name(p) for p in FILES if p.name == "__init__.py"}
SCRIPTS = {name for name in TREES if folder_of(name) is None} - PACKAGES


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


def modules_in(folder):
    return [name for name in TREES if folder_of(name) == folder]


def test_there_is_something_to_read():
    assert {"train_vqgan", "train_sampler", "experiments.calc_FID"} <= SCRIPTS
    assert all(len(modules_in(folder)) > 2 for folder in MAY_IMPORT)
    assert "hparams.config" in imports("hparams.resolve") and "utils.core.errors" in imports("hparams.resolve")


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_imports_what_it_may(folder):
    for name in set(modules_in(folder)) - BENCHMARK:
        ours = {m for m in imports(name) if m in TREES}
        forbidden = {m for m in ours if folder_of(m) not in MAY_IMPORT[folder] | ALSO.get(name, set()) | {folder}}
        assert not forbidden, name


def test_the_exceptions_are_needed_and_imported_late():
    for name, folders in ALSO.items():
        assert folders <= {folder_of(m) for m in imports(name)}, f"{name} is no exception"
        inside = {other for other in modules_in(folder_of(name)) if name in imports(other)}
        assert inside == {folder_of(name)} and name not in at_the_top(folder_of(name))


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_a_folder_states_what_it_imports(folder):
    stated = ast.get_docstring(TREES[folder])
    assert stated and len(stated.splitlines()) <= 2
    for other in MAY_IMPORT[folder]:
        assert other in stated or "all" in stated, f"{folder} may import {other}"


def test_nothing_imports_a_script_but_the_benchmark():
    for name in set(TREES) - BENCHMARK:
        assert not {m for m in imports(name) if m in SCRIPTS}, name


def test_experiments_holds_scripts_only():
    for name in SCRIPTS:
        source = (ROOT / (name.replace(".", "/") + ".py")).read_text(encoding="utf-8")
        assert 'if __name__ == "__main__":' in source, name


@pytest.mark.parametrize("name", [*modules_in("hparams"), *LIGHT])
def test_parsing_the_command_line_imports_the_standard_library_only(name):
    ours = {m for m in imports(name) if folder_of(m) == "hparams" or m in LIGHT}
    others = {m for m in imports(name) if m.split(".")[0] not in sys.stdlib_module_names} - ours
    assert others <= {"yaml"}
    assert "yaml" not in at_the_top(name)


def test_no_circles():
    graph = {name: {m for m in imports(name) if m in TREES} - {name} for name in TREES}
    while graph:
        free = [name for name, needed in graph.items() if not needed & graph.keys()]
        assert free, f"these modules import each other in a circle: {sorted(graph)}"
        for name in free:
            del graph[name]


def test_ascii():
    for path in [*FILES, *(ROOT / "tests").rglob("*.py")]:
        assert path.read_bytes().isascii(), path


@pytest.mark.parametrize("name", modules_in("models"))
def test_models_name_no_device(name):
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert node.value.split(":")[0] not in ("cuda", "mps"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("cuda", "mps"), f"line {node.lineno}"


def test_an_update_of_stage_1_runs_through_few_files():
    H = get_hparams("vqgan", "", vqgan_flags("unused", "unused", "--diff_aug"))
    precision = Precision(False, "auto", torch.device("cpu"))
    vqgan = build_vqgan(H)
    vqgan.perceptual = lambda x, x_hat: (x - x_hat).square().mean((1, 2, 3))
    ae_optim, disc_optim = (torch.optim.Adam(part.parameters()) for part in (vqgan.ae, vqgan.disc))
    x, step = torch.rand(2, 3, H.img_size, H.img_size), H.disc_start_step + 1
    rng = StepRandom("vqgan", 0, step)

    def update():
        x_hat = train_vqgan.generator_step(vqgan, ae_optim, precision, H, x, step, rng)[1]
        train_vqgan.discriminator_step(vqgan, disc_optim, precision, H, x, x_hat, rng)

    update()
    code = set()
    sys.setprofile(lambda frame, event, value: code.add(frame.f_code.co_filename))
    try:
        update()
    finally:
        sys.setprofile(None)
    read = code & {str(path) for path in FILES}
    assert str(ROOT / "models/discriminator.py") in read and len(read) <= 8, sorted(read)
