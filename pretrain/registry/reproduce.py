"""Answers a version's golden requests with MLflow alone. Run as a file, never imported: the
process must know nothing of the checkout.

    python -I -S -B reproduce.py VERSION SITE    SITE: folder of the packages it may see
    python -I -B reproduce.py VERSION            in an environment of its own

Prints one line of JSON: the answers, and where the code and what it loaded came from.
"""

import json
import os
import sys


def main(version: str, site: str | None = None) -> None:
    if site is not None:
        sys.path.append(site)  # -S left the standard library alone
    with open(os.path.join(version, "golden.json"), encoding="utf-8") as stream:
        golden = json.load(stream)
    import pandas
    from mlflow.pyfunc import load_model

    model = load_model(version)
    rows = pandas.DataFrame(golden["rows"], dtype=object)
    answers = model.predict(rows, params=golden["params"])
    import pretrain

    report = {
        "answers": answers.to_dict("records"),
        "code": os.path.realpath(os.path.dirname(pretrain.__file__)),
        "deepspeed": "deepspeed" in sys.modules,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
