"""The command line of a script whose flags are its own: no data set, no presets, no models to load."""

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
    """The command line (argv; default: the process's own) -> an instance of the dataclass cls, whose fields are flags.

    check: called with it; raises ValueError for what is wrong. On bad input: SystemExit(2) with one line on stderr.
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
