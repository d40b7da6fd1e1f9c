"""Finds classes by name. Each class has a file of its own, and all files of the folder are imported."""

import importlib
import pkgutil
from collections.abc import Callable


class Registry(dict[str, type]):
    """A dictionary of classes by name. The decorator `register("name")` adds a class. Messages use the word `kind`."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def register(self, name: str) -> Callable[[type], type]:
        def add(cls: type) -> type:
            self[name] = cls
            return cls

        return add

    def __missing__(self, name: str) -> type:
        raise ValueError(f"there is no {self.kind} '{name}'; there are: {', '.join(sorted(self))}")


def import_files(package: str) -> None:
    """Import all files of a package. Each file then registers its class."""
    for module in pkgutil.iter_modules(importlib.import_module(package).__path__):
        importlib.import_module(f"{package}.{module.name}")
