"""scripts/launch: what starts a run elsewhere names commands and files that exist."""

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from jalign import cli, sharding
from jalign.sharding import watchdog

ROOT = Path(__file__).resolve().parents[1]
LAUNCH = ROOT / "scripts" / "launch"


def read(words: list[str]):
    """(config, launch) of the words behind `jalign`."""
    return cli.read(words[0], words[1:])


@pytest.mark.parametrize("name", ["gke_jobset", "gke_jobset_gpu"])
def test_a_jobset_starts_a_command_on_every_host(name):
    jobset = yaml.safe_load((LAUNCH / f"{name}.yaml").read_text("utf-8"))
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    hosts = job["parallelism"]
    assert job["completions"] == hosts and job["completionMode"] == "Indexed"
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    # Restarts are the JobSet's, of all pods together; flags and data fail for good.
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["onExitCodes"]["values"] == [cli.EXIT_USER]
    assert rule["onExitCodes"]["containerName"] == container["name"]
    env = {entry["name"]: entry.get("value", "1") for entry in container["env"]}
    args = [re.sub(r"\$\((\w+)\)", lambda m: env[m[1]], a) for a in container["args"]]
    config, launch = read(args)
    chips = sum(container["resources"]["limits"].values())
    assert config.mesh == f"fsdp={hosts * chips}"
    share = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "share"]
    assert config.out.startswith(share[0]) and config.data.startswith(share[0])
    if name == "gke_jobset_gpu":
        jobset_name = jobset["metadata"]["name"]
        first = f"{jobset_name}-{replicated['name']}-0-0.{jobset_name}"
        port = container["ports"][0]["containerPort"]
        assert launch.coordinator == f"{first}:{port}"
        assert (launch.num_processes, launch.process_id) == (hosts, 1)


def test_the_image_has_what_it_copies_and_installs():
    text = (LAUNCH / "Dockerfile").read_text("utf-8")
    copied = [words.split()[1:-1] for words in re.findall(r"(?m)^COPY .*", text)]
    assert copied and all((ROOT / path).exists() for paths in copied for path in paths)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert {project["readme"], *project["license-files"]} <= set(copied[0])
    extras = project["optional-dependencies"]
    assert re.search(r"EXTRA=(\w+)", text)[1] in extras  # type: ignore[index]
    assert {"tpu", "cuda", "ray"} <= extras.keys()


def test_the_commands_that_the_page_gives_to_others_are_ours():
    text = (ROOT / "docs" / "multihost.md").read_text("utf-8").replace("\\\n", " ")
    quoted = re.findall(r'--command="jalign ([^"]*)"', text)
    behind = re.findall(r"ray_train\.py [^\n]*? -- ([^\n]*)", text)
    assert quoted and behind
    for words in (*quoted, *behind):
        read(shlex.split(words))


@pytest.fixture
def fakes(tmp_path):
    """Puts commands into a folder -> PATH with them before all others; each writes its
    words into FOLDER/NAME.log, and ends with the codes that it was given, in turn."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def make(**codes: tuple[int, ...]) -> str:
        for name, ends in codes.items():
            log = tmp_path / f"{name}.log"
            text = (
                f'#!/bin/bash\necho "$@" >> {log}\ncodes=({" ".join(map(str, ends))})\n'
            )
            text += f"exit ${{codes[$(($(wc -l < {log}) - 1))]:-0}}\n"
            (folder / name).write_text(text, "utf-8")
            (folder / name).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return make


@pytest.mark.parametrize(
    ("code", "restarts", "again"),
    [
        (0, 0, 0),
        (2, 0, 0),
        (1, 0, 0),
        (75, 99, 1),
        (76, 9, 1),
        (134, 0, 1),
        (76, 10, 0),
    ],
)
def test_slurm_starts_again_what_was_preempted_stuck_or_dead(
    fakes, tmp_path, code, restarts, again
):
    env = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarts)}
    env["PATH"] = fakes(srun=(code,), scontrol=(0,))
    script = ["bash", str(LAUNCH / "slurm.sbatch"), "sft", "--out", "o p"]
    run = subprocess.run(script, env=env, capture_output=True, text=True)
    assert run.returncode == code, run.stderr
    assert (tmp_path / "srun.log").read_text().endswith("jalign sft --out o p\n")
    requeued = tmp_path / "scontrol.log"
    assert requeued.exists() == bool(again)
    assert not again or requeued.read_text() == "requeue 7\n"


@pytest.mark.parametrize(
    ("ends", "code", "starts"),
    [((76, 134, 0), 0, 3), ((75,), 75, 1), ((76,) * 9, 76, 4)],
)
def test_hosts_of_a_slice_start_again(fakes, tmp_path, ends, code, starts):
    path = fakes(jalign=ends, sleep=())
    (tmp_path / "home").mkdir()
    env = {
        "PATH": path,
        "HOME": str(tmp_path / "home"),
        "PRINT_ONLY": "1",
        "TPU_NAME": "t",
    }
    env |= {"ZONE": "z", "VENV": str(tmp_path), "MAX_RESTARTS": "3"}
    words = ["run", "sft", "--out", "it's"]
    script = ["bash", str(LAUNCH / "tpu_vm_slice.sh"), *words]
    printed = subprocess.run(script, env=env, capture_output=True, text=True).stdout
    *_, remote = shlex.split(printed)
    on_host = f"{remote}; wait $!; echo ended $?"
    shell = ["bash", "-c", on_host]
    run = subprocess.run(shell, env=env, capture_output=True, text=True)
    assert run.stdout == f"ended {code}\n", run.stderr
    log = (tmp_path / "jalign.log").read_text().splitlines()
    assert log == ["sft --out it's"] * starts


class Ray:
    """What ray_train.py uses of Ray Train, for a worker of two that are alone."""

    def __init__(self, rank: int):
        self.reports: list[tuple[int, dict | None]] = []
        context = SimpleNamespace(get_world_rank=lambda: rank, get_world_size=lambda: 2)
        names = {"Checkpoint": Path, "FailureConfig": dict, "RunConfig": dict}
        names |= {"ScalingConfig": dict, "JaxConfig": dict, "JaxTrainer": dict}
        names |= {"get_context": lambda: context, "report": self.report}
        names |= {"broadcast_from_rank_zero": lambda here: "first:1"}
        self.modules = {}
        for name in ("ray", "ray.train", "ray.train.collective", "ray.train.v2.jax"):
            self.modules[name] = module = ModuleType(name)
            vars(module).update(names)
        self.modules["ray"].train = self.modules["ray.train"]  # type: ignore
        util = SimpleNamespace(get_node_ip_address=lambda: "here")
        self.modules["ray"].util = util  # type: ignore
        names["Checkpoint"].from_directory = staticmethod(Path)  # type: ignore

    def report(self, row, checkpoint=None):
        pointer = checkpoint and json.loads(next(checkpoint.iterdir()).read_text())
        self.reports.append((row["step"], pointer))


@pytest.fixture
def ray_train(monkeypatch):
    """rank -> (the fake, the script's module)."""
    import importlib.util

    def load(rank: int):
        fake = Ray(rank)
        for name, module in fake.modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        spec = importlib.util.spec_from_file_location("r", LAUNCH / "ray_train.py")
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        return fake, script

    return load


@pytest.mark.parametrize("rank", [0, 1])
def test_ray_is_told_metrics_and_the_newest_whole_checkpoint(ray_train, rank, tmp_path):
    fake, script = ray_train(rank)
    reporter = script.Reporter(tmp_path, 2)
    folder = tmp_path / "checkpoints"
    for step in range(1, 7):
        if step == 3:
            for name in ("9", "10", "12.orbax-checkpoint-tmp", "11.corrupt"):
                (folder / name).mkdir(parents=True)
        reporter.on_step(step, {"step": step})
    reporter.report()
    steps, pointers = zip(*fake.reports, strict=True)
    assert steps == (2, 4, 6, 6), "the same on all workers"
    told = {"path": str(folder / "10"), "step": 10}
    assert pointers == (None, None if rank else told, None, None)
    hosts = dict(zip(*[iter(script.host_words(False))] * 2, strict=True))
    assert hosts["--coordinator"] == "first:1" and hosts["--process-id"] == str(rank)
    assert script.host_words(True) == []


def test_words_for_ray_are_parted_and_those_for_jalign_checked(ray_train, capsys):
    _, script = ray_train(0)
    given = ["--num-workers", "2", "--", "sft", "--model", "m", "--", "x"]
    options, words = script.parse(given)
    assert options.num_workers == 2 and words == given[3:]
    for wrong in ([], ["--"], ["--", "demo"], ["sft"]):
        with pytest.raises(SystemExit) as stop:
            script.parse(wrong)
        assert stop.value.code == 2
    with pytest.raises(SystemExit):
        script.main(["--", "sft", "--model", "m", "--dtaa", "d", "--out", "o"])
    assert "--data" in capsys.readouterr().err


def test_a_worker_of_ray_that_fails_says_so_to_ray(ray_train, monkeypatch, tmp_path):
    fake, script = ray_train(0)
    seen = []

    def main(words, callbacks):
        seen.append(words)
        callbacks.on_step(2, {"step": 2})
        return len(seen) - 1

    monkeypatch.setattr(cli, "main", main)
    monkeypatch.setattr(script.cli, "main", main)
    given = {"words": ["sft", "--out", "o"], "out": str(tmp_path), "report_every": 2}
    script.train_on_worker(given)
    assert fake.reports == [(2, None), (2, None)]
    assert seen[0][:3] == given["words"] and "--coordinator" in seen[0]
    with pytest.raises(RuntimeError, match="jalign sft ended with 1"):
        script.train_on_worker(given)


def test_flags_of_the_launch_reach_what_they_set(monkeypatch):
    told = {}
    monkeypatch.setattr(
        sharding, "initialize", lambda *hosts, **how: told.update(how, hosts=hosts)
    )
    words = "--model m --prompt p --coordinator a:1 --num-processes 2 --process-id 1"
    words += " --heartbeat-timeout 7 --watchdog-timeout 9 --no-compilation-cache"
    seen = []

    def generate(config):
        assert watchdog._watch is not None
        seen.append(watchdog._watch._timeout)

    monkeypatch.setattr("jalign.commands.run_generate", generate)
    assert cli.main(["generate", *words.split()]) == 0
    assert told == {"hosts": ("a:1", 2, 1), "heartbeat_timeout": 7} and seen == [9.0]
    for flag in ("--heartbeat-timeout 0", "--watchdog-timeout -1"):
        assert cli.main(["generate", *words.split(), *flag.split()]) == cli.EXIT_USER
