"""One line for the same problem in many places."""

from collections.abc import Sequence

SHOWN = 10  # problems
PLACES_SHOWN = 3  # of the same problem


def shortened(lines: list[str]) -> list[str]:
    """The lines, each "PLACE: WHAT", those of the same WHAT once with their first places; SHOWN at most."""
    places_of = {}
    for line in lines:
        place, colon, what = line.partition(": ")
        if not colon:
            place = ""
            what = line
        places_of.setdefault(what, []).append(place)
    shown = [said_once(what, places, len(places)) for what, places in places_of.items()]
    if len(shown) > SHOWN:
        return [*shown[:SHOWN], f"and {len(shown) - SHOWN:,} more"]
    return shown


def said_once(what: str, places: Sequence[str], count: int) -> str:
    """ "PLACE: WHAT (and so in 9 more: 4, 5, ...)". places: of `count` in all, the first or all, each "PATH:NUMBER"."""
    line = f"{places[0]}: {what}" if places[0] else what
    again = count - 1
    if not again:
        return line
    path = places[0].rpartition(":")[0] + ":"
    others = [place.removeprefix(path) for place in places[1:PLACES_SHOWN] if place]
    if not others:
        return f"{line} (and so in {again:,} more)"
    if len(others) < again:
        others.append("...")
    return f"{line} (and so in {again:,} more: {', '.join(others)})"
