"""The script for half an hour on a GPU: the commands of its pieces, and what it does with what is there."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from selconv_jax._cli.arguments import make_parser

SCRIPT = Path(__file__).resolve().parent.parent / "experiments" / "gpu_half_hour.sh"


def run(folder, *pieces, program="echo", **environment):
    """Runs the script with a program that only repeats its words."""
    environment = os.environ | {"RUNS": str(folder), "SELCONV": program} | environment
    return subprocess.run(
        [SCRIPT, *pieces], env=environment, capture_output=True, text=True, check=False, timeout=60
    )


def test_commands_of_the_pieces_parse(tmp_path):
    done = run(tmp_path, NETWORK="blocks=[1] --repeats 2", RUN="epochs=1")
    assert done.returncode == 0, done.stderr
    commands = [line for line in done.stdout.splitlines() if not line.startswith("==")]
    assert [command.split()[0] for command in commands] == ["bench", "bench", "train", "sweep"]
    assert "--together 5" in commands[1]
    assert "epochs=100 epochs=1" in commands[2]  # the last one counts
    for command in commands:
        options, rest = make_parser().parse_known_args(shlex.split(command))
        assert not [word for word in rest if word.startswith("-")]
        assert options.command in ("bench", "train", "sweep")


def test_what_is_there_is_not_made_again(tmp_path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "bench.json").write_text("{}")
    (tmp_path / "hundred").mkdir()
    done = run(tmp_path, "bench", "hundred")
    assert f"bench: complete, see {tmp_path}/bench" in done.stdout
    assert f"resume {tmp_path}/hundred" in done.stdout.splitlines()
    assert (tmp_path / "bench" / "bench.json").exists()


@pytest.mark.parametrize(
    ("program", "said", "code"),
    [("sleep 60 #", "study: not complete yet", 0), ("false", "study: failed (exit status 1)", 1)],
)
def test_pieces_that_end_early(tmp_path, program, said, code):
    # A script of one word, as the program's words are those of a command.
    script = tmp_path / "program"
    script.write_text(f"#!/bin/sh\nexec {program}\n")
    script.chmod(0o755)
    done = run(tmp_path / "runs", "study", program=str(script), LIMIT="1")
    assert done.returncode == code
    assert said in done.stdout + done.stderr


def test_a_piece_that_is_none(tmp_path):
    done = run(tmp_path, "bench", "stdy")
    assert done.returncode == 2
    assert "there is no piece 'stdy'" in done.stderr
    assert not done.stdout
