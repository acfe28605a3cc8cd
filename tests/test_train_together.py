"""Seeds that are made in one program: each as its run alone; stopped, gone on with, failed, refused."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from runs import StopAfter, assert_same_end, compiled_once, final_arrays, quiet_console, tiny_config
from selconv_jax import ConfigError
from selconv_jax._cli.main import main
from selconv_jax.data._loading import open_data
from selconv_jax.train import _loop as loop
from selconv_jax.train import _run_setup as run_setup
from selconv_jax.train._config import dump_config
from selconv_jax.train._distributed.sharding import Placement
from selconv_jax.train._loop import train_run
from selconv_jax.train._metrics import read_metrics
from selconv_jax.train._network import bucket_program
from selconv_jax.train._seeds.requests import Request, answered
from selconv_jax.train._seeds.trainer import JointTrainer, MemberTrainer, common_program
from selconv_jax.train._sweeps import together as sweep_together
from selconv_jax.train._sweeps.configurations import check_sweep, plan_sweep
from selconv_jax.train._sweeps.runs import run_sweep
from selconv_jax.train._trainer import Trainer

SEEDS = [0, 1]


@pytest.fixture(scope="module", autouse=True)
def shared_programs():
    with compiled_once():
        yield


def config_of(**changes):
    """Four steps an epoch, a round after the first epoch."""
    allocation = {"until": 1.0, **changes.pop("allocation", {})}
    return tiny_config(**{"epochs": 2, **changes}, allocation=allocation)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "tiny.toml"
    path.write_text(dump_config(config_of()))
    return path


def sweep(file, workdir, seeds=SEEDS):
    runs = plan_sweep([file], workdir, seeds=seeds)
    console, text = quiet_console()
    return runs, run_sweep(runs, console, together=True), text.getvalue()


@pytest.fixture(scope="module")
def unbroken(file, tmp_path_factory):
    """A sweep from beginning to end."""
    return sweep(file, tmp_path_factory.mktemp("unbroken"))


class Everything:
    """The runs of several seeds, step by step."""

    def __init__(self, config, data, members, placement=None):
        self.base = Trainer(config, data, placement)
        self.joint = JointTrainer(self.base, members)
        self.trainers = [
            MemberTrainer(self.base, dataclasses.replace(config, seed=seed)) for seed in range(members)
        ]
        self.states = [trainer.initial_state() for trainer in self.trainers]

    def answers(self, epoch=0, **details):
        requests = []
        for trainer, state in zip(self.trainers, self.states, strict=True):
            batches = trainer.batches(state, epoch) if "count" in details else None
            program = trainer.program(state, epoch)
            requests.append(Request((0,), trainer, state, program, batches, **details))
        return self.joint.answer(requests, lambda: False)

    def steps(self, epoch, count):
        answers = self.answers(epoch, count=count)
        self.states = [state for state, _ in answers]
        return [float(numbers[0]) for _, numbers in answers]

    def evaluate(self):
        return self.answers(split="test")

    def round(self):
        pairs = zip(self.trainers, self.states, strict=True)
        self.states = [trainer.reallocate(state)[0] for trainer, state in pairs]


@pytest.mark.parametrize(
    "network",
    [{}, pytest.param({"dropout_rate": 0.2}, marks=pytest.mark.slow)],
    ids=["plain", "dropout, mixup, streamed"],
)
def test_losses_are_those_of_runs_alone(network):
    options = {"blocks": [1], "growth": 4, **network}
    config = config_of(
        epochs=20,
        model={"options": options},
        data={"train_split": "train", **({"mixup": 0.5, "streaming": True} if network else {})},
        allocation={"every_steps": 15},
    )
    data = open_data(*config.data.source)
    members = 2
    every = Everything(config, data, members)
    together = [every.steps(0, 1) for _ in range(15)]
    every.round()
    copies = [int(sum((leaf >= 0).sum() for leaf in sources(state))) for state in every.states]
    assert min(copies) > 0
    together += [every.steps(0, 1) for _ in range(15)]
    assert all(
        trainer.interruptions is every.base.interruptions for trainer in (every.joint, *every.trainers)
    )
    assert every.base.interruptions.first_calls.seconds > 0
    evaluated = every.evaluate()
    for seed in range(members):
        alone = Trainer(dataclasses.replace(config, seed=seed), data)
        alone._compiled = every.base._compiled  # compiled once
        state, losses = alone.initial_state(), []
        for step in range(30):
            if step == 15:
                state, _ = alone.reallocate(state)
            program = alone._bucket_program(state)
            state, numbers = alone.run_steps(state, alone.batches(state, 0), program, 1)
            losses.append(float(numbers[0]))
        np.testing.assert_allclose([each[seed] for each in together], losses, rtol=1e-5)
        chex.assert_trees_all_equal(every.states[seed].selectivity, state.selectivity)
        assert int(every.states[seed].step) == int(state.step) == 30
        totals = alone.evaluate(state)
        np.testing.assert_allclose(evaluated[seed].loss, totals.loss, rtol=1e-4)
        assert int(evaluated[seed].count) == int(totals.count) == 100


def sources(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.selectivity)
    return [leaf for path, leaf in leaves if path[-1].key == "source"]


def test_seeds_are_split_over_devices():
    config = config_of()
    data = open_data(*config.data.source)
    one, two = (Everything(config, data, 2, Placement.over(devices, config.batch_size)) for devices in (1, 2))
    for _ in range(2):
        np.testing.assert_allclose(one.steps(0, 1), two.steps(0, 1), rtol=1e-5)
    assert two.joint._mesh.size == 2
    evaluated = [every.evaluate() for every in (one, two)]
    np.testing.assert_allclose(*[[totals.loss for totals in each] for each in evaluated], rtol=1e-5)
    kernel = two.joint._last[1].params["classifier"]["linear"]["kernel"]
    assert {shard.data.shape[0] for shard in kernel.addressable_shards} == {1}
    # Three do not divide: all share both.
    assert JointTrainer(two.base, 3)._mesh is None


def test_every_seed_leaves_what_its_run_alone_leaves(unbroken, tmp_path):
    runs, end, text = unbroken
    assert (end.code, end.failures) == (0, {})
    assert "compiling the training step of 2 seeds" in text
    assert "seed 1: epoch 2/2" in text
    for run in runs:
        alone = tmp_path / str(run.config.seed)
        assert train_run(run.config, alone, quiet_console()[0]) == 0
        assert {path.name for path in alone.iterdir()} == {path.name for path in run.workdir.iterdir()}
        assert (alone / "config.toml").read_text() == (run.workdir / "config.toml").read_text()
        for record, expected in zip(*map(records, (run.workdir, alone)), strict=True):
            assert record.keys() == expected.keys()
            assert record["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-5)
            assert record["reallocated"] == expected["reallocated"]
        step, arrays = final_arrays(alone)
        assert final_arrays(run.workdir)[0] == step == 8
        assert final_arrays(run.workdir)[1].keys() == arrays.keys()


def assert_same_losses(*runs):
    losses = [[record["train_loss"] for record in records(run.workdir)] for run in runs]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def records(workdir):
    return read_metrics(workdir / "metrics.jsonl")


@pytest.mark.parametrize(
    "questions", [6, *(pytest.param(each, marks=pytest.mark.slow) for each in (3, 5, 8))]
)
def test_stopped_and_gone_on_with_bit_for_bit(file, unbroken, tmp_path, monkeypatch, questions):
    with monkeypatch.context() as patch:
        patch.setattr(sweep_together, "stop_request", lambda: StopAfter(questions))
        runs, end, text = sweep(file, tmp_path)
    assert end.code > 128
    assert text.count("stopped after step") == 2
    steps = {final_arrays(run.workdir)[0] for run in runs}
    assert len(steps) == 1
    assert steps < set(range(1, 9))
    runs, end, _ = sweep(file, tmp_path)
    assert end.code == 0
    for run, other in zip(runs, unbroken[0], strict=True):
        assert_same_end(run.workdir, other.workdir)


def test_begun_alone_and_gone_on_with_together(file, unbroken, tmp_path, monkeypatch):
    runs = plan_sweep([file], tmp_path, seeds=SEEDS)
    with monkeypatch.context() as patch:
        patch.setattr(loop, "stop_request", lambda: StopAfter(3))
        assert train_run(runs[1].config, runs[1].workdir, quiet_console()[0]) > 128
    assert final_arrays(runs[1].workdir)[0] == 3
    asked, answer = [], sweep_together._Together._answer
    with monkeypatch.context() as patch:
        patch.setattr(
            sweep_together._Together,
            "_answer",
            lambda self, requests, stop: asked.append(len(requests)) or answer(self, requests, stop),
        )
        runs, end, _ = sweep(file, tmp_path)
    assert end.code == 0
    # The one that is behind is brought up alone.
    assert asked == [1, 1, 1, *[2] * (len(asked) - 3)]
    for run, other in zip(runs, unbroken[0], strict=True):
        assert_same_losses(run, other)


def test_begun_together_and_gone_on_with_alone(file, unbroken, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(sweep_together, "stop_request", lambda: StopAfter(6))
        runs, _, _ = sweep(file, tmp_path)
    end = run_sweep(runs, quiet_console()[0])
    assert end.code == 0
    for run, other in zip(runs, unbroken[0], strict=True):
        assert_same_losses(run, other)


def test_a_seed_that_fails_does_not_stop_the_others(file, unbroken, tmp_path, monkeypatch):
    initial = MemberTrainer.initial_state

    def broken(self):
        state = initial(self)
        if self.config.seed == 1:
            state = dataclasses.replace(state, params=jax.tree.map(lambda leaf: leaf * jnp.nan, state.params))
        return state

    with monkeypatch.context() as patch:
        patch.setattr(MemberTrainer, "initial_state", broken)
        runs, end, text = sweep(file, tmp_path)
    assert end.code == 1
    assert list(end.failures) == ["tiny, seed 1"]
    assert (
        "the loss of step 1 (epoch 1) is not finite; there is no checkpoint yet"
        in end.failures["tiny, seed 1"]
    )
    assert text.count("seed 1: failed: the loss of step 1") == 1
    assert runs[1].log.read_text().startswith("failed: the loss of step 1")
    assert runs[0].is_complete
    assert not runs[1].is_complete
    losses = [
        [record["train_loss"] for record in records(each.workdir)] for each in (runs[0], unbroken[0][0])
    ]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_what_fails_for_all_is_told_for_each(file, tmp_path, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(JointTrainer, "run_steps", fail)
    runs, end, _ = sweep(file, tmp_path)
    assert end.code == 1
    assert len(end.failures) == 2
    assert all(error.startswith("RuntimeError: out of memory (more in ") for error in end.failures.values())
    assert all("Traceback" in run.log.read_text() for run in runs)


@pytest.mark.parametrize(
    ("error", "said", "logged"),
    [
        (ConfigError("no devices"), "no devices", "failed: no devices\n"),
        (RuntimeError("out of memory"), "RuntimeError: out of memory", "Traceback"),
    ],
)
def test_what_cannot_be_prepared_is_told_at_once(file, tmp_path, monkeypatch, error, said, logged):
    def fail(config):
        raise error

    monkeypatch.setattr(run_setup, "prepare", fail)
    runs, end, text = sweep(file, tmp_path)
    assert (end.code, list(end.failures.values())) == (1, [said, said])
    assert text.count(f"failed: {said}\n") == 1
    assert all(run.log.read_text().startswith(logged) for run in runs)


def test_a_single_seed_is_an_ordinary_run(file, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_together, "make_together", lambda *arguments: pytest.fail("it is alone"))
    made = []
    monkeypatch.setattr(
        "selconv_jax.train._sweeps.runs.make_run", lambda run, console: made.append(run) or (0, "")
    )
    runs, end, _ = sweep(file, tmp_path, seeds=[4])
    assert (end.code, made) == (0, runs)


def test_refused_before_anything_starts(file, tmp_path, capsys, monkeypatch):
    arguments = ["sweep", str(file), "--workdir", str(tmp_path / "sweep"), "--together"]
    assert main([*arguments, "--jobs", "2"]) == 1
    assert "--together and --jobs do not go together" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()
    runs = plan_sweep([file], tmp_path, seeds=SEEDS)
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        with pytest.raises(ConfigError, match="is for one process"):
            check_sweep(runs, together=True)
    before = jax.config.jax_default_prng_impl
    try:
        jax.config.update("jax_default_prng_impl", "rbg")
        with pytest.raises(ConfigError, match="random numbers of rbg depend"):
            check_sweep(runs, together=True)
    finally:
        jax.config.update("jax_default_prng_impl", before)


def meet(plans, answer):
    """Runs that make requests of these orders; what each got, in the end a word, and what was answered."""
    got, together = {name: [] for name in plans}, []

    def run(name):
        try:
            for order in plans[name]:
                got[name].append((yield Request((order,), None, None, None)))
        except ValueError as error:
            return str(error)
        finally:
            got[name].append("ended")
        return "all"

    def serve(requests):
        together.append([request.order[0] for request in requests])
        return answer(requests)

    try:
        ends = answered([run(name) for name in plans], serve)
    except KeyboardInterrupt:
        ends = None
    return got, together, ends


def test_who_is_behind_is_answered_first_and_then_all_at_once():
    got, together, ends = meet({"a": [2, 3], "b": [1, 2, 3, 4]}, lambda all: [-each.order[0] for each in all])
    assert together == [[1], [2, 2], [3, 3], [4]]
    assert got == {"a": [-2, -3, "ended"], "b": [-1, -2, -3, -4, "ended"]}
    assert ends == ["all", "all"]


def test_what_goes_wrong_is_told_to_those_who_asked():
    def fail(requests):
        if len(requests) > 1:
            raise ValueError("no memory")
        return ["done"]

    got, _, ends = meet({"a": [1, 2], "b": [1, 2], "c": [7]}, fail)
    assert got == {"a": ["ended"], "b": ["ended"], "c": ["done", "ended"]}
    assert ends == ["no memory", "no memory", "all"]


def test_nobody_waits_when_the_user_insists():
    def insist(requests):
        raise KeyboardInterrupt

    got, together, ends = meet({"a": [1], "b": [1], "c": [2]}, insist)
    assert got == {"a": ["ended"], "b": ["ended"], "c": ["ended"]}
    assert (together, ends) == ([[1, 1]], None)


def test_one_program_holds_the_copies_of_all():
    config = config_of()
    model = Trainer(config, open_data(*config.data.source)).model
    programs = [bucket_program(model, needed) for needed in (0.0, 0.4, 0.2)]
    chosen = common_program([Request((0,), None, None, program) for program in programs])
    assert chosen.model.capacity == 0.5
