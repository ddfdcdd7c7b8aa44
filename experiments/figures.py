"""README's figures, from the five runs of experiments/seeds.py.

    python experiments/figures.py        # after seeds.py; about five minutes; writes experiments/figures/*.png

Entropies and the lens are of seed 0, the others of all five seeds.
"""

import shutil
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import analyze  # noqa: E402

FIGURES = ROOT / "experiments" / "figures"
RUNS = [str(ROOT / "out" / "seeds" / f"seed{seed}") for seed in range(5)]

if __name__ == "__main__":
    FIGURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        for command in (["entropy", RUNS[0], "--matched"], ["lens", RUNS[0], "4+4+4+2*8="], ["dynamics", *RUNS], ["refinement", *RUNS],
                        ["passk", *RUNS, "--problems", "64"]):  # fmt: skip
            if analyze.main([*command, "--out", scratch]):
                sys.exit("run experiments/seeds.py first")
        for picture in Path(scratch).glob("*.png"):
            shutil.move(picture, FIGURES / picture.name)
