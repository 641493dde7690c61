"""Reading what is typed: lists of layers, ranks, `key=value`."""

from typing import Any

from tensorllm.errors import UserError

MOST_LAYERS = 100_000  # far more than any model has: a typing error must not fill the memory


def layers(text: str | None) -> tuple[int, ...] | None:
    """`27`, `0,1` or `8-27` as layer numbers; `all` and nothing give None."""
    if text is None or text == "all":
        return None
    out: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        try:
            start = int(first)
            end = min(int(last), start + MOST_LAYERS) if dash else start
            out += range(start, end + 1)
        except ValueError:
            raise UserError(
                f"--layers takes numbers such as 27, 0,1 or 8-27, or all; got {text!r}"
            ) from None
    if not out:
        raise UserError(f"--layers {text!r} names no layer")
    return tuple(out)


def ranks(text: str | None) -> tuple[int, ...] | None:
    """`304,19,2` as numbers; how many there must be is the compressor's to say."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"--ranks takes whole numbers such as 304,19,2; got {text!r}") from None


def names(text: str | None) -> tuple[str, ...] | None:
    """`q,k` as names."""
    return None if text is None else tuple(part.strip() for part in text.split(","))


def assignments(items: list[str] | None, option: str = "--set") -> dict[str, Any]:
    """`key=value` pairs, the values read as YAML; `option` is where they were given."""
    import yaml

    out = {}
    for item in items or []:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise UserError(f"{option} takes field=value, got {item!r}")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise UserError(f"{option} {key}: {value!r} is not a YAML value") from None
    return out


def shares(option: str, text: str) -> tuple[float, ...]:
    """`0.5,0.9` as shares in (0, 1]."""
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or not all(0 < value <= 1 for value in values):
        raise UserError(f"{option} takes shares in (0, 1] such as 0.5,0.9; got {text!r}")
    return values


def values(option: str, text: str | None) -> tuple[int | float | str, ...] | None:
    """`64,96`, `0.1,0.5` or `in,in+out`: whole numbers, numbers or names."""
    if text is None:
        return None
    found = tuple(_value(part.strip()) for part in text.split(","))
    if "" in found:
        raise UserError(f"{option} takes values such as 64,96; got {text!r}")
    return found


def named_values(option: str, items: list[str] | None) -> dict[str, tuple[int | float | str, ...]]:
    """`NAME=V1,V2` items: values by name."""
    out: dict[str, tuple[int | float | str, ...]] = {}
    for item in items or []:
        name, _, text = item.partition("=")
        found = values(option, text) if name and text else None
        if found is None:
            raise UserError(f"{option} takes NAME=V1,V2,... such as rank=4,8; got {item!r}")
        out[name.strip()] = found
    return out


def _value(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def seconds(option: str, text: str | None) -> float | None:
    """`90s`, `10m`, `2h`, or a number of seconds."""
    if text is None:
        return None
    unit = {"s": 1, "m": 60, "h": 3600}.get(text[-1:], 0)
    try:
        found = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        found = 0
    if not 0 < found < float("inf"):
        raise UserError(f"{option} takes a time such as 90s, 10m or 2h; got {text!r}")
    return found
