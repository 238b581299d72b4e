"""Print, from a report of `make demo`, the two things that checking clean accuracy alone would have missed."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    path = Path(sys.argv[1])
    rows = {row["name"]: row for row in json.loads(path.read_text())["rows"]}
    float_, naive2 = rows["float"], rows["uniform int2:max"]
    honest, naive = rows["uniform int4, activations int4"], rows["uniform int4, activations int4, naive evaluation"]
    print(
        f"\nLesson 1. Clean accuracy is no check: with 4-bit activations the network keeps "
        f"{honest['clean']['value']:.1f} % of clean images (float {float_['clean']['value']:.1f} %), but of attacked "
        f"ones {honest['robust']['value']:.1f} % (float {float_['robust']['value']:.1f} %). At 2 bits rounded to "
        f"nearest both fall: {naive2['clean']['value']:.1f} % and {naive2['robust']['value']:.1f} %."
    )
    print(
        f"Lesson 2. A naive attack is no check: PGD through plain rounding reports {naive['robust']['value']:.1f} % "
        f"for that network, the same attack with straight-through gradients finds {honest['robust']['value']:.1f} %; "
        f"the masking rules call the first {naive['masking']}."
    )
    print(f"The report is {path.with_name('report.md')}")


if __name__ == "__main__":
    main()
