from __future__ import annotations

import pytest
from pydantic import ValidationError

from diffalign.config import (
    RUNS,
    DDPOConfig,
    DDPORun,
    EvaluationConfig,
    ModelConfig,
    RewardConfig,
    SamplerConfig,
    SFTRun,
    TrainingConfig,
)


def ddpo(**sections) -> DDPORun:
    return DDPORun.model_validate(
        {"algorithm": {"name": "ddpo"}, "data": {"path": "p.txt"}, "rewards": [{"name": "clip"}], **sections}
    )


def test_defaults_are_valid_for_every_algorithm():
    assert ddpo().sampler.steps == 50
    assert SFTRun.model_validate({"algorithm": {}, "data": {"path": "x"}}).training.iterations == 100


def test_every_option_says_what_it_is():
    for run in RUNS.values():
        sections = [field.annotation for field in run.model_fields.values()]
        for section in sections:
            for name, field in getattr(section, "model_fields", {}).items():
                assert name == "name" or field.description, f"{section.__name__}.{name} has no docstring"


def test_a_run_cannot_be_changed_after_it_was_checked():
    with pytest.raises(ValidationError, match="frozen"):
        ddpo().sampler.steps = 10


def test_a_partly_given_evaluation_sampler_stays_deterministic():
    sampler = EvaluationConfig.model_validate({"sampler": {"steps": 20}}).sampler
    assert (sampler.steps, sampler.eta, sampler.guidance_scale) == (20, 0.0, 7.5)


def test_an_evaluation_sampler_built_in_python_is_taken_as_it_is():
    given = SamplerConfig(steps=7)
    assert EvaluationConfig(sampler=given).sampler == given


def test_evaluation_may_use_ddpm_without_naming_eta():
    assert EvaluationConfig.model_validate({"sampler": {"kind": "ddpm"}}).sampler.eta == 1.0


def test_ddpm_has_no_eta():
    with pytest.raises(ValidationError, match="eta belongs to ddim"):
        SamplerConfig(kind="ddpm", eta=0.5)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan"), float("inf")])
def test_eta_outside_zero_to_one_is_refused(eta):
    with pytest.raises(ValidationError):
        SamplerConfig(eta=eta)


def test_a_group_of_one_is_refused_only_where_the_group_normalises():
    assert DDPOConfig(group_size=1, advantage="prompt").group_size == 1
    with pytest.raises(ValidationError, match="a group of one has no spread"):
        DDPOConfig(group_size=1, advantage="group")


def test_one_picture_an_iteration_is_refused():
    with pytest.raises(ValidationError, match="one picture an iteration"):
        DDPOConfig(group_size=1, prompts_per_iteration=1, updates_per_epoch=1)


def test_updates_must_share_the_pictures_equally():
    with pytest.raises(ValidationError, match=r"3 does not divide .*group_size = 256"):
        DDPOConfig(updates_per_epoch=3)


def test_conflicts_of_a_section_come_together():
    with pytest.raises(ValidationError) as caught:
        DDPOConfig(
            group_size=1, advantage="group", objective="reinforce", inner_epochs=2, updates_per_epoch=5
        )
    message = str(caught.value)
    assert all(option in message for option in ("group_size:", "inner_epochs:", "updates_per_epoch:"))


def test_a_policy_gradient_needs_noise_and_a_reward():
    with pytest.raises(ValidationError) as caught:
        ddpo(sampler={"eta": 0}, rewards=[{"name": "clip", "weight": 0}])
    message = str(caught.value)
    assert "eta = 0 makes every step deterministic" in message
    assert "at least one reward with a weight other than 0" in message


def test_ddpm_sampling_has_noise_without_eta():
    assert ddpo(sampler={"kind": "ddpm"}).sampler.kind == "ddpm"


def test_two_rewards_of_one_name_need_labels():
    twice = [RewardConfig(name="clip"), RewardConfig(name="clip")]
    with pytest.raises(ValidationError, match="clip is listed twice"):
        ddpo(rewards=twice)
    assert len(ddpo(rewards=[twice[0], RewardConfig(name="clip", label="clip-2")]).rewards) == 2


def test_adam_betas_stay_below_one():
    with pytest.raises(ValidationError):
        TrainingConfig(adam_betas=(0.9, 1.0))


def test_full_fine_tuning_is_lora_null():
    assert ModelConfig.model_validate({"lora": None}).lora is None
