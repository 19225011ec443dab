"""k-NN of many images: seconds and memory, beside scikit-learn's on a part of them.

    KERAS_BACKEND=torch python benchmarks/knn.py
    KERAS_BACKEND=torch python benchmarks/knn.py --bank=100000 --queries=1000

Features are random, float32, in 100 classes, by seed 0. First `knn_predict` and scikit-learn's
brute-force `KNeighborsClassifier` (cosine, uniform vote), in turn, on a tenth of the bank and a
hundredth of the queries; then `knn_predict` on all. `memory` are the bytes at the peak of the
process beyond what it held before, so beyond those of `features`.
"""

import argparse
import pathlib

import measure
import numpy as np

from keras_dinov3.evaluation import knn_predict


def features(count, width, seed):
    rng = np.random.default_rng(seed)
    found = rng.standard_normal((count, width), dtype="float32")
    return found, rng.integers(0, 100, count)


def with_scikit_learn(bank, labels, queries, k):
    from sklearn.neighbors import KNeighborsClassifier

    model = KNeighborsClassifier(k, metric="cosine", algorithm="brute")
    return model.fit(bank, labels).predict(queries)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bank", type=int, default=1_000_000, help="labelled images")
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="of the comparison")
    parser.add_argument("--json", type=pathlib.Path, help="path of a file for the numbers")
    arguments = parser.parse_args()
    bank, labels = features(arguments.bank, arguments.width, 0)
    queries, _ = features(arguments.queries, arguments.width, 1)

    part = slice(max(arguments.bank // 10, arguments.k)), slice(max(arguments.queries // 100, 1))
    small = bank[part[0]], labels[part[0]], queries[part[1]]
    contestants = {"knn_predict": knn_predict, "scikit-learn": with_scikit_learn}
    times = {name: [] for name in contestants}
    for index in range(arguments.rounds + 1):  # the first is a warm-up
        for name, function in contestants.items():
            found = measure.seconds(lambda function=function: function(*small, arguments.k))
            if index:
                times[name] += found
    rows = [
        {
            "what": name,
            "bank": len(small[0]),
            "queries": len(small[2]),
            "median": float(np.median(found)),
            "ratio": float(np.median(found) / np.median(times["scikit-learn"])),
        }
        for name, found in times.items()
    ]
    measure.forget_peak_memory()
    before = measure.peak_memory()
    (seconds,) = measure.seconds(lambda: knn_predict(bank, labels, queries, arguments.k))
    rows.append(
        {
            "what": "knn_predict",
            "bank": len(bank),
            "queries": len(queries),
            "median": seconds,
            "memory": measure.peak_memory() - before,
            "features": bank.nbytes,
        }
    )
    formats = {
        "what": "",
        "bank": ",",
        "queries": ",",
        "median": ".3f",
        "ratio": ".2f",
        "memory": ".2e",
        "features": ".2e",
    }
    measure.report("k-NN", rows, formats, arguments.json, ("numpy", "scikit-learn"))


if __name__ == "__main__":
    main()
