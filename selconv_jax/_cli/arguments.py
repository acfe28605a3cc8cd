"""Command-line arguments of all commands."""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import selconv_jax
from selconv_jax._cli.guard import DEBUG
from selconv_jax.errors import nearest

_MULTIPLE = "round widths up to a multiple of N by keeping idle channels (default: 1)"

# Flags, and options as NAME METAVAR or NAME METAVAR=DEFAULT.
_COMPACT = {
    "--multiple N=1": _MULTIPLE,
    "--output FILE": "the file (default: DIR/compact.npz)",
}

_EXPORT = {
    "--compact": "write the compacted network, without closed and unused channels",
    "--multiple N=1": f"with --compact: {_MULTIPLE}",
    "--normalize": "take uint8 images and normalize them",
    "--output FILE": "the file (default: DIR/network.FORMAT or DIR/compact.FORMAT)",
    "--overwrite": "replace an existing file",
}

_SWEEP = {
    "--seeds SEEDS=0,1,2": "seeds of the runs (default: 0,1,2)",
    "--workdir DIR=runs/sweep": "directory of the runs (default: runs/sweep)",
    "--jobs N=1": "make up to N runs at once, each in its own process, sharing the devices (default: 1)",
    "--together": "train all seeds of a configuration in one program: faster if one run does not fill a "
    "GPU; runs started without it can be resumed with it, and vice versa",
    "--nice LEVEL=0": "scheduling priority as for the command nice, from 0 (default) to 19 (lowest)",
}

_COMPILE = {
    "--batch N": "images per step (default: the file's), or search: the largest number that fits, found by "
    "doubling and halving",
    "--capacity SHARE=0.25": "fraction of the channels that may be re-allocated (default: 0.25)",
    "--compare": "compile instead the training steps that `selconv bench` times: of the plain network, the "
    "selective one with and without copies, a frozen and a compact one",
    "--output FILE": "a new JSON file for all results",
}

_BENCH = {
    "--batch N=64": "images per step (default: 64)",
    "--image HxWxC=32x32x3": "image size (default: 32x32x3)",
    "--dtype TYPE=float32": "type of the computation: float32 (default) or bfloat16",
    "--what WHAT,WHAT": "what to measure: step, frozen, compact, reallocate, eval, input, memory, or compile "
    "(which takes long); default: all but compile",
    "--capacity SHARE,SHARE": "fractions of the channels that are re-allocated, and that the step of the "
    "selective network is compiled for, a step for each (default: 0,0.125,0.25,0.5,1)",
    "--share SHARE=0.25": "fraction of the channels that are re-allocated for the frozen step and the "
    "evaluation, and closed for the compact step (default: 0.25)",
    "--repeats N=10": "rounds of measurement (default: 10)",
    "--steps N=0": "training steps per call of a compiled program (default: as training runs do, 1 on "
    "CPU, 50 elsewhere)",
    "--together N=0": "also time the steps of N seeds in one program, as `selconv sweep --together` does",
    "--torch": "also time the same steps in PyTorch",
    "--seed N=0": "seed of all random numbers (default: 0)",
    "--output DIR": "a new directory for the results (default: runs/bench/MODEL)",
}


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the closest command for a misspelled one."""

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        commands = action.choices if isinstance(action, argparse._SubParsersAction) else None
        if commands is not None and value not in commands:
            self.error(f"there is no command {value!r}. {nearest(value, commands)}")
        super()._check_value(action, value)


def _add_options(parser: Any, options: Mapping[str, str], **more: Any) -> None:
    """Add flags and options with their help; an option is of text, or of the type of its default."""
    for form, text in options.items():
        name, _, value = form.partition(" ")
        metavar, has_default, default = value.partition("=")
        if not value:
            parser.add_argument(name, action="store_true", help=text)
        elif has_default:
            number = re.fullmatch(r"\d+(\.\d+)?", default)
            kind = str if number is None else float if number[1] else int
            parser.add_argument(name, metavar=metavar, help=text, type=kind, default=kind(default))
        else:
            parser.add_argument(name, metavar=metavar, help=text, **more)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    parser = _Parser(
        prog="selconv", description="Train CNNs that re-allocate their channels (selective convolutions)."
    )
    parser.add_argument("--version", action="version", version=f"selconv-jax {selconv_jax.__version__}")
    parser.set_defaults(debug=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train", help="train a network", description="Trains the network of a TOML file, in a new directory."
    )
    _add_config(train)
    _add_options(train, {"--workdir DIR": "directory of the run (default: runs/NAME)"})
    _add_cluster(train)

    resume = commands.add_parser(
        "resume", help="resume a run", description="Resumes a run from its last checkpoint."
    )
    _add_run(resume)
    _add_cluster(resume)

    evaluate = commands.add_parser(
        "eval",
        help="evaluate a checkpoint",
        description="Evaluates a checkpoint on all validation images, if any, and all test images.",
    )
    _add_run(evaluate)
    _add_checkpoint(evaluate)
    _add_options(evaluate, {"--compact": "use the compacted network, without closed and unused channels"})
    _add_cluster(evaluate)

    compact = commands.add_parser(
        "compact",
        help="write the compacted network of a checkpoint",
        description="Writes the network of a checkpoint, without closed and unused channels, into a file "
        "for selconv_jax.load_compact.",
    )
    _add_run(compact)
    _add_checkpoint(compact)
    _add_options(compact, _COMPACT)

    _add_export(commands)

    show = commands.add_parser(
        "show",
        help="tables and pictures of a run",
        description="Prints the tables of a run, among them the parameters and multiply-adds of every layer, "
        "and draws its learning curves and channel maps.",
    )
    show.add_argument("workdir", metavar="DIR", help="directory of the run")
    _add_options(
        show,
        {
            "--output DIR": "where the pictures go (default: DIR/pictures)",
            "--html FILE": "write all of it as one page for a browser, FILE.html, instead of pictures",
        },
    )

    _add_sweep(commands)
    _add_bench(commands)
    _add_compile(commands)

    models = commands.add_parser(
        "models",
        help="names, parameters and multiply-adds of the networks",
        description="Lists the networks: parameters, and multiply-adds per image for every image size.",
    )
    models.add_argument("names", nargs="*", metavar="NAME", help="only these networks")

    data = commands.add_parser(
        "data", help="list and prepare data sets", description="Lists and prepares data sets."
    )
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser("prepare", help="turn original files into a prepared data set")
    prepare.add_argument("name", metavar="NAME", help="a name that `selconv data list` shows")
    _add_options(prepare, {"--from PATH": "folder or archive of the original files"}, dest="source")
    listing = actions.add_parser("list", help="list prepared data sets, and how to get the others")
    for action in (prepare, listing):
        _add_options(action, {"--data-dir DIR": "tensorflow-datasets directory (default: that library's)"})
    for command in (parser, *commands.choices.values(), *actions.choices.values()):
        command.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,  # else the command's default would override one before the command
            help=f"show the tracebacks of errors (as {DEBUG}=1 does)",
        )
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument("config", metavar="CONFIG", help="a TOML file, such as experiments/quickstart.toml")
    command.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="replaces a value of the file, such as epochs=10 or optimizer.learning_rate=0.05",
    )


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("workdir", metavar="DIR", help="directory of the run")
    command.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="replaces, for this call only, a value that does not change the result, such as devices=1 or "
        "data.directory=FOLDER",
    )


def _add_cluster(command: argparse.ArgumentParser) -> None:
    cluster = command.add_argument_group(
        "several processes",
        "Start the command once on every machine. On TPU pods and under Slurm and Open MPI the processes "
        "find each other; elsewhere, and on one machine, these options are needed.",
    )
    _add_options(cluster, {"--coordinator HOST:PORT": "address at which all can reach process 0"})
    numbers = {"--process I": "index of this process, from 0", "--processes N": "number of processes"}
    _add_options(cluster, numbers, type=int)
    waiting = "how long to wait for all processes to join (default: 50)"
    _add_options(cluster, {"--join-timeout SECONDS=50.0": waiting})


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    which = (
        "last (default), best (the highest validation accuracy; without validation images, the last), or the "
        "number of a step"
    )
    _add_options(command, {"--checkpoint WHICH=last": which})


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    export = commands.add_parser(
        "export",
        help="write the network of a checkpoint for other programs",
        description="Writes the network of a checkpoint as StableHLO, ONNX or safetensors, compares the file "
        "with the network on random images, and prints sizes and times.",
    )
    _add_run(export)
    _add_checkpoint(export)
    _add_options(export, {"--format FORMAT": "stablehlo, onnx or safetensors (the variables)"}, required=True)
    _add_options(export, _EXPORT)


def _add_sweep(commands: "argparse._SubParsersAction[_Parser]") -> None:
    sweep = commands.add_parser(
        "sweep",
        help="compare configurations over several seeds",
        description="Trains every configuration with every seed and compares them: tables, DIR/sweep.json "
        "and DIR/sweep.png. It may be stopped at any time; the same command resumes it.",
    )
    sweep.add_argument(
        "words",
        nargs="+",
        metavar="CONFIG|KEY=VALUE",
        help="TOML files (FILE@0,1 has these seeds instead of --seeds), and values that replace those of "
        "every file, such as epochs=10",
    )
    sweep.add_argument(
        "--vary",
        action="append",
        default=[],
        metavar="KEY=VALUE,VALUE",
        help="try each value, such as model.variant=plain,selective; given several times, all combinations",
    )
    _add_options(sweep, _SWEEP)


def _add_compile(commands: "argparse._SubParsersAction[_Parser]") -> None:
    compiling = commands.add_parser(
        "compile",
        help="compile a run ahead of time for GPUs or TPUs",
        description="Compiles the training step and the evaluation of a run ahead of time for GPUs or TPUs "
        "that this machine does not have, and prints the memory of a chip, collectives, and kernels and the "
        "bytes they move (GPU) or estimated cycles (TPU). Nothing is run, no image is read.",
    )
    _add_config(compiling)
    chips = "the chips, such as h100, a100:8, v5e:1x1 or v4:4x4x4"
    _add_options(compiling, {"--topology CHIPS": chips}, required=True)
    _add_options(compiling, _COMPILE)


def _add_bench(commands: "argparse._SubParsersAction[_Parser]") -> None:
    bench = commands.add_parser(
        "bench",
        help="time training steps, plain and selective",
        description="Times training steps of networks in turns, on synthetic images: a table, DIR/bench.json "
        "and DIR/bench.png. Ctrl-C ends it with what has been measured.",
    )
    bench.add_argument(
        "words",
        nargs="*",
        metavar="MODEL|KEY=VALUE",
        help="networks that `selconv models` lists (default: densenet40), and their options, such as "
        "blocks=[1,1]",
    )
    _add_options(bench, _BENCH)
