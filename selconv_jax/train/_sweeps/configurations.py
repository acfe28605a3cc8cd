"""Planning the runs of a sweep: every configuration of a grid with every seed.

Each is an ordinary run in its own directory. A sweep has no other state, so calling it again resumes it.

Runs of one seed start from the same values of the variables that their networks have in common, and take
the images of each epoch in the same order with the same augmentation, whatever the variant of the network:
keys are folded from the seed, the path of a variable and the step. Differences between configurations can
therefore be paired by seed.
"""

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import traverse_util

from selconv_jax.data._loading import open_data
from selconv_jax.errors import ConfigError, SelconvError
from selconv_jax.train._config import Config, load_config
from selconv_jax.train._config_changes import origin_of
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._trainer import Trainer
from selconv_jax.train._workdir import CONFIG, METRICS, read_config

_LONGEST_NAME = 120  # characters of a directory's name


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep.

    The name of its configuration is shared with the runs of other seeds: the name of the file and the point
    of the grid as it was given, such as ``"quickstart/model.variant=plain"``.
    """

    configuration: str
    config: Config
    workdir: Path

    @property
    def name(self) -> str:
        """Name of the run in messages."""
        return f"{self.configuration}, seed {self.config.seed}"

    @property
    def has_started(self) -> bool:
        """True if the directory holds a run."""
        return (self.workdir / CONFIG).is_file()

    @property
    def epochs_done(self) -> int:
        """Epochs that have been recorded."""
        records = read_metrics(self.workdir / METRICS) if self.has_started else []
        return records[-1]["epoch"] if records else 0

    @property
    def is_complete(self) -> bool:
        """True if the last epoch has been recorded."""
        return self.epochs_done == self.config.epochs

    @property
    def log(self) -> Path:
        """File beside the run's directory for output that is not shown."""
        return self.workdir.with_name(f"{self.workdir.name}.log")

    def write_log(self, text: str) -> bool:
        """Append to the `log`; false if that fails, as the disk itself may have."""
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a", encoding="utf-8") as log:
                log.write(text)
        except OSError:
            return False
        return True


def plan_sweep(
    files: Sequence[Path],
    workdir: Path,
    *,
    seeds: Sequence[int],
    own_seeds: Mapping[Path, Sequence[int]] | None = None,
    vary: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> list[SweepRun]:
    """Plan the runs of a sweep, in order of file, point of the grid, and seed; nothing is written.

    A run lies in a directory such as ``tiny/model.variant=plain/seed1`` of that of the sweep.

    Files are used with all seeds, or with their own ones. For each ``"key=value1,value2"`` of ``vary``, every
    value is tried, in all combinations with the other keys; overrides are for all runs.
    """
    if not files:
        raise ConfigError("a sweep needs at least one configuration file.")
    own_seeds = own_seeds or {}
    for some in (seeds, *own_seeds.values()):
        if not some or len(set(some)) < len(some):
            raise ConfigError(f"the seeds are {list(some)}; name at least one, and each once.")
    grid = [split_values(text) for text in vary]
    _check_keys([key for key, _ in grid], overrides)
    runs = []
    same: dict[tuple[Path, str], str] = {}
    for file, name in zip(files, _names(files), strict=True):
        for values in itertools.product(*(values for _, values in grid)):
            point = [f"{key}={value}" for (key, _), value in zip(grid, values, strict=True)]
            text = ",".join(point)
            configuration = f"{name}/{text}" if point else name
            directory = workdir / name / _file_name(text)
            for seed in own_seeds.get(file, seeds):
                try:
                    config = load_config(file, [*overrides, *point, f"seed={seed}"])
                except ConfigError as error:
                    raise ConfigError(f"{file}: {error}") from None
                if (other := same.setdefault((file, repr(config)), configuration)) != configuration:
                    raise ConfigError(
                        f"{configuration} and {other} are the same configuration. Name every value once."
                    )
                runs.append(SweepRun(configuration, config, directory / f"seed{seed}"))
    _check_directories(runs)
    return runs


def split_values(text: str) -> tuple[str, list[str]]:
    """Split ``"key=value1,value2"`` at commas outside of brackets, braces and quotation marks."""
    key, _, rest = text.partition("=")
    values, part = [], ""
    for piece in rest.split(","):
        part = f"{part},{piece}" if part else piece
        closed = part.count("[") == part.count("]") and part.count("{") == part.count("}")
        if closed and part.count('"') % 2 == part.count("'") % 2 == 0:
            values.append(part.strip())
            part = ""
    if part or not key.strip() or not all(values):
        raise ConfigError(
            f"{text!r} is not of the form key=value1,value2, such as model.variant=plain,selective."
        )
    return key.strip(), values


def check_sweep(runs: Sequence[SweepRun], jobs: int = 1, *, together: bool = False) -> None:
    """Check for what would fail later: other runs in the directories, missing data, invalid networks.

    Also that ``jobs`` runs can be made at once, or all seeds of a configuration in one program, ``together``.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs is {jobs}; it must be at least 1.")
    if together:
        _check_together(jobs)
    for run in runs:
        # Keys that do not change the result may have changed, as when a run is resumed.
        there = origin_of(read_config(run.workdir) if run.has_started else run.config)
        if there != (here := origin_of(run.config)):
            raise ConfigError(
                f"{run.workdir} holds a run of another configuration: {_difference(there, here)}. "
                "Choose another --workdir, or remove that run."
            )
    checked = set()
    load = functools.cache(open_data)
    for run in runs:
        kind = repr(dataclasses.replace(run.config, seed=0))
        if kind not in checked and not run.is_complete:
            checked.add(kind)
            try:
                Trainer(run.config, load(*run.config.data.source))
            except SelconvError as error:
                raise type(error)(f"{run.configuration}: {error}") from None
    if jobs > 1 and jax.default_backend() == "tpu":
        raise ConfigError("--jobs: a TPU serves one process at a time; leave it out.")


def _check_together(jobs: int) -> None:
    if jobs > 1:
        raise ConfigError(
            "--together and --jobs do not go together: the seeds of a configuration are one program of one "
            "process. Leave one of them out."
        )
    if jax.process_count() > 1:
        raise ConfigError("--together is for one process, and there are several. Leave it out.")
    if "threefry" not in str(jax.config.jax_default_prng_impl):
        raise ConfigError(
            f"--together: random numbers of {jax.config.jax_default_prng_impl} depend on what is made with "
            "them. Leave it out, or unset JAX_DEFAULT_PRNG_IMPL."
        )


def _names(files: Sequence[Path]) -> list[str]:
    """Name each file by its stem, preceded by as many folders as make it unique."""
    paths = [file.resolve().with_suffix("").parts[1:] for file in files]
    names = []
    for file, path in zip(files, paths, strict=True):
        if paths.count(path) > 1:
            raise ConfigError(f"{file} is named twice, or another file differs from it by its ending alone.")
        length = 1
        while sum(other[-length:] == path[-length:] for other in paths) > 1:
            length += 1
        names.append("/".join(path[-length:]))
    return names


def _file_name(text: str) -> str:
    """Replace characters that are special in file systems and shells; add a digest if anything changed."""
    name = re.sub(r"[^\w.=,+-]", "_", re.sub(r"[\s\"'\[\]{}]", "", text))
    if name == text and len(name) <= _LONGEST_NAME:
        return name
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    return f"{name[:_LONGEST_NAME]}-{digest}"


def _check_keys(varied: Sequence[str], overrides: Sequence[str]) -> None:
    keys = [*varied, *(override.partition("=")[0].strip() for override in overrides)]
    for key in keys:
        if key == "seed":
            raise ConfigError("seed cannot be set in a sweep: use --seeds.")
        if key in varied and keys.count(key) > 1:
            raise ConfigError(f"{key} is varied, and varied or set once more. Name it once.")
        parts = [other for other in keys if other.startswith(f"{key}.")]
        if parts and (key in varied or parts[0] in varied):
            raise ConfigError(
                f"{parts[0]} is a part of {key}, and both are varied or set. Name it within {key} alone, or "
                f"name only parts of {key}."
            )


def _check_directories(runs: Sequence[SweepRun]) -> None:
    """Check that no run lies in the directory of another."""
    taken: dict[Path, SweepRun] = {}
    for run in runs:
        if run.workdir in taken:
            raise ConfigError(f"two runs would share the directory {run.workdir}. Name every value once.")
        taken[run.workdir] = run
    for run in runs:
        for parent in run.workdir.parents:
            if parent in taken:
                raise ConfigError(
                    f"the run {run.name} would lie in the directory {parent} of another. Rename its file."
                )


def _difference(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Describe the first keys with different values, without a final full stop."""
    old, new = (traverse_util.flatten_dict(dict(origin), sep=".") for origin in (there, here))
    keys = [key for key in {**new, **old} if old.get(key) != new.get(key)]
    parts = [f"{key} is {old.get(key)!r} there and {new.get(key)!r} here" for key in keys[:3]]
    return "; ".join(parts) + ("; and more" if len(keys) > 3 else "")
