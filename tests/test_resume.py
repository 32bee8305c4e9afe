"""Nothing is lost if runs are killed, stopped or moved, files damaged, disks full, numbers bad."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import kill
import mnist_svi
import pytest
import swap
import torch
from pyro.infer import SVI, Trace_ELBO
from test_train import new_trainer, small, tensors, without_time

import pvae
from pvae import SingleOptimizer, build, checkpoint, cli, files, keeping, run
from pvae.data import pixels
from pvae.evaluate import active_units, posterior_means
from pvae.optim import NotFinite
from pvae.schedule import Schedule
from pvae.stopping import Stopped, asked_to_stop
from pvae.train import Trainer, TrainingFailed

ROOT = Path(pvae.__file__).parent.parent
SHORT = [*kill.SMALL, "-n", "2", "-b", "256", "--quiet"]


def stopping_at(trainer, step, act):
    """Calls `act` within the training step of this number."""
    launch = trainer.svi.step

    def step_of_svi(*args):
        if trainer.step == step:
            act()
        return launch(*args)

    trainer.svi.step = step_of_svi
    return trainer


def same_end(one, other):
    assert without_time(one.history) == without_time(other.history)
    final = tensors(other)
    assert all(torch.equal(t, final[name]) for name, t in tensors(one).items())
    moments = [t.optimizer.state_dict()["state"] for t in (one, other)]
    for i, of in moments[0].items():
        assert all(torch.equal(v, moments[1][i][name]) for name, v in of.items())


# ---- killed, stopped ----


@pytest.mark.parametrize("net", ["mlp", pytest.param("conv", marks=pytest.mark.slow)])
@pytest.mark.parametrize("step", [0, 4, 5, 11])
def test_a_run_stopped_within_an_epoch_goes_on_from_there(tmp_path, step, net):
    """Stops at the first step, in and at the end of an epoch of three batches, at the run's end."""
    whole = new_trainer(net=net)
    whole.fit()
    trainer = new_trainer(tmp_path, net=net, go_on="--resume it")
    stopping_at(trainer, step, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(
        Stopped, match=rf"batch {step % 3 + 1} of 3 in epoch .*go on by --resume it"
    ):
        trainer.fit()
    assert trainer.step == step + 1  # the step was finished
    resumed = new_trainer(tmp_path, net=net, seed=99)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed.step == step + 1
    resumed.fit()
    same_end(resumed, whole)


def test_checkpoints_come_by_the_clock(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(keeping, "write", lambda folder, state: steps.append(state["step"]))
    new_trainer(tmp_path, epochs=2, checkpoint_minutes=1e-9).fit()
    assert steps == [1, 2, 3, 3, 4, 5, 6, 6]
    steps.clear()
    new_trainer(tmp_path, epochs=2).fit()
    assert steps == [3, 6]
    with pytest.raises(ValueError, match="checkpoint_minutes must be above 0, not 0"):
        new_trainer(checkpoint_minutes=0)


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_exit_status_names_the_signal(tmp_path, signum, status, capsys):
    trainer = stopping_at(new_trainer(tmp_path), 4, lambda: signal.raise_signal(signum))
    with pytest.raises(SystemExit) as stop:
        cli.run_main(trainer.fit)
    assert stop.value.code == status
    assert "checkpoint.pt holds the state after batch 2 of 3 in epoch 2" in capsys.readouterr().err


def test_a_second_signal_stops_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    trainer = stopping_at(new_trainer(tmp_path), 4, twice)
    with pytest.raises(Stopped, match="holds the state after epoch 1"):
        trainer.fit()
    assert trainer.step == 4
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_thread_leaves_signals_alone():
    handlers = []

    def look():
        with asked_to_stop():
            handlers.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert handlers == [signal.default_int_handler]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    mnist_svi.main([*SHORT, "--out", str(folder)])
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("moments", [["training"], ["write", "first seconds"]])
def test_a_killed_run_ends_as_the_whole_one(tmp_path, whole, moments):
    longer = [*SHORT, "-b", "64"]
    kill.finish([*longer, "--out", str(tmp_path / "whole")])
    kill.run(longer, tmp_path / "killed", moments, seed=1)
    assert kill.differences(tmp_path / "whole", tmp_path / "killed") == []


def test_the_comparison_of_runs_sees_a_bit(tmp_path, whole):
    other = tmp_path / "run"
    mnist_svi.main([*SHORT, "--out", str(other)])
    assert kill.differences(whole, other) == []
    state = checkpoint.read(other / "best.pt")
    next(iter(state["model"].values())).view(-1)[0] += 1e-6
    checkpoint.write(other / "best.pt", state)
    assert len(kill.differences(whole, other)) == 1


def test_pictures_on_the_way_spend_no_random_numbers():
    quiet = new_trainer()
    quiet.fit()
    noisy = new_trainer(on_epoch=lambda t: torch.rand(7))
    noisy.fit()
    same_end(quiet, noisy)


# ---- the files of a run ----


@pytest.mark.parametrize("seed", range(5))
def test_a_flipped_bit_is_noticed(tmp_path, seed):
    path = tmp_path / "a.pt"
    checkpoint.write(path, {"weights": torch.randn(5000), "history": [{"epoch": 1.0}]})
    content = bytearray(path.read_bytes())
    start = content.index(torch.load(path)["weights"].numpy().tobytes())
    content[start + random.Random(seed).randrange(20_000)] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt (is damaged|cannot be read)"):
        checkpoint.read(path)


def test_a_checksum_is_of_all_that_is_kept():
    state = {"a": torch.ones(2, 2), "b": [{"c": 1.0}], "d": torch.ones((), dtype=torch.bfloat16)}
    sums = {
        checkpoint.checksum(other)
        for other in (state, state | {"b": [{"c": 2.0}]}, state | {"d": -state["d"]}, {"a": 1})
    }
    assert len(sums) == 4
    turned = state | {"a": torch.ones(2, 2).t()}  # the order in memory does not count
    assert checkpoint.checksum(turned) in sums


@pytest.mark.parametrize("fault", ["cut", "missing"])
def test_the_checkpoint_before_takes_the_place_of_a_damaged_one(tmp_path, capsys, fault):
    whole = new_trainer()
    whole.fit()
    new_trainer(tmp_path).fit(until=3)
    newest = tmp_path / "checkpoint.pt"
    if fault == "cut":
        newest.write_bytes(newest.read_bytes()[:1000])
    else:
        newest.unlink()
    assert keeping.exists(tmp_path)
    resumed = new_trainer(tmp_path)
    resumed.resume(newest)
    assert resumed.epoch == 2
    said = capsys.readouterr().out
    assert said.startswith("warning: ")
    assert "checkpoint.previous.pt, the checkpoint before it, takes its place" in said
    assert not newest.exists()  # else the next write would keep it instead of the good one
    resumed.fit()
    same_end(resumed, whole)


def test_two_damaged_checkpoints_are_an_error(tmp_path):
    new_trainer(tmp_path).fit(until=2)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (tmp_path / name).write_bytes(b"no")
    with pytest.raises(ValueError, match=r"checkpoint\.previous\.pt cannot be read"):
        new_trainer(tmp_path).resume(tmp_path / "checkpoint.pt")


def test_a_full_disk_stops_the_run_and_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = new_trainer(tmp_path)
    trainer.fit(until=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path, write, previous=None):
        def write_half(file):
            file.write(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        files.write_atomically(path, write_half, previous)

    monkeypatch.setattr(checkpoint, "write_atomically", full)
    with pytest.raises(TrainingFailed, match=r"No space left.*holds the state after epoch 2"):
        trainer.fit()
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        assert after[name] == before[name]
    assert after.keys() == before.keys()


def test_a_file_in_no_folder_is_refused_by_its_own_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.a cannot be written: there is no folder"):
        files.write_atomically(tmp_path / "nowhere" / "a", lambda file: file.write(b"a"))


def test_files_and_folders_reach_the_disk(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda d: synced.append(os.path.isdir(f"/proc/self/fd/{d}")))
    files.write_atomically(tmp_path / "a", lambda file: file.write(b"a"))
    assert synced == [False, True]


def test_leftovers_are_removed_on_resume(tmp_path, whole):
    copied = tmp_path / "moved"
    shutil.copytree(whole, copied)
    left = [copied / f".checkpoint.pt.{'0a' * 16}", copied / "progress" / f".a.png.{'1b' * 16}"]
    for path in left:
        path.write_bytes(b"half")
    (copied / ".mine").touch()
    mnist_svi.main(["--resume", str(copied), "--quiet"])
    assert not any(path.exists() for path in left)
    assert (copied / ".mine").exists()
    assert kill.differences(whole, copied) == []  # a moved run ends as the whole one


TAKE = """
import sys
from pathlib import Path
from pvae import keeping
keeping.lock(Path(sys.argv[1]))
print("in", flush=True)
input()
"""


def other_process(folder):
    command = [sys.executable, "-c", TAKE, str(folder)]
    pipe = subprocess.PIPE
    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env=os.environ, cwd=ROOT)
    assert process.stdout.readline() == b"in\n"
    return process


def test_one_process_at_a_time(tmp_path):
    with other_process(tmp_path) as other:
        with pytest.raises(ValueError, match="is in use by another process"):
            keeping.lock(tmp_path)
        other.kill()  # a dead process holds no lock
    keeping.lock(tmp_path)
    keeping.lock(tmp_path)  # a process may lock its own folder again


def test_a_file_system_without_locks_stops_nobody(tmp_path, monkeypatch):
    import fcntl

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    keeping.lock(tmp_path)


def test_another_processor_is_said(tmp_path, whole, capsys):
    copied = tmp_path / "r"
    shutil.copytree(whole, copied)
    config = run.read_config(copied)
    assert config["processor"] == run.processor(torch.device("cpu"))
    config["processor"] = "abacus"
    config["versions"]["torch"] = "2.8"
    run.write_json(copied / "config.json", config)
    mnist_svi.main(["--resume", str(copied), "--quiet"])
    said = capsys.readouterr().out
    assert said.count("warning:") == 1
    assert "processor abacus -> " in said
    assert "torch 2.8 -> " in said
    assert "may differ by rounding" in said
    mnist_svi.main(["--resume", str(copied), "--quiet"])
    assert "warning" not in capsys.readouterr().out
    torch.set_num_threads(2)
    try:
        mnist_svi.main(["--resume", str(copied), "--quiet"])
    finally:
        torch.set_num_threads(1)
    assert "threads 1 -> 2: the rest of this run may differ" in capsys.readouterr().out
    del config["threads"], config["processor"]  # as in runs of an older version
    config["versions"] = run.versions()
    run.write_json(copied / "config.json", config)
    mnist_svi.main(["--resume", str(copied), "--quiet"])
    assert "warning" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_goes_on_with_the_pairs_that_are_missing(tmp_path, monkeypatch):
    argv = ["--dataset", "digits", "-n", "2", "-b", "512", "--hidden", "8", "--latent-dim", "2"]
    argv += ["--combinations", "beta=2", "guide=mixture", "--quiet"]
    swap.main([*argv, "--out", str(tmp_path / "whole")])
    trained = []
    step = Trainer._step

    def counted(self, *batch):
        trained.append(self.folder.name)
        if len(trained) == 5:  # while the second pair trains
            signal.raise_signal(signal.SIGTERM)
        return step(self, *batch)

    monkeypatch.setattr(Trainer, "_step", counted)
    with pytest.raises(Stopped, match=rf"go on by --resume {tmp_path}/stopped\."):
        swap.main([*argv, "--out", str(tmp_path / "stopped")])
    (tmp_path / "stopped").rename(tmp_path / "moved")
    swap.main(["--resume", str(tmp_path / "moved"), "--quiet"])
    assert [trained.count(name) for name in ("the_first", "beta=2", "guide=mixture")] == [6, 6, 6]

    def numbers(name):
        found = json.loads((tmp_path / name / "results.json").read_text())
        return [{k: v for k, v in of.items() if "seconds" not in k} for of in found.values()]

    assert numbers("moved") == numbers("whole")


# ---- numbers that are not finite ----


def with_bad_gradient(trainer, step):
    """Makes a gradient NaN at this step."""
    first = next(trainer.vae.model.parameters())
    spoiled = {"now": False}

    def spoil(gradient):
        return gradient * torch.nan if spoiled.pop("now", False) else gradient

    first.register_hook(spoil)
    return stopping_at(trainer, step, lambda: spoiled.update(now=True))


def test_a_gradient_that_is_not_finite_stops_the_run_and_is_named(tmp_path):
    trainer = with_bad_gradient(new_trainer(tmp_path), 4)
    seen = []
    trainer.on_epoch = lambda t: seen.append(tensors(t))
    with pytest.raises(TrainingFailed) as stop:
        trainer.fit()
    said = str(stop.value)
    name = next(iter(dict(trainer.vae.named_parameters())))
    assert f"a gradient is not finite, of {name}, at step 4 (epoch 2, batch 2 of 3" in said
    assert "learning rate 0.00" in said
    assert "holds the state after epoch 1" in said
    kept = checkpoint.read(tmp_path / "checkpoint.pt")["model"]
    assert all(torch.equal(t, seen[-1][name]) for name, t in kept.items())


def test_a_batch_is_left_out_and_counted(tmp_path, capsys):
    trainer = with_bad_gradient(skipping(tmp_path, quiet=False), 4)
    seen = []
    call = trainer.svi.optim.optimizer.step
    trainer.svi.optim.optimizer.step = lambda: (seen.append(trainer.step), call())[1]
    trainer.fit()
    assert seen == [step for step in range(12) if step != 4]
    assert [row["skipped"] for row in trainer.history] == [0, 1, 0, 0]
    assert all(t.isfinite().all() for t in tensors(trainer).values())
    assert "1 batches left out" in capsys.readouterr().out
    # a resumed run continues the count
    resumed = skipping(tmp_path)
    resumed.resume(tmp_path / "checkpoint.pt")
    assert resumed._skipped() == 0


@pytest.mark.filterwarnings("ignore:Encountered NaN")
def test_where_all_is_left_out_the_run_stops(tmp_path):
    trainer = skipping(tmp_path)
    trainer.vae.model.likelihood.net.out.bias.data.fill_(torch.nan)
    with pytest.raises(TrainingFailed, match="every batch of the epoch was left out"):
        trainer.fit()


def skipping(folder, **options):
    torch.manual_seed(0)
    vae = build((1, 28, 28), 3, "mlp", hidden=16)
    adam = torch.optim.Adam(vae.parameters(), lr=1e-2, fused=True)
    svi = SVI(vae.model, vae.guide, SingleOptimizer(adam, on_nan="skip"), Trace_ELBO())
    defaults = {"epochs": 4, "batch_size": 100, "quiet": True}
    return Trainer(vae, svi, small(), folder=folder, **(defaults | options))


def test_gradients_are_clipped_to_a_norm():
    """Gradients of norm 3 and 4 have the common norm 5, so each is divided by 5."""
    a, b = (torch.nn.Parameter(torch.zeros(3)) for _ in range(2))
    for p, factor in ((a, 3.0), (b, 4.0)):
        p.grad = torch.tensor([factor, 0.0, 0.0])
    SingleOptimizer(torch.optim.SGD([a, b], lr=1.0), clip_norm=1.0)({a, b})
    torch.testing.assert_close(a.data, torch.tensor([-0.6, 0.0, 0.0]))
    torch.testing.assert_close(b.data, torch.tensor([-0.8, 0.0, 0.0]))


def test_small_gradients_are_not_scaled_up():
    a = torch.nn.Parameter(torch.zeros(2))
    a.grad = torch.tensor([0.3, 0.4])
    SingleOptimizer(torch.optim.SGD([a], lr=1.0), clip_norm=1.0)([a])
    assert torch.equal(a.data, torch.tensor([-0.3, -0.4]))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_a_bad_step_leaves_parameters_and_moments(bad, fused):
    for on_nan in ("stop", "skip"):
        a = torch.nn.Parameter(torch.ones(2))
        adam = torch.optim.Adam([a], fused=fused)
        optim = SingleOptimizer(adam, on_nan=on_nan)
        a.grad = torch.ones(2)
        optim([a])
        before = a.detach().clone(), {k: v.clone() for k, v in adam.state[a].items()}
        a.grad = torch.tensor([1.0, bad])
        if on_nan == "stop":
            with pytest.raises(NotFinite) as stop:
                optim([a])
            assert stop.value.parameters[0] is a
        else:
            optim([a])
            assert optim.left_out == 1
        assert torch.equal(a.data, before[0])
        assert all(torch.equal(v, before[1][k]) for k, v in adam.state[a].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be above 0, not 0.0"),
        ({"on_nan": "go"}, "on_nan must be one of stop, skip, not 'go'"),
    ],
)
def test_bad_arguments_of_the_optimizer(options, message):
    with pytest.raises(ValueError, match=message):
        SingleOptimizer(torch.optim.SGD([torch.ones(1)], lr=1.0), **options)


# ---- collapse ----


def test_a_collapsed_pair_is_said_once(capsys):
    trainer = new_trainer(epochs=5, schedule=Schedule(beta=100.0, kl_warmup=0.4), quiet=False)
    for group, rate in zip(trainer.optimizer.param_groups, [0.1], strict=True):
        group["lr"] = rate
    trainer._base_rates = [0.0]  # the pair does not train, and its codes say nothing
    with torch.no_grad():
        for p in trainer.vae.guide.parameters():
            p.zero_()
    trainer.fit()
    assert [row["active_units"] for row in trainer.history] == [0] * 5
    out = capsys.readouterr().out
    assert out.count("0 of 3 units are active: the pair hardly uses z") == 1
    assert "free bits usually help (epoch 3)" in out  # after the warm-up


@pytest.mark.parametrize("guide", ["normal", "ladder"])
def test_active_units_of_layers_are_those_of_the_first(guide):
    vae = build((1, 28, 28), (4, 2), "mlp", guide=guide, hidden=16)
    trainer = new_trainer(vae=vae, epochs=1)
    trainer._base_rates = [0.0]
    trainer.fit()
    means = posterior_means(vae.guide, pixels(trainer.data.validation.images))
    assert means.shape[1] == 4
    assert trainer.history[0]["active_units"] == active_units(means)


def test_studies_that_train_several_pairs_take_resume():
    for resumable in (False, True):
        parser = cli.study_parser("", resumable=resumable)
        assert ("--resume" in parser.format_help()) == resumable


@pytest.mark.parametrize("name", ["model", "optimizer", "history", "step", "random_state"])
@pytest.mark.parametrize("junk", [None, 3.5, "text", [1], {"a": 1}])
def test_a_whole_file_of_junk_is_nothing_to_go_on_from(tmp_path, name, junk):
    trainer = new_trainer(tmp_path, epochs=2)
    state = {**trainer.state(), name: junk}
    checkpoint.write(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match=r"checkpoint\.pt"):
        trainer.resume(tmp_path / "checkpoint.pt")


def test_a_damaged_argument_of_a_run(whole, tmp_path, capsys):
    folder = tmp_path / "r"
    shutil.copytree(whole, folder)
    config = json.loads((folder / "config.json").read_text())
    config["arguments"]["learning_rate"] = "fast"
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit):
        mnist_svi.main(["--resume", str(folder)])
    assert "learning_rate must be as 0.004, not 'fast'" in capsys.readouterr().err
