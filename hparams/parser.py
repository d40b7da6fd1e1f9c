"""The command line as words: argparse, with one-line errors that say what was meant."""

import argparse
import difflib
import sys

from utils.errors import printable
from utils.job import first_to_tell


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors that suggest what was meant."""

    def error(self, message):
        if first_to_tell():
            print(f"{self.prog}: error: {printable(' '.join(str(message).splitlines()))}", file=sys.stderr)
        raise SystemExit(2)

    def parse(self, argv):
        """argv (default: the process's own) -> {flag: value} of what was given."""
        argv = sys.argv[1:] if argv is None else argv
        self._check_words(argv)
        known, unknown = self.parse_known_args(argv)
        if unknown:
            self.error(self._explain(unknown[0]))
        return vars(known)

    def _check_words(self, argv):
        """Explain a mistyped flag before argparse complains of a required one that was only mistyped."""
        flags, takes_value = self._option_string_actions, False
        for word in argv:
            name, equals, _ = word.partition("=")
            if word.startswith("--"):
                if name not in flags:
                    self.error(self._explain(word))
                takes_value = not equals and flags[name].nargs != 0
            else:
                if not takes_value and f"--{word}" in flags:
                    self.error(self._explain(word))
                takes_value = False

    def _explain(self, word):
        options = [o for o in self._option_string_actions if o.startswith("--")]
        if not word.startswith("-"):
            if f"--{word}" in options:
                return f"unexpected word '{word}': did you mean --{word}?"
            return f"unexpected word '{word}' (a flag takes it only right after its name)"
        near = difflib.get_close_matches(word.split("=")[0], options, n=1)
        return f"unknown flag {word}" + (f": did you mean {near[0]}?" if near else " (see --help)")


class _Switch(argparse.Action):
    """--name and --no_name: the second undoes a preset or a loaded configuration."""

    def __init__(self, option_strings, dest, **kw):
        super().__init__(option_strings, dest, nargs=0, **kw)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


def build_parser(flags, description, epilog):
    """A Parser in which nothing has a default, so that what was given is known."""
    required = " ".join(f"--{f.name} {_metavar(f)}" for f in flags if f.meta.get("required"))
    parser = Parser(
        usage=f"%(prog)s {required} [flags]",  # argparse would list all of them, on 50 lines
        description=description, epilog=epilog, allow_abbrev=False, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    groups = {}
    for flag in flags:
        if flag.group not in groups:
            groups[flag.group] = parser.add_argument_group(flag.group)
        groups[flag.group].add_argument(*_option_strings(flag), **_argparse_kw(flag))
    return parser


def _option_strings(flag):
    if flag.type is not bool:
        return (f"--{flag.name}",)
    positive = flag.name.removeprefix("no_")
    return f"--{flag.name}", f"--{positive}" if positive != flag.name else f"--no_{flag.name}"


def _argparse_kw(flag):
    meta = flag.meta
    kw = dict(dest=flag.name, help=(meta["help"] + _default_text(flag)).replace("%", "%%"))
    if meta.get("required"):
        kw["required"] = True
    if flag.type is bool:
        return dict(kw, action=_Switch)
    kw["type"] = flag.type
    if flag.is_list:
        kw["nargs"] = "+"
    if meta.get("choices"):
        kw["choices"] = meta["choices"]
    else:
        kw["metavar"] = _metavar(flag)
    return kw


def _metavar(flag):
    if flag.meta.get("choices"):
        return "{" + ",".join(map(str, flag.meta["choices"])) + "}"
    return flag.meta.get("metavar", {int: "INT", float: "FLOAT", str: "STR"}[flag.type])


def _default_text(flag):
    if flag.meta.get("required"):
        return " (required)"
    if flag.default is None:
        return ""  # the help itself says what is derived
    if flag.type is bool:
        return " (default: on)" if flag.default else " (default: off)"
    value = " ".join(map(str, flag.default)) if flag.is_list else flag.default
    return f" (default: {value})"
