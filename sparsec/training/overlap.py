"""A bias model of pairs of texts: how the words of the second overlap with those of the first, and nothing else.

Overlap misleads models of entailment and paraphrase (McCoy et al., HANS, arXiv 1902.01007). The features are those of
Clark et al. (arXiv 1909.03683) without their distances of word vectors, the model is logistic regression.

1. Features are numbers of words alone; standardised, then one weight for each and class, and a bias for each class.
2. Fitted by L-BFGS from zero, in float64, with a small penalty on weights: there is one optimum, and no randomness.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

_PENALTY = 1e-4  # of half the sum of squares of weights, beside a mean loss
_WORD = re.compile(r"\w+")
FEATURES = (
    "share of the second's words that are in the first",
    "all are",
    "they stand there in a row",
    "they stand there in order",
    "share of the first's words that are in the second",
    "logarithm of the ratio of lengths",
)


def features(first: str, second: str) -> list[float]:
    """The numbers that `FEATURES` names; the two texts in any case, without punctuation.

    >>> features("The doctor near the actor danced.", "the actor danced")
    [1.0, 1.0, 1.0, 1.0, 0.5, 0.5596157879354227]
    """
    a, b = (_WORD.findall(text.casefold()) for text in (first, second))
    shared, back = _share(b, a), _share(a, b)
    row = any(a[i : i + len(b)] == b for i in range(len(a) - len(b) + 1))
    left = iter(a)
    order = all(word in left for word in b)  # each search goes on where the last one ended
    ratio = math.log((1 + len(a)) / (1 + len(b)))
    return [shared, float(shared == 1), float(row), float(order), back, ratio]


def log_probabilities(pairs: Sequence[tuple[str, str]], labels: Sequence[int], classes: int) -> np.ndarray:
    """What the model, fitted to these pairs and labels, says of the same pairs: (pairs, classes) float64."""
    from scipy.optimize import minimize

    x = np.array([features(*pair) for pair in pairs])
    x = (x - x.mean(0)) / np.maximum(x.std(0), 1e-9)
    x = np.hstack([x, np.ones((len(x), 1))])
    truth = np.eye(classes)[list(labels)]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = flat.reshape(-1, classes)
        shrunk = np.vstack([weights[:-1], np.zeros((1, classes))])  # how frequent classes are costs nothing
        logs = _log_softmax(x @ weights)
        value = -(truth * logs).sum() / len(x) + _PENALTY / 2 * (shrunk**2).sum()
        return float(value), (x.T @ (np.exp(logs) - truth) / len(x) + _PENALTY * shrunk).ravel()

    found = minimize(loss, np.zeros(x.shape[1] * classes), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return _log_softmax(x @ found.x.reshape(-1, classes))


def _share(words: Sequence[str], among: Sequence[str]) -> float:
    """Of words, those that are among others, each as often as it is there; 1 of none."""
    return (Counter(words) & Counter(among)).total() / len(words) if words else 1.0


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    logs: np.ndarray = x - np.log(np.exp(x).sum(1, keepdims=True))
    return logs
