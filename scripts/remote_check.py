"""Runs whose model, data and OUT are all in an object store, against runs on the disk.

    pip install -e ".[remote]" gcsfs gcp-storage-emulator s3fs "moto[server]"
    PYTHONPATH=. python scripts/remote_check.py [--stores gs,s3]

A server of each store runs on this machine, with a tiny model and its rows in it:
gcp-storage-emulator for gs://, moto for s3://. The same commands run on both sides:

- whole: sft and dpo in one go. Every file of OUT/model, the metrics but for times, and
  reference.npz are those of the disk, bit for bit.
- killed: the same with SIGKILL in the midst (torn checkpoints and a lock are left), and
  once more; bit for bit what the run in one go gives.
- two: two processes of two devices each, SIGKILLed and continued; as two on the disk.
  Checkpoints of several processes are for gs:// alone; s3:// is shown to refuse.
- adapter, merge, generate, eval: what is written is what is written on the disk.
- seen: what comes of a bucket that is not there, of a broken row, of a server that is
  gone. One line each, exit code 2.

A table says for each line whether it holds; ends with 1 where one does not.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path
from urllib.request import urlopen

from jalign.paths import files_below, located
from tests.command_process import finish, start
from tests.sharding.processes import free_port
from tests.train import world

BUCKET = "jalign-bucket"
STEPS, AT = 8, 6
RUN = ("--steps", str(STEPS), "--checkpoint-every", "2", "--cpu-devices", "2")
TIMES = {"step_time", "tokens_per_second"}
ENVIRON = {
    "gs": {
        "STORAGE_EMULATOR_HOST": "http://127.0.0.1:{port}",
        "TENSORSTORE_GCS_HTTP_URL": "http://127.0.0.1:{port}",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    },
    "s3": {
        "AWS_ENDPOINT_URL": "http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    },
}
SERVER = {
    "gs": [sys.executable, __file__, "--serve", "{port}"],
    "s3": [
        str(Path(sys.executable).with_name("moto_server")),
        *("-H", "127.0.0.1", "-p", "{port}"),
    ],
}


def serve_gcs(port: int) -> None:
    """The emulator, with the conditional reads and writes that it lacks: several
    writers of one object, as orbax has them, rely on these."""
    from gcp_storage_emulator import server as emulator
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.handlers import objects

    def conditional(handler):
        def handle(request, response, storage, *args, **kwargs):
            request.data  # noqa: B018 - read, whatever is answered
            query, bucket = request.query, request.params["bucket_name"]
            name = request.params.get("object_id") or query.get("name", [""])[0]
            try:
                generation = storage.get_file_obj(bucket, name)["generation"]
                response["X-Goog-Generation"] = generation
                response["X-Goog-Metageneration"] = "1"
            except NotFound:
                generation = "0"
            if query.get("ifGenerationMatch", [generation]) != [generation]:
                response.status = HTTPStatus.PRECONDITION_FAILED
            elif query.get("ifGenerationNotMatch") == [generation]:
                response.status = HTTPStatus.NOT_MODIFIED
            else:
                handler(request, response, storage, *args, **kwargs)

        return handle

    table = [
        (url, {verb: conditional(f) if f in known else f for verb, f in verbs.items()})
        for known in [{objects.insert, objects.get, objects.download, objects.delete}]
        for url, verbs in emulator.HANDLERS
    ]
    emulator.HANDLERS = tuple(table)
    emulator.Server("127.0.0.1", port, True, BUCKET).run()


@contextlib.contextmanager
def server(store: str) -> Iterator[subprocess.Popen]:
    """A store on this machine, and the environment that leads to it."""
    port = free_port()
    command = [word.format(port=port) for word in SERVER[store]]
    os.environ |= {k: v.format(port=port) for k, v in ENVIRON[store].items()}
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, **quiet)  # pyright: ignore
    try:
        for _ in range(100):
            with contextlib.suppress(OSError):
                urlopen(f"http://127.0.0.1:{port}").close()
                break
            time.sleep(0.2)
        if store == "s3":
            import s3fs

            s3fs.S3FileSystem().mkdir(BUCKET)
        yield process
    finally:
        process.kill()


def command(kind: str, base: str, out: str, *flags: str) -> list[str]:
    """`jalign KIND` of the world at `base`."""
    words = world.words(kind, Path("BASE"), Path("OUT"), *RUN, *flags)
    places = {"BASE": base, "OUT": f"{base}/{out}"}
    heads = {word: word.partition("/") for word in words}
    return [places.get(h, h) + s + t for h, s, t in (heads[word] for word in words)]


def run(*commands: list[str], code: int = 0, **how) -> str:
    return finish(start(*commands, **how), code)


def pair(words: list[str], kill: bool) -> None:
    """Two processes of a run; with kill both die in the midst."""
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2"]
    how = (signal.SIGKILL, AT) if kill else None
    both = [
        start([*words, "--mesh", "fsdp=4", *hosts, "--process-id", str(i)], signal=how)
        for i in range(2)
    ]
    texts = [process.communicate(timeout=300)[0] for process in both]
    codes = [process.returncode for process in both]
    if any(code != 0 for code in codes) != kill:
        raise AssertionError(f"{codes}\n{texts[0]}\n{texts[1]}")


def rows(out: str) -> list[dict]:
    lines = (located(out) / "metrics.jsonl").read_text("utf-8").splitlines()
    return [
        {k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines
    ]


def contents(folder: str) -> dict[str, bytes]:
    start = len(str(located(folder))) + 1
    return {str(f)[start:]: f.read_bytes() for f in files_below(located(folder))}


class Table:
    """What holds, a line each."""

    def __init__(self):
        self.failed = False

    def line(self, what: str, ok: bool, seconds: float) -> None:
        self.failed |= not ok
        print(f"{'ok  ' if ok else 'FAIL'} {what:<44} {seconds:6.1f} s", flush=True)

    @contextlib.contextmanager
    def check(self, what: str) -> Iterator[list[bool]]:
        """Takes what has to be true; an error of the block is a failure, too."""
        begin, found = time.perf_counter(), []
        try:
            yield found
        except (AssertionError, OSError, subprocess.TimeoutExpired) as error:
            print(str(error)[-3000:])
            found.append(False)
        if not all(found):
            print(found)
        self.line(what, all(found) and bool(found), time.perf_counter() - begin)


def same_run(here: str, there: str, name: str, other: str, part: str) -> list[bool]:
    """Whether OUT `other` there is OUT `name` here."""
    found = [contents(f"{here}/{name}/{part}") == contents(f"{there}/{other}/{part}")]
    found.append(rows(f"{here}/{name}") == rows(f"{there}/{other}"))
    return [*found, bool(rows(f"{here}/{name}"))]


def check_runs(table: Table, store: str, here: str, there: str) -> None:
    for kind in ("sft", "dpo"):
        with table.check(f"{store}: {kind} in one go") as found:
            run(command(kind, there, f"{kind}-whole"))
            found += same_run(here, there, kind, f"{kind}-whole", "model")
        with table.check(f"{store}: {kind} killed and continued") as found:
            words = command(kind, there, f"{kind}-killed")
            run(words, signal=(signal.SIGKILL, AT), code=-signal.SIGKILL)
            found.append(not contents(f"{there}/{kind}-killed/model"))
            said = run(words)
            found += ["continuing from step" in said, "has not said" in said]
            found += same_run(here, there, kind, f"{kind}-killed", "model")
            steps = located(f"{there}/{kind}-killed/checkpoints").iterdir()
            found.append({p.name for p in steps} == {"6", "8"})
    with table.check(f"{store}: started anew, the old set aside") as found:
        said = run([*command("sft", there, "sft-killed"), "--no-resume"])
        found += same_run(here, there, "sft", "sft-killed", "model")
        found.append("checkpoints.old1" in said)
    npz = [contents(f"{base}/dpo{end}")["reference.npz"] for base, end in
           ((here, ""), (there, "-whole"))]  # fmt: skip
    table.line(f"{store}: reference.npz", npz[0] == npz[1], 0)


def check_two(table: Table, store: str, here: str, there: str) -> None:
    words = command("sft", there, "two")
    if store != "gs":
        with table.check(f"{store}: two processes are refused") as found:
            try:
                pair(words, kill=False)
            except AssertionError as error:
                found.append("mount it on every host" in str(error))
        return
    with table.check(f"{store}: two processes in one go") as found:
        pair(words, kill=False)
        found += same_run(here, there, "two", "two", "model")
    with table.check(f"{store}: two processes killed and continued") as found:
        words = command("sft", there, "two-killed")
        pair(words, kill=True)
        found.append(not contents(f"{there}/two-killed/model"))
        pair(words, kill=False)
        found += same_run(here, there, "two", "two-killed", "model")


def one_shots(base: str) -> list[list[str]]:
    lora, prompts = f"{base}/lora/adapter", f"{base}/prompts.jsonl"
    mesh = ("--mesh", "fsdp=1", "--cpu-devices", "2")
    return [
        command("sft", base, "lora", "--lora-rank", "2"),
        ["merge", "--adapter", lora, "--out", f"{base}/merged"],
        ["generate", "--model", lora, "--prompts", prompts, "--max-new-tokens", "4",
         "--out", f"{base}/done/texts.jsonl", *mesh],
        ["eval", "--model", f"{base}/merged", "--data", f"{base}/rows.jsonl", "--split",
         "train", "--out", f"{base}/done/eval.json", *mesh],
    ]  # fmt: skip


def check_one_shots(table: Table, store: str, here: str, there: str) -> None:
    with table.check(f"{store}: adapter, merge, generate, eval") as found:
        run(*one_shots(there))
        for part in ("merged", "done"):
            found.append(contents(f"{here}/{part}") == contents(f"{there}/{part}"))
        name = "adapter_model.safetensors"
        folders = [contents(f"{base}/lora/adapter") for base in (here, there)]
        found.append(folders[0][name] == folders[1][name])


def check_errors(table: Table, store: str, there: str, process) -> None:
    with table.check(f"{store}: a bucket that is not there") as found:
        nowhere = f"{store}://no-such-bucket"
        words = command("sft", there, "x")
        words[words.index(f"{there}/model")] = f"{nowhere}/model"
        found.append(f"model {nowhere}/model: no such folder" in run(words, code=2))
        words = command("sft", there, "x")
        words[words.index(f"{there}/x")] = f"{nowhere}/x"
        said = run(words, code=2)
        found.append(f"{nowhere}/x" in said and "Traceback" not in said)
    with table.check(f"{store}: a row that is broken") as found:
        (located(there) / "bad.jsonl").write_text('{"prompt": "a"\n')
        words = command("sft", there, "x")
        words[words.index(f"{there}/rows.jsonl")] = f"{there}/bad.jsonl"
        said = run(words, code=2)
        found.append(f"{there}/bad.jsonl row 1" in said and "broken JSON" in said)
    with table.check(f"{store}: a server that is gone") as found:
        process.kill()
        os.environ["AWS_MAX_ATTEMPTS"] = "1"
        said = run(command("sft", there, "x"), code=2)
        found.append("cannot be reached" in said and "Traceback" not in said)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stores", default="gs,s3")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve_gcs(given.serve)
    stores, table = given.stores.split(","), Table()
    with tempfile.TemporaryDirectory() as folder:
        here = str(world.make(Path(folder)))
        with table.check("the disk") as found:
            run(*(command(kind, here, kind) for kind in ("sft", "dpo")))
            run(*one_shots(here))
            pair(command("sft", here, "two"), kill=False)
            found.append(True)
        for store in stores:
            there = f"{store}://{BUCKET}/w"
            with server(store) as process:
                for file in files_below(Path(here)):
                    name = file.relative_to(here).as_posix()
                    if name.count("/") == 0 or name.startswith("model/"):
                        (located(there) / name).write_bytes(file.read_bytes())
                check_runs(table, store, here, there)
                check_two(table, store, here, there)
                check_one_shots(table, store, here, there)
                check_errors(table, store, there, process)
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())
