"""A user's own modules, imported so that what they register has a name: by `--plugin`, or by an entry point.

An installed package names its modules under the entry point group `lavish.plugins`. Nothing of a recipe is ever
imported: a YAML names no Python.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path

from lavish.common.errors import ConfigError

GROUP = "lavish.plugins"


def load_plugins(names: Iterable[str] = ()) -> list[str]:
    """Import the modules of installed packages, then these: dotted names, also from the working folder, or `.py` files.

    Gives the names of all. One that is imported already is not imported again.

    Raises:
        ConfigError: there is no such module. An error within one is its own.
    """
    loaded = []
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        entry.load()
        loaded.append(entry.value)
    for name in names:
        if name.endswith(".py"):
            _import_file(Path(name))
        else:
            _import_name(name)
        loaded.append(name)
    return loaded


def _import_name(name: str) -> None:
    here = str(Path.cwd())
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not (name == error.name or name.startswith(f"{error.name}.")):
            raise  # a module that the plug-in itself misses
        raise ConfigError(
            f"--plugin {name}: there is no module {error.name!r}, neither installed nor in {here}. Give a dotted name, "
            "or the path of a .py file."
        ) from error


def _import_file(path: Path) -> None:
    if not path.is_file():
        raise ConfigError(f"--plugin {path}: no such file (looked in {Path.cwd()}).")
    if path.stem in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--plugin {path}: Python cannot import this file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[path.stem]
        raise
