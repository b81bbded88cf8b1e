"""scikit-learn's simple learners, each with the settings that it is tuned over.

Shapes: n samples, F features, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

MAX_UNLABELLED = 2_000  # images without a label over which label spreading takes seconds
MAX_FOR_SVM = 1_000  # labelled images up to which an RBF-SVM takes seconds

Values = NDArray[np.float32]
Labels = NDArray[np.int64]


class Learner(NamedTuple):
    """A kind of baseline.

    Attributes:
        title: What tables call it.
        grid: Settings to choose from; of each, the first is the default.
        fit: Takes a setting, the labelled samples and the unlabelled values; returns a function from values (n, F) to scores
            (n, C of the labelled samples' classes, in rising order).
        probabilities: Whether the scores are probabilities.
    """

    title: str
    grid: Mapping[str, Sequence[Any]]
    fit: Callable[[Mapping[str, Any], Values, Labels, Values], Callable[[Values], NDArray[np.float64]]]
    probabilities: bool


def _scaler(kind: str, values: Values) -> Callable[[Values], Values]:
    """Return a shift and scale by what `values` have: of each feature, or of all features together."""
    centre = values.mean(0)
    spread = values.std(0) if kind == "feature" else np.full(values.shape[1], (values - centre).std())
    scale = 1 / np.maximum(spread, 1e-3 * max(float(spread.max()), 1e-12))
    return lambda x: ((x - centre) * scale).astype(np.float32)


def _fit_majority(
    setting: Mapping[str, Any], x: Values, y: Labels, more: Values
) -> Callable[[Values], NDArray[np.float64]]:
    shares = np.bincount(y)[np.unique(y)] / len(y)
    return lambda queries: np.repeat(shares[None], len(queries), 0)


def _fit_logistic(
    setting: Mapping[str, Any], x: Values, y: Labels, more: Values
) -> Callable[[Values], NDArray[np.float64]]:
    from sklearn.linear_model import LogisticRegression

    scale = _scaler(setting["scaled_by"], x)
    model = LogisticRegression(C=setting["C"], class_weight=setting["class_weight"], max_iter=300)
    model.fit(scale(x), y)
    return lambda queries: model.predict_proba(scale(queries))


def _fit_svm(setting: Mapping[str, Any], x: Values, y: Labels, more: Values) -> Callable[[Values], NDArray[np.float64]]:
    from sklearn.svm import SVC

    scale = _scaler(setting["scaled_by"], x)
    scaled = scale(x)
    gamma = setting["gamma"] / (x.shape[1] * float(scaled.var()))  # in units of scikit-learn's "scale"
    model = SVC(C=setting["C"], gamma=gamma, class_weight=setting["class_weight"], decision_function_shape="ovr")
    model.fit(scaled, y)

    def scores(queries: Values) -> NDArray[np.float64]:
        found = model.decision_function(scale(queries))
        return np.stack([-found, found], 1) if found.ndim == 1 else found

    return scores


def _fit_neighbour(
    setting: Mapping[str, Any], x: Values, y: Labels, more: Values
) -> Callable[[Values], NDArray[np.float64]]:
    from sklearn.neighbors import KNeighborsClassifier

    scale = _scaler(setting["scaled_by"], x)
    model = KNeighborsClassifier(1, metric=setting["metric"], algorithm="brute").fit(scale(x), y)
    return lambda queries: model.predict_proba(scale(queries))


def _fit_spreading(
    setting: Mapping[str, Any], x: Values, y: Labels, more: Values
) -> Callable[[Values], NDArray[np.float64]]:
    from sklearn.semi_supervised import LabelSpreading

    everything = np.concatenate([x, more])
    scale = _scaler(setting["scaled_by"], everything)
    neighbours = min(setting["neighbours"], len(everything) - 1)
    # With scikit-learn's own tolerance the iterations end before a label has travelled far.
    model = LabelSpreading(kernel="knn", n_neighbors=neighbours, alpha=setting["alpha"], max_iter=100, tol=1e-12)
    model.fit(scale(everything), np.concatenate([y, np.full(len(more), -1)]))
    return lambda queries: np.nan_to_num(model.predict_proba(scale(queries)))


_SCALED = ("all", "feature")
LEARNERS = {
    "majority": Learner("majority class", {}, _fit_majority, True),
    "logistic": Learner(
        "logistic regression",
        {"C": (1.0, 0.1, 10.0, 0.01, 100.0, 0.001), "scaled_by": _SCALED, "class_weight": (None, "balanced")},
        _fit_logistic,
        True,
    ),
    "neighbour": Learner(
        "1-nearest neighbour", {"metric": ("euclidean", "cosine"), "scaled_by": _SCALED}, _fit_neighbour, False
    ),
    "svm": Learner(
        "RBF-SVM",
        {"C": (1.0, 10.0, 100.0), "gamma": (1.0, 0.3, 3.0), "scaled_by": _SCALED, "class_weight": (None, "balanced")},
        _fit_svm,
        False,
    ),
    "spreading": Learner(
        "label spreading",
        {"neighbours": (7, 4, 15), "alpha": (0.2, 0.5, 0.9), "scaled_by": ("all",)},
        _fit_spreading,
        True,
    ),
}
