"""The command line of a script that has only flags of its own: no data set, no presets, no models to load."""

from collections.abc import Callable, Sequence
from typing import Any

from hparams.config import flags_of
from hparams.parser import build_parser
from hparams.sources import checked, tell_root


def parse_own(
    cls: type,
    description: str,
    epilog: str,
    argv: Sequence[str] | None = None,
    check: Callable[[Any], None] | None = None,
) -> Any:
    """Parse the command line (argv; default: that of the process). Returns an instance of the dataclass cls, whose
    fields are the flags.

    check: called with this instance; raises ValueError for bad values. On bad input: SystemExit(2) with one line on
    stderr.
    """
    flags = flags_of((cls,))
    parser = build_parser(flags, description, epilog)
    given = parser.parse(argv)
    try:
        tell_root()
        config = cls(**{f.name: checked(f, given[f.name]) for f in flags if f.name in given})
        if check:
            check(config)
    except ValueError as error:
        parser.error(str(error))
    return config
