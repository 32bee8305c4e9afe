"""The command line: defaults, typos, refusals, and how a run ends."""

import json
import re

import pytest
import torch

from pvae import cli, run, study
from pvae.data import Dataset, Split
from pvae.schedule import Schedule
from pvae.train import TrainingFailed


def parse(*argv):
    return cli.parse(cli.parser("test"), argv)


def error(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    return re.sub(r"\s+", " ", capsys.readouterr().err)


def test_help_groups_the_arguments_and_gives_defaults(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    for group in ("data:", "model and guide:", "training:", "run:"):
        assert group in text
    for flag in (
        "--num-epochs N",
        "--batch-size B",
        "--learning-rate LR",
        "--latent-dims",
        "--objective",
        "--num-particles",
        "--resume",
        "--quiet",
        "(default: 128)",
        "(default: 0.004)",
    ):
        assert flag in text
    assert "None" not in text


@pytest.mark.parametrize(
    "flag",
    ["--net", "--likelihood", "--guide", "--prior", "--objective", "--device", "--binarize"],
)
def test_a_typo_lists_the_choices(capsys, flag):
    message = error(capsys, flag, "typo")
    assert "typo" in message
    assert "choose from" in message


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["-n", "0"], "must be a whole number at least 1, not '0'"),
        (["-b", "1.5"], "must be a whole number at least 1, not '1.5'"),
        (["-lr", "0"], "must be a number above 0, not '0'"),
        (["-lr", "nan"], "must be a number above 0, not 'nan'"),
        (["--beta", "-1"], "must be a number at least 0, not '-1'"),
        (["--kl-warmup", "1"], "must be a number at least 0 and below 1, not '1'"),
        (["--latent-dims", "two"], "must be a whole number at least 1, not 'two'"),
        (["--binarize", "none"], "use --likelihood continuous_bernoulli"),
        (["--dequantize"], "--likelihood bernoulli must have binary pixels, not dequantised ones"),
        (["--dequantize", "--binarize", "static"], "exclude each other"),
        (["--objective", "iwae"], "needs --num-particles of at least 2"),
        (["--resume", "nowhere"], "nowhere is not the folder of a run"),
    ],
)
def test_wrong_input(capsys, argv, message):
    assert message in error(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "how"),
    [
        ([], "dynamic"),
        (["--binarize", "static"], "static"),
        (["--likelihood", "gaussian"], "grey"),
        (["--likelihood", "gaussian", "--binarize", "threshold"], "threshold"),
        (["--likelihood", "gaussian_shared", "--dequantize"], "dequantized"),
        (["--likelihood", "grey_bernoulli"], "grey"),
    ],
)
def test_how_the_data_is_observed(argv, how):
    assert parse(*argv).observe == how


def test_small_data_trains_1000_steps_unless_told():
    assert study.num_epochs(parse(), 50_000) == 10
    steps = study.num_epochs(parse(), 1_439) * 12
    assert 1000 <= steps < 1012
    assert study.num_epochs(parse("-n", "3"), 1_439) == 3


def test_the_schedule_is_what_the_arguments_say():
    argv = ["--beta", "2", "--kl-warmup", "0.3", "--kl-cycles", "4", "--lr-warmup", "0.1"]
    args = parse(*argv, "--schedule", "constant")
    assert cli.schedule(args) == Schedule(2.0, (0.3,), 4, 0.1, cosine=False)


def test_resume_takes_the_runs_arguments(tmp_path, capsys):
    saved = {**vars(parse("--latent-dim", "7", "-n", "5")), "out": None}
    del saved["observe"]
    of_data = {"name": "digits", "sha256": "0", "observed": "dynamic"}
    config = {"arguments": saved, "dataset": of_data, "seed": 0}
    run.write_json(tmp_path / "config.json", config)
    args = parse("--resume", str(tmp_path), "-n", "9")
    assert args.latent_dims == [7]
    assert args.num_epochs == 9
    assert args.out == str(tmp_path)
    message = error(capsys, "--resume", str(tmp_path), "--out", "elsewhere")
    assert "--out elsewhere and --resume exclude each other" in message
    message = error(capsys, "--resume", str(tmp_path), "--latent-dims", "8")
    assert "--latent-dims [8]: the run in" in message
    assert "has [7]" in message
    run.write_json(tmp_path / "config.json", {**config, "arguments": {**saved, "top_dim": None}})
    assert "by another program or version of pvae (it has top_dim)" in error(
        capsys, "--resume", str(tmp_path)
    )
    (tmp_path / "config.json").write_text("{")
    assert "config.json is damaged" in error(capsys, "--resume", str(tmp_path))


def test_new_folders_never_overwrite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/a", "runs/a-2", "runs/a-3"):
        assert str(run.new_folder(None, "a")) == expected
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "results.json").write_text("{}")
    with pytest.raises(ValueError, match=r"full holds files already.*--resume full"):
        run.new_folder("full", "a")
    assert json.loads((tmp_path / "full" / "results.json").read_text()) == {}
    (tmp_path / "refused").mkdir()  # the folder of a run that was refused before it trained
    for name in (".lock", "config.json"):
        (tmp_path / "refused" / name).touch()
    assert str(run.new_folder("refused", "a")) == "refused"
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"--out file.run cannot be written to"):
        run.new_folder("file/run", "a")


def test_device():
    assert study.find_device("auto").type in ("cpu", "cuda", "mps")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="--device must be one that is here, cpu, not cuda"):
            study.find_device("cuda")


@pytest.mark.parametrize("kind", [ValueError, OSError, TrainingFailed])
def test_errors_are_said_plainly_and_exit_with_1(monkeypatch, kind):
    def main():
        raise kind("the reason")

    monkeypatch.delenv("PVAE_TRACEBACK", raising=False)
    with pytest.raises(SystemExit, match="error: the reason"):
        cli.run_main(main)
    monkeypatch.setenv("PVAE_TRACEBACK", "1")
    with pytest.raises(kind, match="the reason"):
        cli.run_main(main)


def test_a_bug_is_not_hidden():
    def main():
        raise KeyError("bug")

    with pytest.raises(KeyError):
        cli.run_main(main)


def test_an_interrupt_exits_with_130_and_says_how_to_go_on(capsys):
    def main():
        raise KeyboardInterrupt("go on by --resume runs/a")

    with pytest.raises(SystemExit) as stop:
        cli.run_main(main)
    assert stop.value.code == 130
    assert "go on by --resume runs/a" in capsys.readouterr().err


def test_help_gives_the_default_that_an_example_sets(capsys):
    parser = cli.study_parser("test")
    parser.set_defaults(dataset="patches", num_epochs=6)
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "an image folder (default: patches)" in text
    assert "epochs (default: 6)" in text
    assert "(default: 10" not in text


def started(*argv, device="cpu", images=100):
    """Returns a study of `images` training images that has no folder."""
    split = Split(torch.zeros(images, 1, 8, 8, dtype=torch.uint8), None)
    dataset = Dataset("zeros", split, split, split, "")
    args = parse("--quiet", "-n", "1", "-b", "1", *argv)
    return study.Study(args, None, torch.device(device), dataset, None, 0.0)


def test_a_cuda_graph_is_for_a_gpu():
    with pytest.raises(ValueError, match="--engine cuda-graph needs the device cuda, not cpu"):
        study.engine(started("--engine", "cuda-graph"))
    on_gpu = started("--engine", "cuda-graph", device="cuda")
    assert study.engine(on_gpu) is study.ENGINES["cuda-graph"]


def test_auto_captures_what_pays_for_it():
    long = started(images=study.PAYS_BACK)
    assert study.engine(long) is study.ENGINES["captured"]
    assert study.engine(started(images=study.PAYS_BACK - 1)) is study.ENGINES["eager"]
