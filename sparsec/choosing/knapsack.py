"""The options of least loss that fit a budget: one for each site (a multiple-choice knapsack).

1. A price on the budget is raised until the choice fits: each site then takes its option of least loss + price * weight
   (Lagrange). That is a choice, and a bound on what any other can do.
2. Sites are then taken one by one, and of the choices for those so far, all that are not worse in both weight and loss
   than another, and that the bound does not rule out. The best in the end is the best there is: the bound leaves few.
3. If more than `_MOST_STATES` are left at a site, those of the best bound go on: then the choice is no worse than that
   of rule 1, and how far it can be from the best is what the bound says.
"""

from __future__ import annotations

from sparsec.choosing.options import Chosen, Option, Options, Weight, lost, total

_HALVINGS = 60  # of the interval in which the price lies
_MOST_STATES = 20000
_ROUNDING = 1e-12  # of the room: what sums in another order may differ by


def cheapest(options: Options, room: float, weight: Weight) -> Chosen:
    """The choice of least loss whose weights sum to at most `room`; the lightest where nothing is light enough."""
    lightest = {name: min(each, key=lambda o: (weight(o), o.lost)) for name, each in options.items()}
    room += abs(room) * _ROUNDING
    if total(lightest, weight) > room:
        return lightest
    price = _price(options, room, weight)
    found = min((_at(options, price, weight), lightest), key=lambda c: (total(c, weight) > room, lost(c)))
    return _exact(options, room, weight, price, found)


def cheapest_uniform(options: Options, room: float, weight: Weight) -> Chosen | None:
    """As `cheapest`, all sites that have a choice with one pattern; None where no pattern is an option of all."""
    texts = dict.fromkeys(option.pattern for each in options.values() if len(each) > 1 for option in each)
    same: list[Chosen] = []
    for text in texts:
        picked = {name: _of(each, text) for name, each in options.items()}
        if all(picked.values()):
            same.append({name: option for name, option in picked.items() if option})
    if not same:
        return None
    fitting = [one for one in same if total(one, weight) <= room + abs(room) * _ROUNDING]
    return min(fitting, key=lost) if fitting else min(same, key=lambda one: total(one, weight))


def _of(options: list[Option], text: str | None) -> Option | None:
    return options[0] if len(options) == 1 else next((one for one in options if one.pattern == text), None)


def _at(options: Options, price: float, weight: Weight) -> Chosen:
    """Each site's option of least loss + price * weight."""
    return {name: min(each, key=lambda one: one.lost + price * weight(one)) for name, each in options.items()}


def _price(options: Options, room: float, weight: Weight) -> float:
    """Rule 1: the least price at which the choice fits."""
    low, high = 0.0, 1.0
    while total(_at(options, high, weight), weight) > room and high < 1e30:
        high *= 4
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        fits = total(_at(options, middle, weight), weight) <= room
        low, high = (low, middle) if fits else (middle, high)
    return high


def _exact(options: Options, room: float, weight: Weight, price: float, found: Chosen) -> Chosen:
    """Rules 2 and 3; `found` fits, and is given back where nothing is better."""
    import numpy as np

    names = list(options)
    rest = sum(min(o.lost + price * weight(o) for o in options[name]) for name in names)
    lightest = sum(min(weight(o) for o in options[name]) for name in names)
    weights, losses = np.zeros(1), np.zeros(1)
    steps: list[tuple[np.ndarray, np.ndarray]] = []
    best = lost(found)
    slack = _ROUNDING * price * (abs(room) + sum(weight(each[0]) for each in options.values()))
    for name in names:
        each = options[name]
        rest -= min(o.lost + price * weight(o) for o in each)
        lightest -= min(weight(o) for o in each)
        heavier = (weights[:, None] + [weight(o) for o in each]).ravel()
        lossier = (losses[:, None] + [o.lost for o in each]).ravel()
        bound = lossier + price * (heavier - room) + rest - slack
        able = np.flatnonzero((heavier + lightest <= room) & (bound < best) & (lossier < best))
        order = able[np.lexsort((lossier[able], heavier[able]))]
        least = np.minimum.accumulate(lossier[order]) if len(order) else lossier[order]
        alone = order[np.flatnonzero(np.diff(least, prepend=np.inf) < 0)]  # strictly less than all lighter ones
        if len(alone) > _MOST_STATES:
            alone = np.sort(alone[np.argsort(bound[alone], kind="stable")[:_MOST_STATES]])
        steps.append((alone // len(each), alone % len(each)))
        weights, losses = heavier[alone], lossier[alone]
    if not len(losses):
        return found  # nothing is better
    at = int(losses.argmin())
    chosen = {}
    for name, (came_from, taken) in zip(reversed(names), reversed(steps), strict=True):
        chosen[name] = options[name][int(taken[at])]
        at = int(came_from[at])
    return {name: chosen[name] for name in names}
