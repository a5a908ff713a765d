"""In the place of the package of this name, which downloads: the shape of ijcnn1, with numbers by scikit-learn."""

from typing import Any

from sklearn.datasets import make_classification
from sklearn.preprocessing import StandardScaler

TRAINING, TEST, FEATURES = 49_990, 91_701, 22


def fetch_libsvm(name: str) -> tuple[Any, Any]:
    """Return examples and labels −1 and 1 of ``"ijcnn1"`` or ``"ijcnn1_test"``, half of them each."""
    x, y = make_classification(TRAINING + TEST, FEATURES, n_informative=10, n_redundant=4, flip_y=0.02, random_state=0)
    part = slice(TRAINING, None) if name.endswith("_test") else slice(TRAINING)
    return StandardScaler().fit(x[:TRAINING]).transform(x[part]).astype("float32"), 2.0 * y[part] - 1
