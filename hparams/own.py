"""Parses the command line of a script without the common flags for data sets, presets and models."""

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
    """Parse argv (default: the command line of the process). The fields of the dataclass cls are the flags. Returns an
    instance of cls.

    check: a function that gets the instance and raises ValueError for bad values. Raises SystemExit(2) for bad input,
    after one line on stderr.
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
