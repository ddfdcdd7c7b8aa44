"""README's figures, from the five runs of experiments/seeds.py.

    python experiments/figures.py        # after seeds.py; writes experiments/figures/*.png

Entropies and the lens are of seed 0, the others of all five seeds. Takes about five minutes and the
extra `bench`.
"""

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import compare  # noqa: E402

import analyze  # noqa: E402

FIGURES = ROOT / "experiments" / "figures"
RUNS = [str(ROOT / "out" / "seeds" / f"seed{seed}") for seed in range(5)]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        out = ["--out", scratch]
        failed = (
            analyze.main(["entropy", RUNS[0], *out])
            or analyze.main(["lens", RUNS[0], "4+4+4+2*8=", *out])
            or compare.main([*RUNS, "--problems", "64", *out])
        )
        if failed:
            sys.exit("run experiments/seeds.py first")
        for picture in Path(scratch).glob("*.png"):
            shutil.move(picture, FIGURES / picture.name)
