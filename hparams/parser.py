"""The command line as words: argparse, with one-line errors that say what was meant."""

import argparse
import difflib
import re
import sys
import textwrap
from collections import Counter
from dataclasses import replace

from utils.core.errors import printable
from utils.core.job import first_to_tell

LINE = 65  # characters of help beside a flag, where a line has 100
OTHERS = "others"
LEAST_GROUP = 3  # flags that have a heading of their own in the short help
DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2212"  # as editors and web pages make them of "--"
# What other programs call it.
OTHER_NAMES = dict(
    learning_rate=["lr"],
    steps=["train_steps"],
    iterations=["train_steps"],
    max_steps=["train_steps"],
    epochs=["train_steps"],
    bs=["batch_size"],
    gpu=["device"],
    cuda=["device"],
    workers=["num_workers"],
    data=["custom_dataset_path", "dataset"],
    data_dir=["custom_dataset_path"],
    data_path=["custom_dataset_path"],
    output_dir=["log_dir"],
    out=["log_dir"],
    name=["log_dir"],
    checkpoint=["load_step"],
    ckpt=["load_step"],
    resolution=["img_size"],
    image_size=["img_size"],
    size=["img_size"],
    fp16=["amp"],
    bf16=["amp"],
    temperature=["temp"],
    n=["n_samples"],
    num_samples=["n_samples"],
    samples=["n_samples", "n_sheets"],
    codes=["codebook_size"],
    layers=["bert_n_layers"],
    heads=["bert_n_head"],
    verbose=["steps_per_log"],
)


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
        flags, takes_value, in_list, stray = self._option_string_actions, False, False, []
        for word in argv:
            name, equals, _ = word.partition("=")
            if word.startswith("--"):
                if name not in flags:
                    self.error(self._explain(word))
                takes_value, in_list = not equals and flags[name].nargs != 0, flags[name].nargs == "+"
                continue
            if not takes_value and word not in flags:
                if self._meant(word, near=word[:1] in DASHES):
                    self.error(self._explain(word))
                stray += [] if in_list else [word]
            takes_value = False
        missing = [a.option_strings[0] for a in flags.values() if a.required and a.option_strings[0] not in argv]
        if stray and len(missing) == 1 and stray[0] and stray[0][0] not in DASHES:
            self.error(f"unexpected word '{stray[0]}': did you mean {missing[0]} {stray[0]}?")

    def _meant(self, word, near=True):
        """The flag that a word stands for but for dashes and case, or (near) the nearest; None if there is none."""
        names = [o[2:] for o in self._option_string_actions if o.startswith("--")]
        bare = word.split("=")[0].lstrip(DASHES).replace("-", "_").lower()
        if bare in names:
            return f"--{bare}"
        if not near:
            return None
        others = [name for name in OTHER_NAMES.get(bare, ()) if name in names]
        found = others or difflib.get_close_matches(bare, names, n=1)
        return f"--{found[0]}" if found else None

    def _explain(self, word):
        is_flag = word[:1] in DASHES
        meant = self._meant(word, near=is_flag)
        if is_flag:
            see = "--help_all" if "--help_all" in self._option_string_actions else "--help"
            return f"unknown flag {word}" + (f": did you mean {meant}?" if meant else f" (see {see})")
        return f"unexpected word '{word}'" + (
            f": did you mean {meant}?" if meant else " (a flag takes it only right after its name)"
        )


class _Help(argparse.Action):
    """Print the help of a parser (`const`) and leave."""

    def __init__(self, option_strings, dest, **kw):
        super().__init__(option_strings, dest, nargs=0, **kw)

    def __call__(self, parser, namespace, values, option_string=None):
        self.const.print_help()
        parser.exit()


class _Switch(argparse.Action):
    """--name and --no_name: the second undoes a preset or a loaded configuration."""

    def __init__(self, option_strings, dest, **kw):
        super().__init__(option_strings, dest, nargs=0, **kw)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == f"--{self.dest}")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """A column for the flags that is wide enough for most."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=34)


class _ShortFormatter(_Formatter):
    """One line a flag: of a switch only the side that is not the default, of the help the first clause."""

    def _format_action_invocation(self, action):
        return action.option_strings[0] if isinstance(action, _Switch) else super()._format_action_invocation(action)

    def _expand_help(self, action):
        text = super()._expand_help(action)
        default = re.search(r" \(default: .*\)$", text)
        first = re.split(r"; | \((?!or )", text)[0]
        if len(first) > LINE:
            first = first[:LINE].rpartition(", ")[0] or first
        return first + (default.group() if default and len(first + default.group()) <= LINE else "")


def build_parser(flags, description, epilog, shown=None):
    """A Parser in which nothing has a default, so that what was given is known.

    shown: names of flags; --help shows these and the required ones, --help_all all. None: --help shows all.
    """
    parser = _new_parser(flags, description, epilog, _Formatter)
    short = parser
    if shown is not None:
        few = _merged([flag for flag in flags if flag.name in shown or flag.meta.get("required")])
        examples = next((part for part in (epilog or "").split("\n\n") if part.startswith("example")), None)
        short = _new_parser(few, description, examples, _ShortFormatter)
        more = f"all {len(flags)} flags with their complete descriptions"
        for each in (parser, short):
            last = next((g for g in each._action_groups if g.title == OTHERS), None) or each.add_argument_group(OTHERS)
            last.add_argument("--help_all", action=_Help, const=parser, help=more)
        explained = {flag.name for flag in few}
        rest = [f"--{flag.name}" for flag in flags if flag.name not in explained]
        if rest:
            names = textwrap.fill(" ".join(rest), 96, initial_indent="  ", subsequent_indent="  ")
            short.add_argument_group("the rest, by name (what they mean: --help_all)").description = names
    parser.add_argument("-h", "--help", action=_Help, const=short, help=argparse.SUPPRESS)
    return parser


def _merged(flags):
    """Flags of groups with few of them, as of one group at the end: headings are lines, too."""
    counts = Counter(flag.group for flag in flags if not flag.meta.get("required"))
    small = [replace(flag, group=OTHERS) for flag in flags if counts[flag.group] < LEAST_GROUP]
    return [flag for flag in flags if counts[flag.group] >= LEAST_GROUP] + small


def _new_parser(flags, description, epilog, formatter):
    """Required flags first, then the others in their groups."""
    flags = sorted(flags, key=lambda flag: not flag.meta.get("required"))
    required = " ".join(f"--{f.name} {_metavar(f)}" for f in flags if f.meta.get("required"))
    parser = Parser(
        usage=f"%(prog)s {required} [flags]",  # argparse would list all of them, on 50 lines
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=formatter,
        add_help=False,
    )
    groups = {}
    for flag in flags:
        name = "required" if flag.meta.get("required") else flag.group
        if name not in groups:
            groups[name] = parser.add_argument_group(name)
        groups[name].add_argument(*_option_strings(flag), **_argparse_kw(flag))
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
        kw.update(nargs="+", action="extend" if meta.get("repeatable") else "store")
    return dict(kw, metavar=_metavar(flag))  # choices are checked where all values are: hparams.sources.checked


def _metavar(flag):
    if flag.meta.get("choices"):
        return "{" + ",".join(map(str, flag.meta["choices"])) + "}"
    return flag.meta.get("metavar", {int: "INT", float: "FLOAT", str: "STR"}[flag.type])


def _default_text(flag):
    if flag.default is None or flag.type is bool:
        return ""  # the help itself describes derived values; switches are off
    value = " ".join(map(str, flag.default)) if flag.is_list else flag.default
    return f" (default: {value})"
