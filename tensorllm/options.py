"""How the fields of a request become command-line options, and how typed text is parsed.

A field `rank: Annotated[int | None, Option("The rank itself.")] = None` of a request is the option
`--rank`; `cli/` makes a command's signature from such fields.
"""

import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from tensorllm.errors import UserError
from tensorllm.io import SHOWN, at_home, from_yaml

MAX_SEED = 2**32 - 1  # accepted by every random generator
MOST_LAYERS = 10_000  # far more than any model has: a typing error must not exhaust the memory

Value = int | float | str


@dataclass(frozen=True, slots=True)
class Option:
    """A field that the command line sets.

    Attributes:
        help: its text on the help page.
        flag: by default `--` and the field's name with dashes.
        metavar: the value's placeholder on the help page.
        parse: makes the field's value from (flag, text); None: the field's type does.
        repeated: may be given several times; `parse` gets all the texts.
        argument: positional, without a flag.
        minimum, maximum: of a whole number.
        reads: what the file at this path is, which must be there (refused before slow imports).
        opened_by: the library that opens what is at this path, if it takes names in UTF-8 only;
            all else may have any name that the system allows.
        needs: this option does nothing unless one of these fields of the request is given, or has
            the value after a `=` (`study=claims`).
    """

    help: str
    flag: str | None = None
    metavar: str | None = None
    parse: Callable[[str, Any], Any] | None = None
    repeated: bool = False
    argument: bool = False
    minimum: int | None = None
    maximum: int | None = None
    reads: str | None = None
    opened_by: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class OptionField:
    """A field of a request with its option."""

    name: str
    kind: Any
    option: Option
    required: bool
    default: Any

    @property
    def flag(self) -> str:
        return self.option.flag or flag_of(self.name)

    def placed(self, given: Any) -> Any:
        """A path with the home folder in place of `~`, which a shell leaves in `--out=~/folder`.

        Raises:
            UserError: what the option names cannot have this path.
        """
        if not isinstance(given, Path):
            return given
        return at_home(given, opened_by=self.option.opened_by)

    def there(self, given: Any) -> Any:
        """`placed`, refused if the option reads a file and none is there."""
        path = self.placed(given)
        if self.option.reads is not None and isinstance(path, Path) and not path.exists():
            raise UserError(
                f"cannot read the {self.option.reads} {str(path)!r}: No such file or directory"
            )
        return path

    def out_of_range(self, value: Any) -> str | None:
        """What is wrong with a number outside the option's range; None if nothing is."""
        least, most = self.option.minimum, self.option.maximum
        if value is None or least is None or (least <= value and (most is None or value <= most)):
            return None
        allowed = f"{least} or more" if most is None else f"in {least}..{most}"
        return f"{self.name} must be {allowed}, got {value}"


def option_fields(request: type) -> list[OptionField]:
    """The fields of a request that are options, in the order of the help page."""
    hints, out = get_type_hints(request, include_extras=True), []
    for field in fields(request):
        hint = hints[field.name]
        found = [a for a in get_args(hint)[1:] if isinstance(a, Option)]
        if get_origin(hint) is Annotated and found:
            required = field.default is MISSING and field.default_factory is MISSING
            out.append(
                OptionField(field.name, get_args(hint)[0], found[0], required, field.default)
            )
    return out


def at_least(request: Any, name: str, minimum: float) -> None:
    """Refuse a field below its minimum; None means not given."""
    value = getattr(request, name)
    if value is not None and value < minimum:
        raise UserError(f"{flag_of(name)} must be at least {minimum}, got {value}")


def above(request: Any, name: str, bound: float) -> None:
    """Refuse a field that is not above a bound; None means not given."""
    value = getattr(request, name)
    if value is not None and value <= bound:
        raise UserError(f"{flag_of(name)} must be more than {bound}, got {value:g}")


def refuse_idle(request: Any) -> None:
    """Refuse an option that was given without one that it needs."""
    declared = {field.name: field for field in option_fields(type(request))}
    given = {name for name, field in declared.items() if getattr(request, name) != field.default}
    for name, field in declared.items():
        needs = [need.partition("=") for need in field.option.needs]
        met = [getattr(request, n) == value if value else n in given for n, _, value in needs]
        if name in given and needs and not any(met):
            wanted = " or ".join(f"{declared[n].flag} {value}".rstrip() for n, _, value in needs)
            raise UserError(f"{field.flag} does nothing without {wanted}")


def flag_of(name: str) -> str:
    """`time_limit` -> `--time-limit`."""
    return f"--{name.replace('_', '-')}"


# Parsers of typed text.


def layers(flag: str, text: str) -> tuple[int, ...] | str:
    """Layer numbers from `27`, `0,1` or `8-27`; `all` stays as it is."""
    if text == "all":
        return text
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start = int(first)
            end = min(int(last), start + MOST_LAYERS) if dash else start
            out += range(start, end + 1)
        except ValueError:
            raise UserError(
                f"{flag} takes numbers such as 27, 0,1 or 8-27, or all; got {text!r}"
            ) from None
    if not out:
        raise UserError(f"{flag} {text!r} names no layer")
    return tuple(out)


def candidates(flag: str, text: str) -> tuple[int, ...] | None:
    """As `layers`, but `all` becomes None."""
    found = layers(flag, text)
    return found if isinstance(found, tuple) else None


def whole_numbers(flag: str, text: str) -> tuple[int, ...]:
    """Numbers from `304,19,2`; the compressor checks how many there must be."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} takes whole numbers such as 304,19,2; got {text!r}") from None


def names(flag: str, text: str) -> tuple[str, ...]:
    """Names from `q,k`."""
    del flag
    return tuple(part.strip() for part in text.split(","))


def assignments(flag: str, items: list[str]) -> dict[str, Any]:
    """A mapping from `field=value` items, with the values read as YAML."""
    import yaml

    out = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{flag} takes field=value, got {item!r}")
        try:
            out[key] = from_yaml(value)
        except yaml.YAMLError:
            shown = value if len(value) <= SHOWN else f"{value[:SHOWN]} ..."
            raise UserError(f"{flag} {key}: {shown!r} is not a YAML value") from None
    return out


def numbers(flag: str, text: str) -> float | tuple[float, ...]:
    """One number from `1.5`, several from `1.2,1.5,2`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{flag} takes numbers such as 1.5 or 1.2,1.5,2; got {text!r}") from None
    return found[0] if len(found) == 1 else found


def shares(flag: str, text: str) -> tuple[float, ...]:
    """Shares in (0, 1] from `0.5,0.9`."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or not all(0 < value <= 1 for value in found):
        raise UserError(f"{flag} takes shares in (0, 1] such as 0.5,0.9; got {text!r}")
    return found


def values(flag: str, text: str) -> tuple[Value, ...]:
    """Whole numbers, numbers or names from `64,96`, `0.1,0.5` or `in,in+out`."""
    found = tuple(_value(part.strip()) for part in text.split(","))
    if "" in found:
        raise UserError(f"{flag} takes values such as 64,96; got {text!r}")
    return found


def named_values(flag: str, items: list[str]) -> dict[str, tuple[Value, ...]]:
    """Values by name from `NAME=V1,V2` items."""
    out = {}
    for item in items:
        name, _, text = item.partition("=")
        if not name or not text:
            raise UserError(f"{flag} takes NAME=V1,V2,... such as rank=4,8; got {item!r}")
        out[name.strip()] = values(flag, text)
    return out


def _value(text: str) -> Value:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def size(flag: str, text: str) -> int:
    """Bytes from `60MiB`, `60MB`, `1.5TB`, or a number of bytes."""
    number = r"([0-9]{1,4000}(?:\.[0-9]{1,4000})?)"  # Python reads no more than 4300 digits
    match = re.fullmatch(rf"\s*{number}\s*([kmgt]i?b|b?)\s*", text, re.IGNORECASE)
    found = 0
    if match is not None:
        unit = match[2].lower()
        base = 1024 if "i" in unit else 1000
        found = int(Fraction(match[1]) * base ** " kmgt".index(unit[0] if len(unit) > 1 else " "))
    if found < 1:
        raise UserError(
            f"{flag} takes 1 byte or more, in B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as "
            f"60MiB or 60000000; got {text!r}"
        )
    return found


def seconds(flag: str, text: str) -> float:
    """Seconds from `90s`, `10m`, `2h`, or a number of seconds."""
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        found = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        found = 0
    if not 0 < found < float("inf"):
        raise UserError(f"{flag} takes a time such as 90s, 10m or 2h; got {text!r}")
    return found
