"""`diffalign push` with the real client of the hub, against a small server of our own that speaks what it asks for."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from export_runs import FinishedRun
from safetensors.torch import save_file

from diffalign.cli import main

TOKEN = "hf_c4n4ry9f8e7d6c"
ADDRESS = "http://127.0.0.1:9"
"""Nobody listens there."""


class Hub(ThreadingHTTPServer):
    """Repositories in memory. `refuse`: part of a path -> the status with which the server answers it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, Any]] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[dict[str, Any]] = []
        self.refuse: dict[str, int] = {}
        self.sent = 0


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(404, {})

    def do_PUT(self) -> None:
        body = self._body()
        self.server.objects[self.path.rpartition("/")[2]] = body
        self.server.sent += len(body)
        self._answer(200, {})

    def do_POST(self) -> None:
        hub, body, path = self.server, self._body(), self.path.partition("?")[0]
        refused = next((status for part, status in hub.refuse.items() if part in path), None)
        if "/api/" in path and self.headers["Authorization"] != f"Bearer {TOKEN}":
            refused = 401
        if refused is not None:
            self._answer(refused, {"error": "no", "errors": [{"message": "license is not one"}]})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            taken = name in hub.repositories
            hub.repositories.setdefault(name, {"asked": asked, "branches": {"main": {}}})
            self._answer(409 if taken else 200, {"url": f"{hub.address}/{name}", "error": "it exists"})
        elif path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/branch/(.+)", path):
            hub.repositories[found[1]]["branches"].setdefault(found[2], {})
            self._answer(200, {})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/preupload/(.+)", path):
            self._answer(200, {"files": [self._mode(file["path"]) for file in json.loads(body)["files"]]})
        elif path.endswith(".git/info/lfs/objects/batch"):
            objects = [self._action(item) for item in json.loads(body)["objects"]]
            self._answer(200, {"objects": objects, "transfer": "basic"})
        elif found := re.fullmatch(r"/api/models/(.+/.+)/commit/(.+)", path):
            self._commit(found[1], found[2], [json.loads(line) for line in body.splitlines()])
        else:
            self._answer(404, {"error": path})

    def _mode(self, path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".png"))
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}

    def _action(self, item: dict[str, Any]) -> dict[str, Any]:
        if item["oid"] in self.server.objects:
            return item
        return {**item, "actions": {"upload": {"href": f"{self.server.address}/objects/{item['oid']}"}}}

    def _commit(self, name: str, branch: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.repositories[name]["branches"][branch]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.commits.append({"branch": branch, "message": value["summary"]})
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        address = f"{self.server.address}/{name}/commit/{'a' * 40}"
        self._answer(200, {"commitUrl": address, "commitOid": "a" * 40, "pullRequestUrl": None})

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub to which this process is pointed, with a token that it takes."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        use(monkeypatch, server.address)
        yield server
        server.shutdown()
        thread.join()


def use(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for name, value in (("ENDPOINT", address), ("HF_HUB_OFFLINE", False), ("HF_HUB_DISABLE_XET", True)):
        monkeypatch.setattr(f"huggingface_hub.constants.{name}", value)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run with a LoRA, its card, and files that nobody should see."""
    folder = tmp_path / "my run"
    final = folder / "final"
    (final / ".cache").mkdir(parents=True)
    save_file({"unet.x.lora_A.weight": torch.ones(2, 3)}, final / "pytorch_lora_weights.safetensors")
    (final / "README.md").write_text("---\nlicense: mit\n---\n# It\n")
    (final / "before-after.png").write_bytes(b"a picture")
    (final / ".cache" / "junk").write_text("x")
    (final / ".DS_Store").write_text("x")
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "summary.json").write_text("{}")
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {str(f): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()}


SEEN = ("README.md", "before-after.png", "pytorch_lora_weights.safetensors")


def test_a_result_is_on_the_hub_byte_for_byte_and_nothing_local_has_changed(hub, run, capsys):
    before = hashes(run)
    assert main(["push", str(run / "final"), "me/it", "--private"]) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[-1] == f"{hub.address}/me/it"
    assert TOKEN not in shown.out + shown.err
    files = hub.repositories["me/it"]["branches"]["main"]
    assert files == {name: (run / "final" / name).read_bytes() for name in SEEN}
    asked = hub.repositories["me/it"]["asked"]
    assert asked.get("private") is True or asked.get("visibility") == "private"
    assert re.fullmatch(r"final of diffalign \S+", hub.commits[0]["message"])
    assert hashes(run) == before


def test_a_push_again_goes_to_the_same_repository_and_sends_no_weights_twice(hub, run):
    assert main(["push", str(run / "final"), "me/it"]) == 0
    sent = hub.sent
    assert main(["push", str(run / "final"), "me/it", "--revision", "seed-1", "--message", "again"]) == 0
    assert hub.sent == sent > 0
    branches = hub.repositories["me/it"]["branches"]
    assert branches["seed-1"] == branches["main"]
    assert hub.commits[-1] == {"branch": "seed-1", "message": "again"}


def test_a_full_pipeline_goes_with_its_folders(hub, tiny_pipeline_dir, capsys):
    assert main(["push", str(tiny_pipeline_dir), "me/full"]) == 0
    files = hub.repositories["me/full"]["branches"]["main"]
    there = [file for file in tiny_pipeline_dir.rglob("*") if file.is_file()]
    assert files == {f.relative_to(tiny_pipeline_dir).as_posix(): f.read_bytes() for f in there}
    assert "has no README.md" in capsys.readouterr().err


def test_a_dry_run_lists_names_and_sizes_without_the_network(run, capsys, monkeypatch):
    use(monkeypatch, ADDRESS)
    monkeypatch.delenv("HF_TOKEN")
    assert main(["push", str(run / "final"), "me/it", "--dry-run"]) == 0
    *files, last = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    sizes = {name: (run / "final" / name).stat().st_size for name in SEEN}
    assert {name: int(size) for size, name in files} == sizes
    assert last == [str(sum(sizes.values())), "bytes would be pushed to me/it, branch main"]


@pytest.mark.parametrize(
    ("refuse", "what"),
    [
        ({"/api/repos/create": 401}, "the hub does not accept the token"),
        ({"/api/repos/create": 403}, "you may not write to someone/it"),
        ({"/commit/": 403}, "you may not write to someone/it"),
        ({"validate-yaml": 400}, "the hub refused the files for someone/it"),
        ({"/commit/": 500}, "the hub answered with an error (500)"),
        ({"/api/repos/create": 402}, "the hub has no more room for you"),
    ],
)
def test_what_the_hub_refuses_is_one_screen_with_the_command_to_run_again(hub, run, capsys, refuse, what):
    hub.refuse = refuse
    words = ["push", str(run / "final"), "someone/it", "--private", "--message", "it's"]
    assert main(words) == 8
    shown = capsys.readouterr().err
    # Before it are the client's bars, which the command line itself switches off.
    error = shown[shown.index("error: ") :]
    assert error.startswith(f"error: {what}\n")
    again = error.rstrip().splitlines()[-1].strip()
    assert again == f"""then again: diffalign push '{run}/final' someone/it --private --message 'it'"'"'s'"""
    assert TOKEN not in shown
    assert len(error.splitlines()) < 9


def test_no_network_and_no_token_say_what_to_do(run, tmp_path):
    environment = {**os.environ, "HF_ENDPOINT": ADDRESS, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "diffalign", "push", str(run / "final"), "me/it"]
    cut_off = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert cut_off.returncode == 8
    assert cut_off.stderr.startswith(f"error: {ADDRESS} cannot be reached\n")
    assert "then again: diffalign push" in cut_off.stderr
    assert TOKEN not in cut_off.stdout + cut_off.stderr


def test_without_a_token_the_hub_is_not_asked(hub, run, monkeypatch, capsys, tmp_path):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "none"))
    assert main(["push", str(run / "final"), "me/it"]) == 8
    error = capsys.readouterr().err
    assert "there is no token" in error
    assert "hf auth login" in error
    assert hub.repositories == {}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with what its card needs."""
    run = FinishedRun(tmp_path_factory.mktemp("exported"), "sd").path
    (run / "summary.json").write_text('{"wall_seconds": 1, "precision": "no", "peak_memory_bytes": 1}')
    return run


@pytest.mark.parametrize("form", ["kohya", "diffusers"])
def test_an_export_that_is_not_pushed_is_there_and_the_command_it_names_pushes_it(
    hub, exported, form, tmp_path, capsys
):
    hub.refuse = {"/commit/": 500}
    place = tmp_path / ("my it.safetensors" if form == "kohya" else "my it")
    assert main(["export", str(exported), "--format", form, "--output", str(place), "--push", "me/it"]) == 0
    shown = capsys.readouterr()
    assert place.exists()
    assert f"warning: {place} is written, and not pushed to me/it" in shown.err
    assert TOKEN not in shown.out + shown.err
    (again,) = re.findall("then again: diffalign (.*)", shown.err)
    hub.refuse = {}
    assert main(shlex.split(again)) == 0
    files = hub.repositories["me/it"]["branches"]["main"]
    assert b"aligned by sft" in files["README.md"]
    weights = place if form == "kohya" else place / "pytorch_lora_weights.safetensors"
    assert files[weights.name] == weights.read_bytes()
    assert ("export.json" in files) == (form == "diffusers")


def test_an_export_is_pushed_at_once(hub, exported, tmp_path, capsys):
    place = tmp_path / "it.safetensors"
    assert (
        main(["export", str(exported), "--format", "kohya", "--output", str(place), "--push", "me/it"]) == 0
    )
    assert capsys.readouterr().out.splitlines()[-1] == f"{hub.address}/me/it"
    assert sorted(hub.repositories["me/it"]["branches"]["main"]) == ["README.md", "it.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["it.safetensors"]


def test_a_bad_name_is_found_before_the_export(exported, tmp_path, capsys):
    place = tmp_path / "it.safetensors"
    words = ["--format", "kohya", "--output", str(place), "--push", "me/it/too/deep"]
    assert main(["export", str(exported), *words]) == 2
    assert "is not a name of the hub" in capsys.readouterr().err
    assert not place.exists()


def test_only_a_finished_result_is_pushed(run, tmp_path, capsys):
    def refusal(folder: Path, name: str = "me/it") -> str:
        assert main(["push", str(folder), name, "--dry-run"]) == 2
        return " ".join(capsys.readouterr().err.split())

    assert f"push its result: {run / 'final'}" in refusal(run)
    step = run / "checkpoints" / "step-4"
    step.mkdir(parents=True)
    save_file({"unet.x.lora_A.weight": torch.ones(1)}, step / "trainable.safetensors")
    (step / "manifest.json").write_text("{}")
    assert "holds no result that diffusers loads" in refusal(step)
    assert "is not an exported .safetensors file" in refusal(step / "trainable.safetensors")
    assert "is not an exported .safetensors file" in refusal(run / "final" / "README.md")
    assert "is not a folder" in refusal(tmp_path / "nothing")
    assert "me/it/too/deep is not a name of the hub" in refusal(run / "final", "me/it/too/deep")
    (run / "summary.json").unlink()
    assert "the same train command again finishes it" in refusal(run / "final")
