"""Stage 0: pictures, captions and prompt lists of the Shapes world, and the tokenizer for its captions."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from diffalign.data.shapes import Scene, corrupt, draw_prompts, draw_scene, render

CONTEXT_LENGTH = 20
START, END = "<|startoftext|>", "<|endoftext|>"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """A random phrasing."""
    return scene.caption(int(rng.integers(scene.phrasings)))


def write_pictures(file: Path, count: int, seed: int, splits: tuple[str, ...], wrong: float = 0.0) -> None:
    """A captioned set in parquet (`image`, `text`); a share `wrong` of captions has one attribute wrong."""
    rng = np.random.default_rng(seed)
    images, texts = [], []
    for i in range(count):
        scene = draw_scene(rng, splits[i % len(splits)])
        buffer = io.BytesIO()
        render(scene, rng).save(buffer, "PNG")
        images.append(buffer.getvalue())
        texts.append(caption(corrupt(scene, rng) if rng.random() < wrong else scene, rng))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"image": images, "text": texts}), file, row_group_size=1024)


def write_prompts(folder: Path) -> None:
    """Prompt lists: those that alignment trains on, held-out in-domain ones, and new combinations."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 800), ("eval", 256), ("ood", 256)):
        prompts = draw_prompts(count, split, seed=len(split))
        (folder / f"shapes_{split}.txt").write_text("\n".join(prompts) + "\n", encoding="utf-8")


def train_tokenizer() -> CLIPTokenizer:
    """A byte-pair CLIP tokenizer whose merges come from the captions: whole words where they are common."""
    captions = [prompt for split in ("train", "ood") for prompt in draw_prompts(2000, split, seed=0)]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        initial_alphabet=alphabet,
        special_tokens=[START, END],
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(captions, trainer)
    learned = tokenizer.get_vocab()
    merges = _merges(tokenizer)
    # CLIP's order: bytes, bytes ending a word, merges, then the two special tokens.
    words = alphabet + [letter + "</w>" for letter in alphabet]
    words += [a + b for a, b in merges if a + b in learned and a + b not in words]
    vocabulary = {word: i for i, word in enumerate([*words, START, END])}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=CONTEXT_LENGTH)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    import json

    stored = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(merge) if isinstance(merge, list) else tuple(merge.split(" ")) for merge in stored]
