"""Run the study: choose the threshold on validation images, then train every configuration with it.

    python experiments/studies/small_densenet/run.py [--workdir DIR] [OPTION of `selconv sweep` ...]

Started again after an interruption, it resumes. The choice takes a seed that the comparison does not.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from selconv_jax import restart_for_cpu
from selconv_jax._cli.main import main as selconv

STUDY = Path(__file__).resolve().parent
THRESHOLDS = ("1e-3", "1e-2", "5e-2")
CHOOSING_SEED = "100"
SEEDS = "0,1,2,3,4"
ABLATION_SEEDS = "0,1,2"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make both sweeps; return the exit code of the first one that failed."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, default=Path("runs/small_densenet"))
    options, rest = parser.parse_known_args(arguments)

    choice = options.workdir / "threshold"
    vary = f"allocation.threshold={','.join(THRESHOLDS)}"
    selective = str(STUDY / "selective.toml")
    where = ["--seeds", CHOOSING_SEED, "--workdir", str(choice)]
    if code := selconv(["sweep", selective, "--vary", vary, *where, *rest]):
        return code
    threshold = best_threshold(json.loads((choice / "sweep.json").read_text(encoding="utf-8")))
    print(f"threshold {threshold:g} was the best on the validation images", flush=True)

    files = [str(STUDY / "plain.toml"), selective]
    ablations = [f"{STUDY / name}.toml@{ABLATION_SEEDS}" for name in ("gate_only", "no_shift")]
    where = ["--seeds", SEEDS, "--workdir", str(options.workdir / "comparison")]
    return selconv(["sweep", *files, *ablations, f"allocation.threshold={threshold}", *where, *rest])


def best_threshold(report: Mapping[str, Sequence[Mapping[str, Any]]]) -> float:
    """Choose the threshold with the highest validation accuracy after the last epoch; ties: the lowest."""
    scores = {
        part["resolved"]["allocation"]["threshold"]: part["summary"]["validation_accuracy"]["mean"]
        for part in report["configurations"]
    }
    return max(sorted(scores), key=scores.__getitem__)


if __name__ == "__main__":
    restart_for_cpu()
    sys.exit(main())
