"""Command-line arguments of all commands."""

import argparse
from typing import NoReturn

import selconv_jax
from selconv_jax._cli.guard import DEBUG
from selconv_jax.errors import nearest

__all__ = ["make_parser"]


class _Parser(argparse.ArgumentParser):
    """A parser that suggests the closest command for a misspelled one."""

    def error(self, message: str) -> NoReturn:
        if "invalid choice: '" in message:
            name = message.split("invalid choice: '")[1].split("'")[0]
            choices = next(
                list(action.choices)
                for action in self._actions
                if isinstance(action, argparse._SubParsersAction)
            )
            message = f"there is no command {name!r}. {nearest(name, choices)}"
        super().error(message)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the whole command line."""
    parser = _Parser(
        prog="selconv", description="Train CNNs that re-allocate their channels (selective convolutions)."
    )
    parser.add_argument("--version", action="version", version=f"selconv-jax {selconv_jax.__version__}")
    parser.set_defaults(debug=False)
    _add_debug(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    train = commands.add_parser(
        "train",
        help="train a network",
        description="Trains the network of a TOML file, in a new directory.",
    )
    _add_config(train)
    train.add_argument("--workdir", metavar="DIR", help="directory of the run (default: runs/NAME)")
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
    evaluate.add_argument(
        "--compact",
        action="store_true",
        help="use the compacted network, without closed and unused channels",
    )
    _add_cluster(evaluate)

    compact = commands.add_parser(
        "compact",
        help="write the compacted network of a checkpoint",
        description="Writes the network of a checkpoint, without closed and unused channels, into a file "
        "for selconv_jax.load_compact.",
    )
    _add_run(compact)
    _add_checkpoint(compact)
    compact.add_argument(
        "--multiple",
        type=int,
        default=1,
        metavar="N",
        help="round widths up to a multiple of N by keeping idle channels (default: 1)",
    )
    compact.add_argument("--output", metavar="FILE", help="the file (default: DIR/compact.npz)")

    _add_export(commands)

    show = commands.add_parser(
        "show",
        help="tables and pictures of a run",
        description="Prints the tables of a run, among them the parameters and multiply-adds of every layer, "
        "and draws its learning curves and channel maps.",
    )
    show.add_argument("workdir", metavar="DIR", help="directory of the run")
    show.add_argument("--output", metavar="DIR", help="where the pictures go (default: DIR/pictures)")

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
    prepare.add_argument(
        "--from", dest="source", metavar="PATH", help="folder or archive of the original files"
    )
    listing = actions.add_parser("list", help="list prepared data sets, and how to get the others")
    for action in (prepare, listing):
        action.add_argument(
            "--data-dir", metavar="DIR", help="tensorflow-datasets directory (default: that library's)"
        )
    for command in (*commands.choices.values(), *actions.choices.values()):
        _add_debug(command)
    return parser


def _add_debug(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--debug",
        action="store_true",
        default=argparse.SUPPRESS,  # else the command's default would override an option before the command
        help=f"show the tracebacks of errors (as {DEBUG}=1 does)",
    )


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
    cluster.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address at which all can reach process 0"
    )
    cluster.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    cluster.add_argument("--processes", type=int, metavar="N", help="number of processes")
    cluster.add_argument(
        "--join-timeout",
        type=float,
        default=50.0,
        metavar="SECONDS",
        help="how long to wait for all processes to join (default: 50)",
    )


def _add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help="last (default), best (the highest validation accuracy; without validation images, the last), "
        "or the number of a step",
    )


def _add_export(commands: "argparse._SubParsersAction[_Parser]") -> None:
    export = commands.add_parser(
        "export",
        help="write the network of a checkpoint for other programs",
        description="Writes the network of a checkpoint as StableHLO, ONNX or safetensors, compares the file "
        "with the network on random images, and prints sizes and times.",
    )
    _add_run(export)
    _add_checkpoint(export)
    export.add_argument(
        "--format", required=True, metavar="FORMAT", help="stablehlo, onnx or safetensors (the variables)"
    )
    export.add_argument("--compact", action="store_true", help="without closed and unused channels")
    export.add_argument("--normalize", action="store_true", help="take uint8 images and normalize them")
    export.add_argument(
        "--output", metavar="FILE", help="the file (default: DIR/network.FORMAT or DIR/compact.FORMAT)"
    )
    export.add_argument("--overwrite", action="store_true", help="replace an existing file")


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
    sweep.add_argument("--seeds", default="0,1,2", metavar="SEEDS", help="seeds of the runs (default: 0,1,2)")
    sweep.add_argument(
        "--workdir", default="runs/sweep", metavar="DIR", help="directory of the runs (default: runs/sweep)"
    )
    sweep.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="make up to N runs at once, each in its own process, sharing the devices (default: 1)",
    )
    sweep.add_argument(
        "--together",
        action="store_true",
        help="train all seeds of a configuration in one program: faster if one run does not fill a GPU; "
        "runs started without it can be resumed with it, and the other way round",
    )
    sweep.add_argument(
        "--nice",
        type=int,
        default=0,
        metavar="LEVEL",
        help="scheduling priority as for the command nice, from 0 (default) to 19 (lowest)",
    )


def _add_compile(commands: "argparse._SubParsersAction[_Parser]") -> None:
    compiling = commands.add_parser(
        "compile",
        help="compile a run ahead of time for a TPU topology",
        description="Compiles the training step and the evaluation of a run ahead of time for a TPU topology "
        "(needs libtpu, no TPU), and prints the memory of a chip, collectives, and estimated cycles. Nothing "
        "is run, no image is read.",
    )
    _add_config(compiling)
    compiling.add_argument(
        "--topology", required=True, metavar="TPU", help="such as v5e:1x1, v5e:16x16 or v4:4x4x4"
    )
    compiling.add_argument(
        "--batch",
        metavar="N",
        help="images per step (default: the file's); search: the largest that fits, by doubling and halving",
    )
    compiling.add_argument(
        "--capacity",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the channels that may be re-allocated (default: 0.25)",
    )
    compiling.add_argument("--output", metavar="FILE", help="a new JSON file for all results")


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
    bench.add_argument("--batch", type=int, default=64, metavar="N", help="images per step (default: 64)")
    bench.add_argument("--image", default="32x32x3", metavar="HxWxC", help="image size (default: 32x32x3)")
    bench.add_argument(
        "--dtype", default="float32", metavar="TYPE", help="of the computation: float32 (default) or bfloat16"
    )
    bench.add_argument(
        "--what",
        metavar="WHAT,WHAT",
        help="of step, frozen, compact, reallocate, eval, input, memory, and compile, which takes long "
        "(default: all but compile)",
    )
    bench.add_argument(
        "--capacity",
        metavar="SHARE,SHARE",
        help="fractions of the channels that selective steps are compiled for and that are re-allocated then "
        "(default: 0,0.125,0.25,0.5,1)",
    )
    bench.add_argument(
        "--share",
        type=float,
        default=0.25,
        metavar="SHARE",
        help="of the channels: re-allocated for the frozen step and evaluation, closed for the compact step "
        "(default: 0.25)",
    )
    bench.add_argument("--repeats", type=int, default=10, metavar="N", help="rounds (default: 10)")
    bench.add_argument(
        "--steps",
        type=int,
        default=0,
        metavar="N",
        help="training steps per call of a compiled program (default: as training runs do, 1 on CPU, 50 "
        "elsewhere)",
    )
    bench.add_argument(
        "--together",
        type=int,
        default=0,
        metavar="N",
        help="also time the steps of N seeds in one program, as `selconv sweep --together` does",
    )
    bench.add_argument("--torch", action="store_true", help="also time the same steps in PyTorch")
    bench.add_argument(
        "--topology",
        metavar="TPU",
        help="compile the steps ahead of time for a TPU topology, such as v5e:1x1, instead of timing, and "
        "show estimated cycles and memory (needs libtpu)",
    )
    bench.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed of all random numbers (default: 0)"
    )
    bench.add_argument(
        "--output", metavar="DIR", help="a new directory for the results (default: runs/bench/MODEL)"
    )
