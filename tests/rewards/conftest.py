"""Tiny models of the real classes with random weights, in the layouts of their publishers."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import open_clip
import pytest
import skimage.data
import torch
from diffalign_rewards.blip import Sizes
from diffalign_rewards.imagereward import Network
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from diffalign.rewards import RewardModel

CONTEXT = 24
MODEL = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 64, "patch_size": 16, "layers": 2, "width": 32, "head_width": 16},
    "text_cfg": {
        "context_length": CONTEXT,
        "vocab_size": 514,
        "width": 32,
        "heads": 2,
        "layers": 2,
        "hf_tokenizer_name": "in this folder",
    },
}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.25, 0.3, 0.35], "interpolation": "bicubic"}
TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
VISION = TOWER | {"image_size": 64, "patch_size": 16}
BLIP_SIZES = Sizes(
    vision_width=128,
    vision_layers=2,
    patch=16,
    image=64,
    text_width=128,
    text_layers=2,
    vocabulary=100,
    positions=40,
)


def shake(model: torch.nn.Module, scale: float = 0.15) -> None:
    """Libraries start their weights near 0.02, where every picture would embed nearly alike."""
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(scale * torch.randn(weight.shape, generator=draw))


def clip_tokenizer() -> CLIPTokenizer:
    """514 tokens of one character each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = alphabet + [letter + "</w>" for letter in alphabet] + ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=CONTEXT)


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """open_clip: 64 px, 32-dimensional embeddings, 24 tokens of one character each. Do not write into it."""
    folder = tmp_path_factory.mktemp("clip")
    clip_tokenizer().save_pretrained(folder)
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": MODEL, "preprocess_cfg": PREPROCESSING})
    )
    sizes = {key: dict(value) if isinstance(value, dict) else value for key, value in MODEL.items()}
    torch.manual_seed(0)
    model = open_clip.CLIP(**sizes)
    shake(model)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture(scope="session")
def transformers_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' CLIP of the same sizes, with the preprocessor file of 2022. Do not write into it."""
    folder = tmp_path_factory.mktemp("transformers-clip")
    tokenizer = clip_tokenizer()
    tokenizer.save_pretrained(folder)
    text = TOWER | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": CONTEXT,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=32))
    shake(model, 0.1)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "crop_size": 64,
                "do_center_crop": True,
                "do_normalize": True,
                "do_resize": True,
                "feature_extractor_type": "CLIPFeatureExtractor",
                "image_mean": PREPROCESSING["mean"],
                "image_std": PREPROCESSING["std"],
                "resample": 3,
                "size": 64,
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """transformers' SigLIP: 64 px, 24 tokens of one letter each and an end token. Do not write into it."""
    folder = tmp_path_factory.mktemp("siglip")
    words = ["<pad>", "</s>", "<unk>", " ", *map(chr, range(ord("a"), ord("z") + 1))]
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    text = TOWER | {"vocab_size": len(words), "max_position_embeddings": CONTEXT, "projection_size": 32}
    text |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=VISION))
    shake(model)
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        json.dumps(
            {
                "do_normalize": True,
                "do_rescale": True,
                "do_resize": True,
                "image_mean": [0.5] * 3,
                "image_std": [0.5] * 3,
                "image_processor_type": "SiglipImageProcessor",
                "resample": 2,
                "size": {"height": 64, "width": 64},
            }
        )
    )
    return folder


@pytest.fixture(scope="session")
def blip_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageReward's network with two layers a tower, two heads a layer, at 64 px."""
    path = tmp_path_factory.mktemp("blip") / "imagereward.safetensors"
    torch.manual_seed(0)
    network = Network(BLIP_SIZES)
    shake(network, 0.02)
    save_file(network.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def bert_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT tokenizer of one letter a token."""
    folder = tmp_path_factory.mktemp("bert")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *("##" + letter for letter in letters)]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    return folder


@pytest.fixture(scope="session")
def tiny(
    clip_folder: Path,
    transformers_clip_folder: Path,
    siglip_folder: Path,
    blip_file: Path,
    bert_folder: Path,
) -> dict[str, tuple[str, dict[str, str]]]:
    """By a name for the test: a registered reward, and the options that make it tiny."""
    return {
        "clip": ("clip", {"checkpoint": str(clip_folder)}),
        "clip, transformers": ("clip", {"checkpoint": str(transformers_clip_folder)}),
        "clip, siglip": ("clip", {"checkpoint": str(siglip_folder)}),
        "clip_iqa": ("clip_iqa", {"checkpoint": str(clip_folder)}),
        "hpsv2": ("hpsv2", {"checkpoint": str(clip_folder)}),
        "imagereward": ("imagereward", {"checkpoint": str(blip_file), "tokenizer": str(bert_folder)}),
        "pickscore": ("pickscore", {"checkpoint": str(transformers_clip_folder)}),
    }


@pytest.fixture(scope="session")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A linear aesthetic head for the tiny CLIP."""
    path = tmp_path_factory.mktemp("head") / "aesthetic.safetensors"
    draw = torch.Generator().manual_seed(1)
    save_file({"weight": torch.randn(1, 32, generator=draw), "bias": torch.tensor([5.0])}, path)
    return path


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of a hub that cannot be reached."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def publish(hub_cache: Path) -> Callable[..., Path]:
    """`publish("owner/name", revision, files)`: as `hf download` leaves a repository in the cache."""

    def put(repository: str, revision: str, *files: Path) -> Path:
        folder = hub_cache / f"models--{repository.replace('/', '--')}"
        snapshot = folder / "snapshots" / revision
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / "main").write_text(revision)
        for file in files:
            shutil.copy(file, snapshot)
        return snapshot

    return put


@pytest.fixture
def images() -> torch.Tensor:
    """Eight smooth random pictures [8, 3, 80, 96]."""
    draw = torch.Generator().manual_seed(2)
    coarse = torch.rand(8, 3, 6, 6, generator=draw)
    return torch.nn.functional.interpolate(coarse, (80, 96), mode="bicubic").clamp(0, 1)


@pytest.fixture
def prompts() -> list[str]:
    return ["a red star", "two blue rings", "", "a cat", "a dog", "a red star", "Ünïcode!", "x"]


@pytest.fixture(scope="session")
def photographs() -> list[Image.Image]:
    """Sixteen quarters of four photographs, of four sizes."""
    whole = [
        Image.fromarray(getattr(skimage.data, name)())
        for name in ("astronaut", "chelsea", "coffee", "rocket")
    ]
    quarters = []
    for picture in whole:
        width, height = picture.width // 2, picture.height // 2
        corners = [(x, y) for x in (0, width) for y in (0, height)]
        quarters += [picture.crop((x, y, x + width, y + height)) for x, y in corners]
    return quarters


# --- services -----------------------------------------------------------------------------------------------

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """`serve(rewards, limits=..., token=...)`: runs the reward service in a thread; its URL."""
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    from diffalign.rewards.service.app import build_app
    from diffalign.rewards.service.server import listen, make_server

    with contextlib.ExitStack() as stack:

        def start(rewards: Mapping[str, RewardModel], **options: object) -> str:
            listener = stack.enter_context(listen("127.0.0.1", 0))
            server = make_server(build_app(rewards, **options))
            thread = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
            thread.start()

            def stop() -> None:
                server.should_exit = True
                thread.join(30)

            stack.callback(stop)
            while not server.started and thread.is_alive():
                time.sleep(0.01)
            assert server.started
            return f"http://127.0.0.1:{listener.getsockname()[1]}"

        yield start


@pytest.fixture
def answering() -> Iterator[Callable[[Callable[[str, Message, bytes], Answer]], str]]:
    """`answering(answer)`: a server whose answers are `answer(path, headers, body)`; its URL.

    An answer is status, headers and body; status 0 hangs up without a word.
    """
    with contextlib.ExitStack() as stack:

        def start(answer: Callable[[str, Message, bytes], Answer]) -> str:
            class Handler(BaseHTTPRequestHandler):
                def do_POST(self) -> None:
                    body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                    status, headers, content = answer(self.path, self.headers, body)
                    if status == 0:
                        return
                    with contextlib.suppress(ConnectionError):  # a client that waited long enough
                        self.send_response(status)
                        for name, value in ({"Content-Length": str(len(content))} | headers).items():
                            self.send_header(name, value)
                        self.end_headers()
                        self.wfile.write(content)

                do_GET = do_POST

                def log_message(self, *_: object) -> None:
                    pass

            server = stack.enter_context(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
            thread = Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            stack.callback(thread.join)
            stack.callback(server.shutdown)
            return f"http://127.0.0.1:{server.server_address[1]}"

        yield start
