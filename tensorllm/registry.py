"""Registries of interchangeable things by name; unknown names fail with a suggestion."""

import importlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Generic, TypeVar

from tensorllm.errors import UserError

T = TypeVar("T")


def did_you_mean(name: str, known: list[str]) -> str:
    """`" Did you mean 'x'?"` for the closest known name, or an empty text."""
    by_lower = {entry.lower(): entry for entry in known}
    close = get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[close[0]]!r}?" if close else ""


def one_of(what: str, name: str, known: Sequence[str]) -> str:
    """Return `name`, which must be one of a few; `what` names it in an error."""
    if name in known:
        return name
    hint = did_you_mean(name, list(known))
    raise UserError(f"{what} must be one of {', '.join(known)}, got {name!r}{hint and '.' + hint}")


def unknown(
    kind: str, name: str, shown: Sequence[str], known: Iterable[str], *, plugins: bool
) -> UserError:
    """The error for a name that is not registered.

    Args:
        kind: of thing that has the name.
        shown: the canonical names.
        known: the aliases too.
        plugins: whether a plugin may bring the name.
    """
    more = "; of a plugin: import its module first (--plugin MODULE)" if plugins else ""
    hint = did_you_mean(name, list(known))
    return UserError(f"Unknown {kind} {name!r}.{hint} Known: {', '.join(shown)}{more}")


class Registry(Generic[T]):
    """A mapping of names to entries that plugins may add to.

    Installed packages add entries through the entry point group `group`; each entry point loads a
    module or object whose import registers what it defines.
    """

    every: ClassVar[list["Registry[Any]"]] = []

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind = kind
        self.group = group
        self.takes_plugins = group is not None
        self._entries: dict[str, T] = {}
        self._aliases: dict[str, str] = {}
        self.every.append(self)

    def register(self, name: str, *, aliases: tuple[str, ...] = ()) -> Callable[[T], T]:
        """Decorator that registers an entry under `name` and `aliases`; a name in use raises."""

        def add(entry: T) -> T:
            for taken in (name, *aliases):
                if taken in self._entries or taken in self._aliases:
                    raise UserError(f"{self.kind} {taken!r} is already registered")
            self._entries[name] = entry
            self._aliases.update(dict.fromkeys(aliases, name))
            return entry

        return add

    def names(self) -> list[str]:
        """The canonical names, plugins included, in alphabetical order."""
        self._load_plugins()
        return sorted(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        self._load_plugins()
        return name in self._entries or name in self._aliases

    def __getitem__(self, name: str) -> T:
        if name not in self:
            names = self.names()
            raise unknown(
                self.kind, name, names, [*names, *self._aliases], plugins=self.takes_plugins
            )
        return self._entries[self._aliases.get(name, name)]

    def name_of(self, entry: T) -> str:
        """The canonical name under which `entry` is registered."""
        for name, known in self._entries.items():
            if known is entry:
                return name
        raise UserError(f"{entry!r} is not a registered {self.kind}")

    def running_in(self, frame: FrameType) -> str | None:
        """The entry from outside the package whose own method or function a frame executes."""
        module, names = frame.f_globals.get("__name__", ""), frame.f_locals
        if module.partition(".")[0] == __package__:
            return None
        for name, entry in self._entries.items():
            holders = (entry, type(entry))
            method = type(names.get("self")) in holders or names.get("cls") is entry
            code = getattr(entry, "__code__", None)
            if code is frame.f_code or (method and module in {h.__module__ for h in holders}):
                return name
        return None

    def _load_plugins(self) -> None:
        group, self.group = self.group, None  # once; an entry point may look up names itself
        if group is not None:
            for point in entry_points(group=group):
                try:
                    point.load()
                except Exception as error:  # the plugin's own code may raise anything
                    self.group = group  # so that the next lookup reports it again
                    raise UserError(
                        f"the installed plugin {point.value!r} ({group}) cannot be imported: "
                        f"{type(error).__name__}: {error}. Repair or uninstall it"
                    ) from None


def load_plugins(modules: Sequence[str]) -> None:
    """Import the modules; one that cannot be imported, for whatever reason, is refused."""
    for name in modules:
        if name.endswith(".py"):
            raise UserError(
                f"--plugin takes a module's name such as {Path(name).stem}, whose folder is on "
                f"PYTHONPATH, not its file; got {name!r}"
            )
        try:
            importlib.import_module(name)
        except Exception as error:  # the plugin's own code may raise anything
            raise UserError(
                f"cannot import the plugin {name!r}: {type(error).__name__}: {error}. It must be "
                "importable: install it, or add its folder to PYTHONPATH"
            ) from None


def raised_by(error: BaseException) -> str | None:
    """The plugin's code that raised an error, such as `compressor 'mine' (mine.py, line 7)`.

    None if no code of an entry from outside the package was running.
    """
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        for registry in Registry.every:
            if (name := registry.running_in(frame)) is not None:
                return f"{registry.kind} {name!r} ({frame.f_code.co_filename}, line {line})"
    return None
