"""Parses the words of a command line with argparse. Errors have one line and suggest the right flag."""

import argparse
import difflib
import itertools
import math
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

from hparams.config import Flag
from utils.core.errors import discard_output, printable
from utils.core.job import first_to_report

LINE = 65  # the number of characters of help text next to a flag, in lines of 100 characters
OTHERS = "others"
LEAST_GROUP = 3  # in the short help, smaller groups of flags have no heading of their own
YES_OR_NO = ("true", "false", "yes", "no", "on", "off", "1", "0")
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # editors and web pages replace "--" by these
# The names of flags in other programs.
OTHER_NAMES = {
    "lr": "learning_rate",
    "train_steps": "steps iterations max_steps epochs",
    "batch_size": "bs",
    "device": "gpu cuda",
    "num_workers": "workers",
    "custom_dataset_path": "data data_dir data_path",
    "log_dir": "output_dir out name",
    "load_step": "checkpoint ckpt",
    "img_size": "resolution image_size size",
    "amp": "fp16 bf16",
    "temp": "temperature",
    "n_samples": "n num_samples samples",
    "codebook_size": "codes",
    "bert_n_layers": "layers",
    "bert_n_head": "heads",
    "steps_per_log": "verbose",
}


class OneLineParser(argparse.ArgumentParser):
    """An argparse parser whose errors have one line. Only one process of a job prints an error."""

    def error(self, message: str) -> NoReturn:
        if first_to_report():
            print(f"{self.prog}: error: {printable(' '.join(str(message).splitlines()))}", file=sys.stderr)
        raise SystemExit(2)


def whole_number(word: str) -> int:
    """Read an int in the forms 1000, 1_000 and 1e3."""
    try:
        return int(word)
    except ValueError:
        value = float(word) if re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", word) else math.nan
        if not value.is_integer():
            raise argparse.ArgumentTypeError(f"{word!r} is not a whole number") from None
        return int(value)


def whole_between(least: int, most: int) -> Callable[[str], int]:
    """Return a reader of whole numbers from `least` to `most`, for argparse."""

    def read(word: str) -> int:
        value = whole_number(word)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not possible: give {least} to {most}")
        return value

    return read


def number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{word!r} is not a number") from None


NUMBERS: dict[type, Callable[[str], int | float]] = {int: whole_number, float: number}


class Parser(OneLineParser):
    """Parses the flags of a script. No flag has a default in the parser, so that the result holds only flags that were
    given. The help lists the required flags first, and then all other flags in their groups.

    brief: list only the first clause of each help text, and only the name of a switch that changes the default.
    """

    def __init__(self, flags: Sequence[Flag], description: str, epilog: str | None, brief: bool = False) -> None:
        self.flags = flags
        self.required = [flag for flag in flags if flag.meta.get("required")]
        words = " ".join(f"--{flag.name} {_metavar(flag)}" for flag in self.required)
        super().__init__(
            usage=f"%(prog)s {words} [flags]",  # argparse would list all flags, on 50 lines
            description=description,
            epilog=epilog,
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34),
            add_help=False,
        )
        self.groups: dict[str, Any] = {}
        self.names: list[str] = []
        for flag in self.required:
            self.add("required", *_options(flag), **_argparse_facts(flag, brief))
        for flag in flags:
            if flag not in self.required:
                self.add(flag.group, *_options(flag)[: 1 if brief else 2], **_argparse_facts(flag, brief))

    def add(self, group: str, *options: str, **facts: Any) -> None:
        """Add an argument to the group of this name, which is created if necessary."""
        if group not in self.groups:
            self.groups[group] = self.add_argument_group(group)
        self.groups[group].add_argument(*options, **facts)
        self.names += [option[2:] for option in options]

    def parse(self, argv: Sequence[str] | None) -> dict[str, Any]:
        """Parse argv (default: the command line of the process) -> {flag: value} of the flags that were given."""
        argv = sys.argv[1:] if argv is None else argv
        self._refuse_values_of_switches(argv)
        known, unknown = self.parse_known_args(argv)
        given = vars(known)
        for flag in self.flags:
            if flag.is_list and flag.type in NUMBERS and flag.name in given:  # each word may hold several numbers
                given[flag.name] = [number for numbers in given[flag.name] for number in numbers]
        missing = [f"--{flag.name}" for flag in self.required if flag.name not in given]
        if unknown:
            self.error(self._explain(unknown[0], missing))
        if missing:
            self.error(f"the following arguments are required: {', '.join(missing)}")
        return given

    def _refuse_values_of_switches(self, argv: Sequence[str]) -> None:
        switches = {option: flag for flag in self.flags if flag.type is bool for option in _options(flag)}
        for word, following in itertools.pairwise([*argv, ""]):
            option, equals, _ = word.partition("=")
            if option in switches and (equals or following.lower() in YES_OR_NO):
                on, off = _options(switches[option])
                self.error(f"{option} takes no value: write {on} or {off}")

    def _explain(self, word: str, missing: Sequence[str]) -> str:
        """Return the message for a word that is neither a flag nor the value of a flag. missing: required flags that
        were not given."""
        is_flag = word[:1] in DASHES
        bare = word.split("=")[0].lstrip(DASHES).replace("-", "_").lower()
        found = [name for name in self.names if name == bare]
        if is_flag and not found:
            found = [name for name in self.names if bare in OTHER_NAMES.get(name, "").split()]
            found = found or difflib.get_close_matches(bare, self.names, n=1)
        meant = f"did you mean --{found[0]}?" if found else ""
        if is_flag:
            see = "--help_all" if "help_all" in self.names else "--help"
            return f"unknown flag {word}" + (f": {meant}" if meant else f" (see {see})")
        if not meant and len(missing) == 1:
            meant = f"did you mean {missing[0]} {word}?"
        return f"unexpected word '{word}'" + (f": {meant}" if meant else " (a flag takes it only right after its name)")


class _Help(argparse.Action):
    """Print the help of a parser (`const`) and exit."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        try:
            self.const.print_help()
            sys.stdout.flush()
        except BrokenPipeError:  # a command such as `--help | head` closes the pipe
            discard_output()
        parser.exit()


class _Switch(argparse.Action):
    """Handles --name and --no_name. --no_name undoes a preset or a loaded configuration."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def build_parser(
    flags: Sequence[Flag], description: str, epilog: str | None, shown: Iterable[str] | None = None
) -> Parser:
    """Build the parser of a script. shown: names of flags for the short help. --help then shows these flags and the
    required flags, and --help_all shows all flags. If shown is None, --help shows all flags."""
    parser = short = Parser(flags, description, epilog)
    if shown is not None:
        few = _merged([flag for flag in flags if flag.name in shown or flag.meta.get("required")])
        examples = next((part for part in (epilog or "").split("\n\n") if part.startswith("example")), None)
        short = Parser(few, description, examples, brief=True)
        more = f"all {len(flags)} flags with their complete descriptions"
        for each in (parser, short):
            each.add(OTHERS, "--help_all", action=_Help, nargs=0, const=parser, help=more)
        rest = [f"--{flag.name}" for flag in flags if flag.name not in short.names]
        names = textwrap.fill(" ".join(rest), 110, initial_indent="  ", subsequent_indent="  ")
        short.add_argument_group("the rest, by name (what they mean: --help_all)", names)
    parser.add_argument("-h", "--help", action=_Help, nargs=0, const=short, help=argparse.SUPPRESS)
    return parser


def _merged(flags: Sequence[Flag]) -> list[Flag]:
    """Move the flags of small groups into one group at the end, which saves the lines of their headings."""
    counts = Counter(flag.group for flag in flags if not flag.meta.get("required"))
    small = [replace(flag, group=OTHERS) for flag in flags if counts[flag.group] < LEAST_GROUP]
    return [flag for flag in flags if counts[flag.group] >= LEAST_GROUP] + small


def _options(flag: Flag) -> list[str]:
    if flag.type is not bool:
        return [f"--{flag.name}"]
    positive = flag.name.removeprefix("no_")
    return [f"--{flag.name}", f"--{positive}" if positive != flag.name else f"--no_{flag.name}"]


def _argparse_facts(flag: Flag, brief: bool) -> dict[str, Any]:
    text = (_brief(flag) if brief else flag.meta["help"] + _default(flag)).replace("%", "%%")
    facts: dict[str, Any] = dict(dest=flag.name, help=text)
    if flag.type is bool:
        return dict(facts, action=_Switch, nargs=0)
    if flag.is_list:
        facts.update(nargs="+", action="extend" if flag.meta.get("repeatable") else "store")
    # argparse does not check the choices, because hparams.sources.checked checks all values.
    read: Callable = NUMBERS.get(flag.type, flag.type)
    if flag.is_list and flag.type in NUMBERS:
        return dict(facts, type=lambda words: [read(word) for word in words.split(",") if word], metavar=_metavar(flag))
    return dict(facts, type=read, metavar=_metavar(flag))


def _metavar(flag: Flag) -> str:
    usual = {int: "INT", float: "FLOAT", str: "STR"}[flag.type]
    if flag.meta.get("choices"):
        usual = "{" + ",".join(map(str, flag.meta["choices"])) + "}"
    return flag.meta.get("metavar", usual)


def _default(flag: Flag) -> str:
    if flag.default is None or flag.type is bool:
        return ""  # the help text describes derived values, and switches are off by default
    value = " ".join(map(str, flag.default)) if flag.is_list else flag.default
    return f" (default: {value})"


def _brief(flag: Flag) -> str:
    """Return the first clause of the help text, and the default if there is room."""
    text = flag.meta["help"] + _default(flag)
    default = re.search(r" \(default: .*\)$", text)
    first = re.split(r"; | \((?!or )", text)[0]
    if len(first) > LINE:
        first = first[:LINE].rpartition(", ")[0] or first
    return first + (default.group() if default and len(first + default.group()) <= LINE else "")
