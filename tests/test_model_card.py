"""Model cards of real runs of the tiny pipeline: what they say is what the files say, and their code runs."""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from threading import Event, Timer
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionPipeline
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from safetensors.torch import save_file

from diffalign import origins as origins_module
from diffalign.config import RUNS, ModelConfig, Run
from diffalign.errors import ConfigError
from diffalign.exporting.formats import ONE_FILE, export_result
from diffalign.exporting.source import find_result as find_run_result
from diffalign.model_card import Result, find_result, write_card
from diffalign.model_card.loading_code import loading_code
from diffalign.model_card.sections import fenced
from diffalign.models.families import FAMILIES, family_of
from diffalign.models.latent_flow import LatentFlow
from diffalign.models.loading import load_for_inference
from diffalign.origins import (
    BaseModel,
    FileSet,
    Licence,
    find_base,
    find_files,
    find_licence,
    hash_files,
    read_origins,
)
from diffalign.training.origins import conclude_card, record_origins, start_origins
from diffalign.training.run import align
from diffalign.training.run_folder import RunFolder

CANARY = "c4n4ry-9f8e7d6c"
BASE_CARD = (
    "---\nlicense: other\nlicense_name: stabilityai-community\nlicense_link: LICENSE.md\n---\n# A base\n"
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, tiny_pipeline_dir: Path) -> Path:
    """A checkpoint that came with its card, its licence, and files that no run loads."""
    folder = tmp_path_factory.mktemp("base") / "tiny"
    shutil.copytree(tiny_pipeline_dir, folder)
    (folder / "README.md").write_text(BASE_CARD)
    (folder / "LICENSE.md").write_text("You may.\n")
    save_file({"another": torch.ones(1)}, folder / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    (folder / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"a pickle")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    (folder / "other.txt").write_text("four\nfive\n")
    (folder / "mine.py").write_text(
        "def bright(images, prompts, url=''):\n    return images.mean(dim=(1, 2, 3))\nbright.license = 'CC0-1.0'\n"
        "def plain(images, prompts):\n    return images[:, 0].mean(dim=(1, 2))\n"
    )
    return folder


def make(data: Path, base: Path, **changes: Any) -> Run:
    sampler = {"steps": 2, "guidance_scale": 1.0}
    reward = f"{data / 'mine.py'}:"
    options = {"url": "http://me:${SERVICE_TOKEN}@host/?token=${SERVICE_TOKEN}"}
    config: dict[str, Any] = {
        "model": {"path": str(base), "lora": {"rank": 2, "alpha": 5.0}, "resolution": 16},
        "algorithm": {"name": "ddpo", "prompts_per_iteration": 2, "group_size": 2, "updates_per_epoch": 1},
        "data": {"path": str(data / "prompts.txt")},
        "rewards": [
            {"name": f"{reward}bright", "label": "bright", "options": options},
            {"name": f"{reward}plain", "label": "red", "weight": 0.0},
        ],
        "sampler": sampler,
        "training": {"iterations": 2, "device": "cpu", "checkpoint_every": 1, "learning_rate": 0.01},
        "evaluation": {
            "sets": {"in-domain": str(data / "prompts.txt"), "out-of-domain": str(data / "other.txt")},
            "prompts_per_set": 2,
            "sampler": {**sampler, "guidance_scale": 2.0},
        },
    }
    return RUNS["ddpo"].model_validate({**config, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data: Path, base: Path) -> Path:
    """A finished run of a LoRA, started by a command that holds a secret."""
    run = tmp_path_factory.mktemp("runs") / "lora"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SERVICE_TOKEN", CANARY)
        patch.setattr(
            sys, "argv", ["/opt/bin/diffalign", "train", "my run.yaml", f"--x=http://{CANARY}@host"]
        )
        align(make(data, base), run)
    return run


def front_matter_of(folder: Path) -> dict[str, Any]:
    """By the pattern that the hub itself uses (huggingface_hub), and PyYAML."""
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == ModelCard(str(card)).data.to_dict()
    tree = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    assert isinstance(tree, dict)
    return tree


def text_of(folder: Path) -> str:
    return (folder / "README.md").read_text()


def row_of(folder: Path, first: str) -> list[str]:
    """The cells of the table row that begins so."""
    (line,) = [line for line in text_of(folder).splitlines() if line.startswith(f"| {first} |")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def reward_row(folder: Path, label: str) -> list[str]:
    """Weight and licence of a reward."""
    (line,) = re.findall(rf"\| {label} \| \S*mine.py:\w+ \| (.*) \|", text_of(folder))
    return str(line).split(" | ")


def run_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> StableDiffusionPipeline:
    """Run the card's Python where the folder is; the pipeline that it leaves."""
    code = re.findall(r"```python\n(.*?)```", text_of(folder), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    exec(code[0], names)
    assert names["picture"].size == (16, 16)
    return names["pipeline"]


def latents(pipeline: StableDiffusionPipeline) -> torch.Tensor:
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipeline.set_progress_bar_config(disable=True)
    options = {"guidance_scale": 2.0, "num_inference_steps": 2, "height": 16, "width": 16}
    return pipeline("one", latents=noise, output_type="latent", **options).images


def test_the_front_matter_is_what_the_hub_reads(finished):
    assert front_matter_of(finished / "final") == {
        "license": "other",
        "license_name": "stabilityai-community",
        "license_link": "LICENSE.md",
        "base_model_relation": "adapter",
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": None,
        "tags": ["text-to-image", "diffusers", "stable-diffusion", "lora", "diffalign", "ddpo"],
    }
    assert (finished / "final" / "LICENSE.md").read_text() == "You may.\n"


def test_hashes_and_licences_are_those_of_the_files(finished, data, base):
    final = finished / "final"
    _, _, mark, licence = row_of(final, "data.path")
    assert mark == f"`{hashlib.sha256((data / 'prompts.txt').read_bytes()).hexdigest()}`"
    assert licence == "not stated"
    # As docs/model-cards.md says it can be checked; other variants, pickles and the card itself are not loaded.
    command = (
        "find model_index.json scheduler text_encoder tokenizer unet vae -type f -not -name '*.bin' "
        "-not -name '*.fp16.*' | LC_ALL=C sort | xargs sha256sum | sha256sum"
    )
    said = subprocess.run(command, shell=True, cwd=base, capture_output=True, text=True, check=True).stdout
    _, _, mark, licence = row_of(final, "base model")
    assert (mark, licence) == (f"`{said.split()[0]}`", "other (stabilityai-community)")
    assert reward_row(final, "bright") == ["1", "CC0-1.0"]
    assert reward_row(final, "red") == ["watched only", "unknown"]


def test_gains_are_those_of_the_summary_on_every_prompt_set(finished):
    summary = json.loads((finished / "summary.json").read_text())
    for label in ("bright", "red"):
        rows = [line for line in text_of(finished / "final").splitlines() if line.startswith(f"| {label} |")]
        shown = {line.split("|")[2].strip(): line for line in rows if "domain" in line}
        for name in ("in-domain", "out-of-domain"):
            result = summary["results"][name][label]
            numbers = [float(number) for number in re.findall(r"[-+]?\d+\.\d+", shown[name])]
            change = result["change"]
            expected = [result["before"]["mean"], result["after"]["mean"]]
            expected += [change["mean"], change["low"], change["high"]]
            assert numbers == pytest.approx(expected, abs=1e-3)
    picture = (finished / "samples" / "before-after.png").read_bytes()
    assert (finished / "final" / "before-after.png").read_bytes() == picture
    assert "](before-after.png)" in text_of(finished / "final")


def test_cost_seed_command_and_versions_are_those_of_the_summary(finished):
    final, summary = finished / "final", json.loads((finished / "summary.json").read_text())
    assert row_of(final, "reward queries")[1] == "16"  # 2 iterations of 4 pictures, 2 rewards
    assert summary["counts"]["reward_queries"] == 16
    assert row_of(final, "energy")[1] == "not known: the driver of a CPU does not tell"
    assert f"diffusers {summary['versions']['diffusers']}" in text_of(final)
    assert "diffalign train 'my run.yaml' '--x=http://[redacted]@host'" in text_of(final)
    assert "No alarm was raised." in text_of(final)


def test_no_secret_is_in_the_card_and_its_name_stays(finished):
    found = [f for f in finished.rglob("*") if f.is_file() and CANARY.encode() in f.read_bytes()]
    assert found == []
    assert "url: http://me:${SERVICE_TOKEN}@host" in text_of(finished / "final")


def test_the_code_of_an_adapters_card_loads_what_the_run_learned(finished, base, monkeypatch):
    ours = load_for_inference(str(finished), device="cpu")
    pipeline = run_code(finished / "final", monkeypatch)
    learned = latents(pipeline)
    ours.pipeline.scheduler = pipeline.scheduler
    torch.testing.assert_close(latents(ours.pipeline), learned, rtol=1e-4, atol=1e-5)
    plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    plain.scheduler = pipeline.scheduler
    assert (latents(plain) - learned).norm() > 1e-2 * learned.norm()


def leave_run(run: Path, config: Run, denoiser: Any, summary: Path) -> None:
    """A run as training leaves it, with the weights of `denoiser` moved a little."""
    draw = torch.Generator().manual_seed(1)
    for parameter in denoiser.trainable_parameters().values():
        parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    denoiser.export(run / "final")
    warnings: list[str] = []
    folder = RunFolder(run)
    folder.create(config)
    record_origins(folder, config, "StableDiffusionPipeline", None, lambda kind, text: warnings.append(text))
    assert warnings == []
    shutil.copy(summary, run)
    write_card(run / "final", run)


def test_a_full_result_is_loaded_as_it_is_and_keeps_the_licence(
    finished, tmp_path, data, base, make_denoiser, monkeypatch
):
    model = {"path": str(base), "lora": None, "resolution": 16}
    denoiser = make_denoiser(full=True, path=base, resolution=16)
    leave_run(tmp_path / "run", make(data, base, model=model), denoiser, finished / "summary.json")
    final = tmp_path / "run" / "final"
    matter = front_matter_of(final)
    assert (matter["base_model_relation"], matter["license_name"]) == ("finetune", "stabilityai-community")
    ours = load_for_inference(str(tmp_path / "run"), device="cpu").pipeline
    pipeline = run_code(final, monkeypatch)
    ours.scheduler = pipeline.scheduler
    torch.testing.assert_close(latents(pipeline), latents(ours), rtol=1e-3, atol=1e-4)
    # A base model's own card is replaced, and what it says of the licence stays, although nothing else does.
    (tmp_path / "run" / "origins.json").unlink()
    (final / "README.md").write_text("---\nlicense: openrail++\n---\n")
    write_card(final, tmp_path / "run")
    assert front_matter_of(final)["license"] == "openrail++"
    assert row_of(final, "base model")[2:] == ["not recorded by the run", "openrail++"]
    assert reward_row(final, "bright") == ["1", "not recorded by the run"]


def without_cost(card: str) -> str:
    return re.sub(r"\| (time|peak memory|energy) \|.*", "", card)


def test_a_resumed_run_writes_the_same_card_once_more(finished, tmp_path, data, base, monkeypatch):
    monkeypatch.setenv("SERVICE_TOKEN", CANARY)
    run = tmp_path / "lora"
    shutil.copytree(finished, run)
    shutil.rmtree(run / "checkpoints" / "step-2")
    shutil.rmtree(run / "final")
    (run / "summary.json").unlink()
    recorded = (run / "origins.json").stat().st_mtime_ns
    monkeypatch.setattr(
        sys, "argv", ["/opt/bin/diffalign", "train", "my run.yaml", f"--x=http://{CANARY}@host"]
    )
    align(make(data, base), run)
    assert without_cost(text_of(run / "final")) == without_cost(text_of(finished / "final"))
    assert (run / "origins.json").stat().st_mtime_ns == recorded


def test_a_card_that_cannot_be_written_is_a_warning_and_the_same_command_tries_again(
    finished, tmp_path, data, base, monkeypatch, capsys
):
    monkeypatch.setenv("SERVICE_TOKEN", CANARY)
    run = tmp_path / "lora"
    shutil.copytree(finished, run)
    (run / "final" / "README.md").unlink()
    summary = (run / "summary.json").read_text()
    (run / "summary.json").write_text("{}")
    assert align(make(data, base), run) == {}
    shown = " ".join(capsys.readouterr().out.split())
    assert f"warning: no model card in {run / 'final'}: KeyError" in shown
    assert not (run / "final" / "README.md").exists()
    (run / "summary.json").write_text(summary)
    align(make(data, base), run)
    assert text_of(run / "final") == text_of(finished / "final")


@pytest.mark.parametrize("pipeline", FAMILIES)
def test_the_code_of_every_family_calls_what_its_pipeline_has(data, pipeline):
    family = family_of(pipeline)
    is_flow = issubclass(family, LatentFlow)
    sampler = {"kind": "euler", "steps": 4} if is_flow else {"steps": 4, "eta": 0.5}
    config = make(data, data, evaluation={"sampler": {**sampler, "guidance_scale": 4.5}})
    base = BaseModel(files=FileSet(path="me/base"), pipeline=pipeline, hub_id="me/base", commit="c" * 40)
    result = Result(data, "adapter", ("pytorch_lora_weights.safetensors",))
    tree = ast.parse(loading_code(result, config, base))
    for line in (node for node in tree.body if isinstance(node, ast.ImportFrom)):
        module = importlib.import_module(str(line.module))
        assert all(hasattr(module, alias.name) for alias in line.names)
        if pipeline in [alias.name for alias in line.names]:
            loaded = getattr(module, pipeline)
    assert hasattr(loaded, "load_lora_weights")
    (call,) = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "pipeline"
    ]
    given = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    assert set(given) <= set(inspect.signature(loaded.__call__).parameters)
    assert given["guidance_scale"] == (3.5 if pipeline == "ZImagePipeline" else 4.5)
    assert given.get("eta") == (None if is_flow else 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["diffusers", "kohya", "peft", "merged", "single-file"])
def test_the_code_of_an_exports_card_loads_what_the_run_learned(finished, tmp_path, monkeypatch, form):
    folder = tmp_path / "it"
    place = folder / "it.safetensors" if form in ONE_FILE else folder
    export_result(find_run_result(str(finished)), form, place)
    write_card(folder, finished)
    is_adapter = form in ("diffusers", "kohya", "peft")
    assert front_matter_of(folder)["base_model_relation"] == ("adapter" if is_adapter else "finetune")
    ours = load_for_inference(str(finished), device="cpu").pipeline
    pipeline = run_code(folder, monkeypatch)
    ours.scheduler = pipeline.scheduler
    torch.testing.assert_close(latents(ours), latents(pipeline), rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_a_run_from_a_run_names_and_loads_both(finished, tmp_path, data, make_denoiser, monkeypatch):
    model = {"path": str(finished), "lora": {"rank": 2}, "resolution": 16}
    run = tmp_path / "second"
    denoiser = make_denoiser(path=finished, resolution=16)
    leave_run(run, make(data, finished, model=model), denoiser, finished / "summary.json")
    first = hashlib.sha256((finished / "final" / "pytorch_lora_weights.safetensors").read_bytes()).hexdigest()
    assert row_of(run / "final", "base model")[2] == f"`{first}`"
    original = read_origins(finished)
    assert original is not None
    assert row_of(run / "final", "which was trained from")[2] == f"`{original.base.files.sha256}`"
    ours = load_for_inference(str(run), device="cpu").pipeline
    pipeline = run_code(run / "final", monkeypatch)
    ours.scheduler = pipeline.scheduler
    torch.testing.assert_close(latents(ours), latents(pipeline), rtol=1e-4, atol=1e-5)


def test_a_base_model_of_the_hub_is_named_with_its_commit(tmp_path, base, data, monkeypatch, finished):
    commit, repo = "c" * 40, tmp_path / "hub" / "models--someone--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(base, repo / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    found = find_base(ModelConfig(path="someone/tiny"), "StableDiffusionPipeline")
    here = find_base(ModelConfig(path=str(base)), "StableDiffusionPipeline")
    assert (found.hub_id, found.commit, found.files.sha256) == ("someone/tiny", commit, here.files.sha256)
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    origins = read_origins(run)
    assert origins is not None
    (run / "origins.json").write_text(origins.model_copy(update={"base": found}).model_dump_json())
    write_card(run / "final", run)
    matter = front_matter_of(run / "final")
    assert matter["base_model"] == "someone/tiny"
    assert matter["license_link"] == "https://huggingface.co/someone/tiny/blob/main/LICENSE.md"
    assert f'from_pretrained("someone/tiny", revision="{commit}")' in text_of(run / "final")
    assert f"commit `{commit}`" in row_of(run / "final", "base model")[1]


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        (Licence(), {"license": "unknown"}),
        (Licence(name="openrail++"), {"license": "openrail++"}),
        (
            Licence(name="CreativeML Open RAIL++-M License"),
            {"license": "other", "license_name": "creativeml-open-rail++-m-license"},
        ),
        (
            Licence(file="/x/LICENSE"),
            {"license": "other", "license_name": "see-licence-file", "license_link": "LICENSE"},
        ),
        (
            Licence(name="other", link=f"https://me:{CANARY}@host/terms"),
            {"license": "other", "license_link": "https://[redacted]@host/terms"},
        ),
    ],
    ids=["unknown", "identifier", "words", "file", "secret"],
)
def test_a_licence_is_said_as_it_is_stated_or_unknown(finished, tmp_path, stated, expected):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    origins = read_origins(run)
    assert origins is not None
    files = origins.base.files.model_copy(update={"licence": stated})
    base = origins.base.model_copy(update={"files": files})
    (run / "origins.json").write_text(origins.model_copy(update={"base": base}).model_dump_json())
    write_card(run / "final", run)
    matter = front_matter_of(run / "final")
    assert {key: value for key, value in matter.items() if key.startswith("license")} == expected
    words = row_of(run / "final", "base model")[3]
    assert words == (stated.name or ("see LICENSE" if stated.file else "not stated by the checkpoint"))


def test_what_a_run_file_or_a_licence_says_stays_words(finished, tmp_path):
    """Bars, backticks, line breaks and HTML in names leave headings, tables and front matter as they are."""
    hostile = "a|b\n# New\n<img src=x> ``` [x](http://y)"
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    for name in ("config.yaml", "summary.json", "origins.json"):
        tree = yaml.safe_load((run / name).read_text())
        if name == "config.yaml":
            tree["rewards"][0]["label"] = hostile
            tree["evaluation"]["sets"][hostile] = tree["evaluation"]["sets"].pop("in-domain")
        elif name == "summary.json":
            rows = tree["results"].pop("in-domain")
            tree["results"][hostile] = {hostile: rows.pop("bright"), **rows}
            tree["alarms"] = [{"iteration": 1, "name": "kl", "what": hostile}]
        else:
            files = tree["base"]["files"]
            stated = {
                "license": hostile,
                "license_name": "x\n---\ny: z",
                "license_link": "https://h/x\n---\n",
            }
            (tmp_path / "README.md").write_text(f"---\n{json.dumps(stated)}\n---\n")
            files["licence"] = find_licence(tmp_path, "it").model_dump()
            files["path"] = hostile
            tree["data"][f"evaluation.sets.{hostile}"] = tree["data"].pop("data.path")
        (run / name).write_text(json.dumps(tree) if name.endswith("json") else yaml.safe_dump(tree))
    write_card(run / "final", run)
    ours, theirs = ([*body_of(folder / "final")] for folder in (run, finished))
    assert [text for kind, text in ours if kind.startswith("h")] == [
        text for kind, text in theirs if kind.startswith("h")
    ]
    assert [kind for kind, _ in ours if kind in ("tr", "td")] == [
        kind for kind, _ in theirs if kind in ("tr", "td")
    ]
    assert not any(kind in ("html_inline", "link_open") for kind, _ in ours)
    assert "a|b # New <img src=x> ``` [x](http://y)" in [text for kind, text in ours if kind == "td"]
    matter = front_matter_of(run / "final")
    assert matter["license"] == "other"
    assert "y" not in matter


def body_of(folder: Path) -> Iterator[tuple[str, str]]:
    """Tag and text of each heading and cell, and the kind of everything in texts, as readers of markdown have them."""
    parser = MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(text_of(folder).split("---\n", 2)[2])
    for token, inside in zip(tokens, [*tokens[1:], tokens[-1]], strict=True):
        if token.tag in ("h1", "h2", "h3", "tr", "td") and token.nesting == 1:
            yield token.tag, "".join(child.content for child in inside.children or [])
        yield from ((child.type, child.content) for child in token.children or [])


def test_a_large_set_is_known_by_names_and_sizes(tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "2.png").write_bytes(b"123")
    (tmp_path / "1.png").write_bytes(b"12345")
    (tmp_path / ".hidden").write_bytes(b"x")
    whole = find_files(str(tmp_path))
    lines = [
        f"{hashlib.sha256(text).hexdigest()}  {name}\n"
        for name, text in (("1.png", b"12345"), ("a/2.png", b"123"))
    ]
    assert whole == FileSet(
        path=str(tmp_path), sha256=hashlib.sha256("".join(lines).encode()).hexdigest(), count=2, size=8
    )
    files = [tmp_path / "a" / "2.png", tmp_path / "1.png"]
    by_name = hash_files("x", tmp_path, files, limit=7)
    assert by_name.of == "names and sizes"
    assert by_name.sha256 == hashlib.sha256(b"5  1.png\n3  a/2.png\n").hexdigest()
    monkeypatch.setattr("diffalign.origins.OPEN_AT_MOST", 1)
    assert find_files(str(tmp_path)).of == "names and sizes"
    assert hash_files("x", tmp_path, files, limit=None).of == "contents"


def test_a_large_file_of_the_hubs_cache_is_not_read_again(tmp_path):
    """Its blob has the name that its SHA-256 is; that of a small file is git's, which is not."""
    (tmp_path / "blobs").mkdir()
    for name, found in (("c" * 64, "c" * 64), ("d" * 40, hashlib.sha256(b"x").hexdigest())):
        blob, link = tmp_path / "blobs" / name, tmp_path / f"{name}.safetensors"
        blob.write_bytes(b"x")
        link.symlink_to(blob)
        assert hash_files("x", tmp_path, [link]).sha256 == found


def test_the_run_does_not_wait_for_hashes_and_its_card_does(finished, tmp_path, data, base, monkeypatch):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "origins.json").unlink()
    go_on, hash_of = Event(), origins_module._hash_of
    monkeypatch.setattr(origins_module, "_hash_of", lambda file: go_on.wait(60) and hash_of(file))
    warnings: list[str] = []
    thread = start_origins(
        RunFolder(run),
        make(data, base),
        "StableDiffusionPipeline",
        None,
        lambda *words: warnings.append(words[1]),
    )
    assert not (run / "origins.json").exists()
    timer = Timer(0.2, go_on.set)
    timer.start()
    conclude_card(RunFolder(run), lambda *words: warnings.append(words[1]), thread)
    timer.join()
    assert warnings == []
    assert row_of(run / "final", "base model") == row_of(finished / "final", "base model")


def test_other_data_of_a_resumed_run_are_told_beside_the_earlier(finished, tmp_path, data, base):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    folder, known = RunFolder(run), read_origins(finished)
    assert known is not None
    config = make(data, base)
    config = config.model_copy(
        update={"data": config.data.model_copy(update={"path": str(data / "other.txt")})}
    )
    for _ in range(2):  # the second resume has nothing new
        record_origins(folder, config, "StableDiffusionPipeline", None, lambda kind, text: pytest.fail(text))
    found = read_origins(run)
    assert found is not None
    assert found.data["data.path (earlier)"] == known.data["data.path"]
    assert found.data["data.path"].path == str(data / "other.txt")
    assert sorted(found.data) == sorted([*known.data, "data.path (earlier)"])


def test_an_adapter_is_the_file_that_was_loaded(finished, tmp_path, data, base):
    model = {"path": str(base), "adapters": [{"path": str(finished)}], "resolution": 16}
    folder = RunFolder(tmp_path)
    record_origins(
        folder,
        make(data, base, model=model),
        "StableDiffusionPipeline",
        None,
        lambda kind, text: pytest.fail(text),
    )
    found = read_origins(tmp_path)
    assert found is not None
    file = finished / "final" / "pytorch_lora_weights.safetensors"
    assert found.adapters["model.adapters.0"].sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_folder_without_a_result_is_refused(finished, tmp_path):
    assert find_result(finished) is None
    assert find_result(finished / "checkpoints" / "step-2") is None
    with pytest.raises(ConfigError, match="holds no result"):
        write_card(tmp_path, finished)
    with pytest.raises(ConfigError, match="is not a finished run"):
        write_card(finished / "final", tmp_path)


def test_nothing_inside_ends_a_block_of_code():
    assert fenced("a\n```\nb", "yaml") == "````yaml\na\n```\nb\n````"
