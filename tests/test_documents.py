"""The documents: links lead somewhere, commands are those of the scripts, README.md stays short."""

import re
import runpy
import shutil
from functools import cache

import pytest
from conftest import ROOT

from hparams import get_hparams
from hparams.config import ALL_FLAGS, ARCHITECTURE, RECORDED, names_of
from hparams.presets import PRESETS
from utils.evaluation.weight_files import WEIGHT_FILES

PAGES = [
    ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "logs" / "README.md", *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
FAMILIES = {"train_vqgan.py": "vqgan", "train_sampler.py": "sampler"}
FENCE = re.compile(r"^```[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SCRIPT = re.compile(r"(?:\w+/)*\w+\.py")


def prose(page):
    """The text of a page without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page):
    """The anchors of a page's headings, as GitHub forms them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def commands(block):
    """The commands of a fenced block as lists of words, continued lines joined, comments left out."""
    lines = re.sub(r"#.*", "", block.replace("\\\n", " ")).splitlines()
    return [words for line in lines if (words := line.split())]


def script_call(words):
    """(script, its words) of a command that runs one of the repository's scripts, or None."""
    if words[0] not in ("python", "torchrun", "srun") or "pytest" in words:
        return None
    at = next((i for i, word in enumerate(words) if SCRIPT.fullmatch(word)), None)
    return None if at is None else (words[at], words[at + 1 :])


def blocks():
    """(page, text before, fenced block) of each fenced block."""
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(text):
            yield page, text[: match.start()], match[1]


CALLS = sorted({
    (script, *words) for _, _, block in blocks() for command in commands(block)
    if (call := script_call(command)) for script, words in [call]
})  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_lead_to_files_and_anchors(page):
    links = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_file() and target.is_relative_to(ROOT), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_reachable_from_the_readme():
    linked = {(ROOT / name).resolve() for name in re.findall(r"\]\(([\w/.-]+\.md)", prose(ROOT / "README.md"))}
    assert linked >= set(PAGES) - {ROOT / "README.md"}


def test_the_readme_is_short_and_lists_its_contents():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 180
    listed = set(re.findall(r"\]\(#([\w-]+)\)", text))
    assert listed == {re.sub(r"\W+", "-", t.lower().replace("'", "")) for t in re.findall(r"^## (.+)$", text, re.M)}


def test_python_has_one_spelling_and_the_environment_is_active_first():
    for page, _, block in blocks():
        for words in commands(block):
            assert words[0] != "python3" or words[1:] == ["-m", "venv", ".venv"], (page.name, words)
    checked = 0
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        if (first := re.search(r"(^|`)(python|torchrun) \S*\w\.py", text, re.MULTILINE)) is not None:
            assert "source .venv/bin/activate" in text[: first.start()], page.name
            checked += 1
    assert checked > 8


def test_the_table_of_weights_is_complete():
    rows = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").splitlines()
    for name, weights in WEIGHT_FILES.items():
        (row,) = [row for row in rows if row.startswith("|") and weights.file in row]
        assert f" {weights.address} " in row and f"`python experiments/get_weights.py {name}`" in row
        assert f"`--{weights.flag} PATH`" in "\n".join(rows)


def test_the_flags_that_a_resume_may_change_are_those_of_the_roles():
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("| flags | on `--resume` |")[1]
    rows = text.split("\n\n")[0].strip().splitlines()[1:]
    listed = [re.findall(r"`--(\w+)`", row.split("|")[1]) for row in rows]
    new = {*names_of("place", "request", "dashboard")}
    stay = {*names_of(*ARCHITECTURE, "data", "origin"), "preset"}
    every = {flag.name for flag in ALL_FLAGS if flag not in RECORDED and "ignored" not in flag.roles}
    assert [sorted(names) for names in listed] == [sorted(every - new - stay), sorted(new), sorted(stay)]


def test_the_commands_for_own_images_name_the_last_steps_of_their_preset():
    (block,) = [block for page, _, block in blocks() if page.name == "README.md" and "--preset small" in block]
    steps = {family: str(PRESETS["small"][family]["train_steps"]) for family in ("vqgan", "sampler")}
    assert set(re.findall(r"--ae_load_step (\d+)", block)) == {steps["vqgan"]}
    assert re.findall(r"--load_step (\d+)", block) == [steps["sampler"]] and "--train_steps" not in block


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    wanted = {w for p in PAGES for w in re.findall(r"\bmake ([a-z.][\w./-]*)", "\n".join(quoted(p)))}
    assert "demo" in wanted
    assert wanted <= targets


def quoted(page):
    """The code of a page: fenced blocks, and spans between backquotes."""
    yield from FENCE.findall(page.read_text(encoding="utf-8"))
    yield from re.findall(r"`([^`]+)`", prose(page))


def test_a_block_that_runs_a_script_states_what_it_needs():
    checked = 0
    for page, before, block in blocks():
        if any(map(script_call, commands(block))):
            paragraphs = before.strip().split("\n\n")[-2:]
            assert any(re.search(r"\bneeds?\b", text) for text in paragraphs), (page.name, block)
            checked += 1
    assert checked > 10


@cache
def command_line(script):
    """What a script passes to get_hparams, or None if all its flags are its own."""
    if script in FAMILIES:
        return dict(family=FAMILIES[script], description="")
    return runpy.run_path(str(ROOT / script), run_name="script").get("COMMAND_LINE")


def known_flags(script, capsys):
    """The flags that the script's own help lists, with those that switch them off."""
    with pytest.raises(SystemExit):
        if line := command_line(script):
            get_hparams(argv=["--help_all"], **line)
        run_help(script)
    return set(re.findall(r"--\w+", capsys.readouterr().out))


def run_help(script):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [script, "--help"])
        runpy.run_path(str(ROOT / script), run_name="__main__")


@pytest.mark.parametrize("call", CALLS, ids=lambda call: " ".join(call)[:60])
def test_commands_are_understood(call, tmp_path, monkeypatch, capsys):
    """A complete command resolves as --dry_run resolves it; of one with '...' the flags exist."""
    script, *words = call
    assert (ROOT / script).is_file()
    flags = {word.split("=")[0] for word in words if word.startswith("--")}
    assert flags <= known_flags(script, capsys)
    if "..." in words:
        return
    shutil.copy(ROOT / "datasets.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    line = command_line(script)
    if line is not None:
        H = get_hparams(argv=[*words, "--dry_run"], script="x", **line)
        assert {f"--{name}" for name in H.explicit} == flags | {"--dry_run"}


def test_flags_in_the_text_exist(capsys):
    """Every --flag between backquotes belongs to a script, or to a tool that the text names."""
    known = {"--help", "--help_all", "--my_flag"}
    for script in [*FAMILIES, *(f"experiments/{p.name}" for p in (ROOT / "experiments").glob("*.py"))]:
        text = (ROOT / script).read_text(encoding="utf-8")
        known.update(re.findall(r'add_argument\(\s*"(--\w+)"', text))
        if script in FAMILIES or re.search("COMMAND_LINE = |parse_own", text):
            known |= known_flags(script, capsys)
    known |= {"--max_restarts", "--nproc_per_node", "--fid", "--input1", "--input2"}  # of torchrun and torch-fidelity
    known |= {"--samples-resize-and-crop", "--build-constraints", "--torch-backend"}
    spans = " ".join(span for page in PAGES for span in re.findall(r"`([^`]+)`", prose(page)))
    found = set(re.findall(r"(?<![\w-])--\w[\w-]*", spans))
    assert len(found) > 60
    assert found <= known
