"""How many faults are tried (FAULTS=full: all of them; otherwise a sample for `make test`), what became of them,
and the runs that they happen to."""

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from conftest import draw_shapes

from faults.forks import Disk, forked, read_events
from faults.stages import EXPERIMENTS, STAGES, train_autoencoder

FULL = os.environ.get("FAULTS") == "full"


@pytest.fixture(scope="session")
def few_or_all():
    """few_or_all(few, all): the number for this session."""
    return lambda few, everything: everything if FULL else few


_FIGURES = {}


@pytest.fixture(scope="session")
def figures():
    """figures(name)[outcome] += 1: counted, and printed when all is done."""
    return lambda name: _FIGURES.setdefault(name, Counter())


def pytest_terminal_summary(terminalreporter):
    if not _FIGURES:
        return
    terminalreporter.section("faults" if FULL else "faults (a sample; FAULTS=full for all)")
    for name, counts in sorted(_FIGURES.items()):
        shown = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
        terminalreporter.write_line(f"{name}: {sum(counts.values())} tried: {shown}")


@pytest.fixture(scope="session")
def workshop(tmp_path_factory):
    """A folder with datasets.yaml, images and a trained autoencoder logs/ae (step 2). As it is made in this
    process, all that torch imports late is there when children are forked."""
    folder = tmp_path_factory.mktemp("workshop")
    draw_shapes(folder / "data" / "shapes", 20, size=12)
    draw_shapes(folder / "data" / "others", 3, size=12, seed=1)
    (folder / "datasets.yaml").write_text("pics:\n  paths: data/shapes\n")
    before = os.getcwd()
    os.chdir(folder)
    try:
        train_autoencoder()
    finally:
        os.chdir(before)
    return folder


@pytest.fixture(scope="session")
def new_place(workshop, tmp_path_factory):
    """new_place(): a new folder with the workshop's images, datasets.yaml and autoencoder."""

    def make():
        folder = tmp_path_factory.mktemp("place")
        (folder / "data").symlink_to(workshop / "data")
        shutil.copy(workshop / "datasets.yaml", folder)
        shutil.copytree(workshop / "logs", folder / "logs")
        return folder

    return make


@pytest.fixture(scope="session")
def whole(new_place):
    """whole(stage, *flags): (folder of the uninterrupted run, its events)."""
    known = {}

    def run(stage, *flags):
        if (stage, flags) not in known:
            place = new_place()
            outcome = forked(STAGES[stage](*flags), place, Disk(record=place / "events.json"))
            assert outcome.code == 0, outcome.text
            known[stage, flags] = place / "logs" / "run", read_events(place / "events.json")
        return known[stage, flags]

    return run


@pytest.fixture(scope="session")
def trained_place(new_place, whole):
    """trained_place(): one of those, with a prior logs/run (step 4), too."""
    run, _ = whole("sampler", "--train_steps", "4")

    def make():
        folder = new_place()
        shutil.copytree(run, folder / "logs" / "run")
        return folder

    return make


@pytest.fixture(scope="session")
def finished_experiment(trained_place):
    """finished_experiment(script): (place of the experiment without faults, its events)."""
    known = {}

    def run(script):
        if script not in known:
            place = trained_place()
            outcome = forked(EXPERIMENTS[script], place, Disk(record=place / "events.json"))
            assert outcome.code == 0, outcome.text
            known[script] = place, read_events(place / "events.json")
        return known[script]

    return run


@pytest.fixture
def place(new_place):
    """One such folder, removed when the test has passed."""
    folder = new_place()
    yield folder
    shutil.rmtree(folder)


def pytest_collection_modifyitems(items):
    """Where all is tried, a test takes longer than any other's limit."""
    here = Path(__file__).parent
    for item in items:
        if FULL and here in item.path.parents:
            item.add_marker(pytest.mark.timeout(7200))
