"""The CLIP reward on a tiny open_clip model with random weights."""

from __future__ import annotations

import gc
import json
import shutil
import warnings
import weakref
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from diffalign_rewards.backbone import Backbone, BackboneSpec
from diffalign_rewards.clip import CLIPReward
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoTokenizer, CLIPModel, CLIPTokenizer, PreTrainedTokenizerFast, SiglipModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from diffalign.errors import DataError, DiffalignError, RewardError
from diffalign.images import to_pil, to_tensor
from diffalign.rewards import RewardModel


@pytest.fixture(scope="module")
def reward(clip_folder: Path) -> CLIPReward:
    return CLIPReward(checkpoint=str(clip_folder))


def test_score_is_the_cosine_that_plain_open_clip_computes(clip_folder, reward, images, prompts):
    pictures = to_pil(images)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{clip_folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{clip_folder}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(picture) for picture in pictures]))
        text = model.encode_text(tokenizer(prompts))
    expected = F.cosine_similarity(image, text)
    assert expected.std() > 0.01  # or the comparison would say nothing
    assert_close(reward(pictures, prompts), expected, rtol=0, atol=1e-5)


def test_tensor_and_pil_scores_agree_within_half_a_percent_of_their_spread(reward, images, prompts):
    pictures = to_pil(images)
    from_pil = reward(pictures, prompts)
    difference = reward(to_tensor(pictures), prompts) - from_pil
    assert difference.abs().mean() < 0.005 * from_pil.std()


@pytest.mark.parametrize("as_pil", [False, True])
def test_score_does_not_depend_on_the_batch(
    reward: CLIPReward, images: Tensor, prompts: list[str], as_pil: bool
):
    batch = to_pil(images) if as_pil else images
    together = reward(batch, prompts)
    alone = torch.cat([reward(batch[i : i + 1], prompts[i : i + 1]) for i in range(8)])
    order = [5, 2, 7, 0, 3, 6, 1, 4]
    shuffled = reward([batch[i] for i in order] if as_pil else batch[order], [prompts[i] for i in order])
    assert_close(alone, together, rtol=0, atol=1e-5)
    assert_close(shuffled, together[order], rtol=0, atol=1e-5)


def test_pictures_and_prompts_are_pairs(reward: CLIPReward, images: Tensor, prompts: list[str]):
    assert not torch.allclose(reward(images, prompts), reward(images, prompts[::-1]), atol=1e-3)
    with pytest.raises(DataError, match="8 pictures but 1 prompts"):
        reward(images, prompts[:1])


def test_gradient_reaches_the_pixels_and_agrees_with_finite_differences(reward: CLIPReward, images: Tensor):
    image = (0.2 + 0.6 * images[:1]).requires_grad_()
    reward(image, ["a red star"]).sum().backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    direction = image.grad / image.grad.norm()
    step = 0.05
    with torch.no_grad():
        up, down = (reward(image + sign * step * direction, ["a red star"]) for sign in (1, -1))
    assert_close((up - down).item() / (2 * step), image.grad.norm().item(), rtol=1e-2, atol=0)


def test_weights_are_frozen_and_scores_carry_no_graph_without_need(reward: CLIPReward, images, prompts):
    assert not reward(images, prompts).requires_grad
    assert not any(weight.requires_grad for weight in reward.backbone.model.parameters())


def test_long_prompts_keep_their_end_token_and_are_said_once(clip_folder: Path, images: Tensor):
    backbone = Backbone(BackboneSpec.of(None, None, str(clip_folder)), "cpu")
    end = open_clip.get_tokenizer(f"local-dir:{clip_folder}").tokenizer.eos_token_id
    long = ["a" * 10_000, "b" * 10_000]
    with pytest.warns(UserWarning, match="first 22 tokens of a prompt"):  # 24 with start and end
        first, second = backbone.embed_texts(long)
    assert (backbone.towers.tokenize(long, 24)[:, -1] == end).all()
    assert F.cosine_similarity(first, second, dim=0) < 0.999  # they do not embed alike
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backbone.embed_texts(["c" * 100])


def test_prompt_that_just_fits_is_not_called_too_long(clip_folder: Path):
    Backbone(BackboneSpec.of(None, None, str(clip_folder)), "cpu").embed_texts(["a" * 22])


def test_open_clips_default_tokenizer_truncates_before_the_end_token():
    tokenizer = open_clip.get_tokenizer("ViT-L-14-quickgelu")
    rows = tokenizer(["a " * 500, "b " * 500])
    assert (rows[:, -1] == tokenizer.eot_token_id).all()
    assert not torch.equal(rows[0], rows[1])


def test_text_embeddings_are_computed_once(clip_folder: Path, images: Tensor):
    reward = CLIPReward(checkpoint=str(clip_folder))
    calls: list[int] = []
    hook = reward.backbone.model.transformer.register_forward_pre_hook(
        lambda _, args: calls.append(len(args[0]))
    )
    try:
        reward(images, ["never seen before"] * 4 + ["nor this"] * 4)
        reward(images, ["never seen before"] * 8)
    finally:
        hook.remove()
    assert calls == [2]


def test_rewards_of_one_checkpoint_share_the_model_and_free_it_together(clip_folder: Path, tmp_path: Path):
    copy = Path(shutil.copytree(clip_folder, tmp_path / "copy"))
    (tmp_path / "link").symlink_to(copy)
    first, second = (CLIPReward(checkpoint=str(tmp_path / name)) for name in ("copy", "link"))
    other = CLIPReward(checkpoint=str(clip_folder))
    assert first.backbone is second.backbone
    assert first.backbone is not other.backbone
    assert first.parameters == sum(weight.numel() for weight in first.backbone.model.parameters())
    model = weakref.ref(first.backbone)
    del first
    assert model() is not None
    del second
    gc.collect()
    assert model() is None


def test_attributes_say_what_the_reward_is(reward: CLIPReward):
    assert (reward.range, reward.higher_is_better, reward.differentiable) == ((-1.0, 1.0), True, True)
    assert reward.needs_prompt
    assert isinstance(reward, RewardModel)


# --- models of transformers ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(transformers_clip_folder: Path) -> CLIPReward:
    return CLIPReward(checkpoint=str(transformers_clip_folder))


def test_score_is_the_cosine_that_plain_transformers_computes(transformers_clip_folder, theirs, photographs):
    prompts = ["a cat", "Two Dogs!", "", "x" * 22] * 4
    processor = CLIPImageProcessorPil.from_pretrained(transformers_clip_folder)
    tokenizer = CLIPTokenizer.from_pretrained(transformers_clip_folder)
    model = CLIPModel.from_pretrained(transformers_clip_folder).eval()
    with torch.no_grad():
        out = model(
            pixel_values=processor(photographs, return_tensors="pt")["pixel_values"],
            **tokenizer(prompts, padding=True, return_tensors="pt"),
        )
    expected = (out.image_embeds * out.text_embeds).sum(-1)  # they are normalised
    assert expected.std() > 0.01
    assert_close(theirs(photographs, prompts), expected, rtol=0, atol=1e-5)


def test_siglip_score_is_the_cosine_that_plain_transformers_computes(siglip_folder, photographs):
    prompts = ["a cat", "two dogs", "", "x" * 23] * 4
    processor = SiglipImageProcessorPil.from_pretrained(siglip_folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(siglip_folder)
    model = SiglipModel.from_pretrained(siglip_folder).eval()
    with torch.no_grad():
        out = model(
            pixel_values=processor(photographs, return_tensors="pt")["pixel_values"],
            input_ids=tokenizer(prompts, padding="max_length", max_length=24, return_tensors="pt")[
                "input_ids"
            ],
        )
    expected = (out.image_embeds * out.text_embeds).sum(-1)
    assert expected.std() > 0.01
    reward = CLIPReward(checkpoint=str(siglip_folder))
    assert_close(reward(photographs, prompts), expected, rtol=0, atol=1e-5)
    assert_close(reward(photographs, [text.upper() for text in prompts]), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fixture", ["transformers_clip_folder", "siglip_folder"])
def test_long_prompts_of_transformers_keep_their_end_token(fixture: str, request: pytest.FixtureRequest):
    folder = str(request.getfixturevalue(fixture))
    backbone = Backbone(BackboneSpec.of(None, None, folder), "cpu")
    end = AutoTokenizer.from_pretrained(folder).eos_token_id
    with pytest.warns(UserWarning, match="first 22 tokens of a prompt"):
        backbone.embed_texts(["a" * 10_000])
    assert (backbone.towers.tokenize(["a" * 10_000, "b" * 10_000], 24)[:, -1] == end).all()


def test_older_models_that_read_at_the_highest_id_embed_the_same(
    transformers_clip_folder, theirs, tmp_path, images, prompts
):
    folder = Path(shutil.copytree(transformers_clip_folder, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert_close(CLIPReward(checkpoint=str(folder))(images, prompts), theirs(images, prompts))


def test_position_ids_of_older_files_are_not_left_over(
    transformers_clip_folder, theirs, tmp_path, images, prompts
):
    folder = Path(shutil.copytree(transformers_clip_folder, tmp_path / "folder"))
    tensors = load_file(folder / "model.safetensors")
    tensors["text_model.embeddings.position_ids"] = torch.arange(24)[None]
    tensors["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_close(CLIPReward(checkpoint=str(folder))(images, prompts), theirs(images, prompts))


def test_processor_as_transformers_5_saves_it_is_read(
    transformers_clip_folder, theirs, tmp_path, images, prompts
):
    folder = Path(shutil.copytree(transformers_clip_folder, tmp_path / "folder"))
    CLIPImageProcessorPil.from_pretrained(folder).save_pretrained(tmp_path / "new")
    settings = json.loads((tmp_path / "new" / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": settings}))
    assert_close(CLIPReward(checkpoint=str(folder))(images, prompts), theirs(images, prompts))


def test_model_of_the_hub_works_offline_once_fetched(
    transformers_clip_folder, clip_folder, publish, theirs, images, prompts
):
    commit = "0123456789" * 4
    publish("somebody/tiny", commit, *transformers_clip_folder.iterdir())
    publish("somebody/old", commit, *clip_folder.iterdir())
    expected = theirs(images, prompts)
    assert_close(CLIPReward(checkpoint="somebody/tiny")(images, prompts), expected)
    assert_close(CLIPReward(checkpoint=f"somebody/tiny@{commit}")(images, prompts), expected)
    assert_close(
        CLIPReward(checkpoint="somebody/old")(images, prompts),
        CLIPReward(checkpoint=str(clip_folder))(images, prompts),
    )
    refused(
        "somebody/tiny, .* not cached and cannot be downloaded", checkpoint=f"somebody/tiny@{commit[::-1]}"
    )


def change_config(folder: Path, file: str, **changes: object) -> None:
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(config | changes))


def test_broken_folders_of_transformers_are_named(transformers_clip_folder: Path, tmp_path: Path):
    def copy(name: str) -> Path:
        return Path(shutil.copytree(transformers_clip_folder, tmp_path / name))

    change_config(copy("naflex"), "config.json", model_type="siglip2")
    assert "NaFlex" in str(
        refused("model type siglip2 is not supported", checkpoint=str(tmp_path / "naflex"))
    )

    (copy("no weights") / "model.safetensors").rename(tmp_path / "no weights" / "pytorch_model.bin")
    refused("no open_clip_model.safetensors or model.safetensors", checkpoint=str(tmp_path / "no weights"))

    weights = copy("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refused("cannot be loaded", checkpoint=str(weights.parent))

    tensors = load_file(copy("missing") / "model.safetensors")
    del tensors["visual_projection.weight"]
    tensors["something"] = torch.zeros(1)
    save_file(tensors, tmp_path / "missing" / "model.safetensors", metadata={"format": "pt"})
    error = refused("cannot be loaded", checkpoint=str(tmp_path / "missing"))
    assert error.why == "missing: visual_projection.weight; unexpected: something"

    change_config(copy("other"), "config.json", projection_dim=16)
    refused("cannot be loaded", checkpoint=str(tmp_path / "other"))

    (copy("no processor") / "preprocessor_config.json").unlink()
    refused("preprocessor_config.json cannot be read", checkpoint=str(tmp_path / "no processor"))

    change_config(copy("larger"), "preprocessor_config.json", size=224, crop_size=224)
    assert "takes 64 x 64" in str(refused("does not fit the CLIP model", checkpoint=str(tmp_path / "larger")))


def test_tokenizer_that_ends_with_another_token_is_refused(transformers_clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(transformers_clip_folder, tmp_path / "folder"))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 512  # the start token
    (folder / "config.json").write_text(json.dumps(config))
    assert "reads at token 512, the tokenizer ends with 513" in str(
        refused("does not fit the CLIP model", checkpoint=str(folder))
    )


# --- bad input ----------------------------------------------------------------------------------------------


def refused(match: str, **options: str) -> DiffalignError:
    with pytest.raises(RewardError, match=match) as error:
        CLIPReward(**options)
    return error.value


def test_missing_checkpoint_is_named(tmp_path: Path):
    error = refused("the CLIP checkpoint does not exist", checkpoint=str(tmp_path / "nowhere"))
    assert error.where == str(tmp_path / "nowhere")


def test_pickle_weights_are_refused(clip_folder: Path, tmp_path: Path):
    pickled = tmp_path / "clip.pt"
    torch.save({}, pickled)
    refused("must be safetensors", checkpoint=str(pickled), architecture="ViT-B-32")
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    refused("no open_clip_model.safetensors", checkpoint=str(folder))


def test_pickle_beside_safetensors_is_not_loaded(clip_folder: Path, tmp_path: Path, images, prompts):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    (folder / "open_clip_pytorch_model.bin").write_bytes(b"not a pickle")
    expected = CLIPReward(checkpoint=str(clip_folder))(images, prompts)
    assert_close(CLIPReward(checkpoint=str(folder))(images, prompts), expected)


def test_truncated_weights_are_named(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert str(folder) in str(refused("cannot be loaded", checkpoint=str(folder)))


def test_missing_weight_is_named(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    tensors = load_file(folder / "open_clip_model.safetensors")
    del tensors["visual.proj"]
    save_file(tensors, folder / "open_clip_model.safetensors")
    assert "visual.proj" in str(refused("cannot be loaded", checkpoint=str(folder)))


def test_folder_without_config_is_named(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    (folder / "open_clip_config.json").unlink()
    refused("no open_clip_config.json", checkpoint=str(folder))


def test_tokenizer_of_another_model_is_refused(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    config = json.loads((folder / "open_clip_config.json").read_text())
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]  # open_clip then takes its 49,408 tokens
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    assert "49407" in str(refused("tokenizer does not fit", checkpoint=str(folder)))


def test_tokenizer_whose_end_is_not_the_highest_id_is_refused(clip_folder: Path, tmp_path: Path):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "folder"))
    text = (folder / "tokenizer.json").read_text()
    text = text.replace("513", "1000").replace("512", "513").replace("1000", "512")  # swap start and end
    (folder / "tokenizer.json").write_text(text)
    refused("not the end token", checkpoint=str(folder))


def test_openai_weights_without_quickgelu_are_refused():
    error = refused("do not belong to ViT-L-14", architecture="ViT-L-14", pretrained="openai")
    assert "ViT-L-14-quickgelu" in str(error)


def test_options_that_contradict_are_refused(clip_folder: Path):
    refused("leave architecture out|own architecture", checkpoint=str(clip_folder), architecture="ViT-B-32")
    refused("not both", checkpoint=str(clip_folder), pretrained="openai")
    refused("needs its architecture", checkpoint=str(clip_folder / "open_clip_model.safetensors"))
    assert "ViT-L-14" in str(refused("no architecture named ViT-L-15", architecture="ViT-L-15"))
    assert "openai" in str(refused("no weights laoin", architecture="ViT-B-32", pretrained="laoin"))


def test_without_network_the_missing_weights_and_the_way_out_are_said(hub_cache: Path):
    error = refused("not cached and cannot be downloaded")
    assert "timm/vit_large_patch14_clip_224.openai, open_clip_model.safetensors" in error.what
    assert "a local copy as the option checkpoint" in str(error)
    assert str(hub_cache) in str(error)


def test_published_weights_work_offline_once_fetched(
    clip_folder: Path, publish, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images, prompts
):
    config = json.loads((clip_folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(clip_folder)
    (tmp_path / "Tiny-Test.json").write_text(json.dumps(config["model_cfg"]))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", [tmp_path / "Tiny-Test.json"])
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {})
    open_clip.factory._rescan_model_configs()
    published = config["preprocess_cfg"] | {"hf_hub": "somebody/tiny/"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "Tiny-Test", {"mine": published})
    publish("somebody/tiny", "0123", clip_folder / "open_clip_model.safetensors")
    reward = CLIPReward(architecture="Tiny-Test", pretrained="mine")
    assert_close(reward(images, prompts), CLIPReward(checkpoint=str(clip_folder))(images, prompts))


def test_file_with_its_architecture_is_loaded(
    clip_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images, prompts
):
    config = json.loads((clip_folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_tokenizer_name"] = str(clip_folder)
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"Tiny-Test": config})
    reward = CLIPReward(architecture="Tiny-Test", checkpoint=str(clip_folder / "open_clip_model.safetensors"))
    folder = CLIPReward(checkpoint=str(clip_folder))
    for key, weight in folder.backbone.model.state_dict().items():
        assert_close(reward.backbone.model.state_dict()[key], weight)
    assert reward(images, prompts).std() > 0


def test_file_of_another_architecture_is_refused(clip_folder: Path):
    file = str(clip_folder / "open_clip_model.safetensors")
    refused("cannot be loaded", checkpoint=file, architecture="RN50")
