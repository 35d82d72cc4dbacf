"""The run configuration: every option, its default, its unit, its check.

One class per section, one `...Run` class per algorithm (`RUNS`). Class defaults are the published Stable
Diffusion recipe; a shipped file differs from them only where its model or hardware asks. Reading YAML,
overrides and error messages live in `config_file.py`; this package is pydantic only and imports no torch.
"""

from diffalign.config.adapters import AdapterConfig, LoRAConfig
from diffalign.config.base import Options
from diffalign.config.data import ImagesConfig, PairsConfig, PicturesConfig, PromptsConfig
from diffalign.config.forward_process import AWMConfig, AWMRun, NFTConfig, NFTRun
from diffalign.config.guards import GuardsConfig
from diffalign.config.model import ModelConfig, RewardConfig, SamplerConfig
from diffalign.config.online import (
    DDPOConfig,
    DDPORun,
    DPOKConfig,
    DPOKRun,
    GRPOConfig,
    GRPORun,
    OnlineRun,
    TrajectoryRLConfig,
    TrajectoryRLRun,
    ValueConfig,
    WindowConfig,
)
from diffalign.config.preference import DPOConfig, DPORun
from diffalign.config.ranking import RankDPOConfig, RankDPORun, RankedConfig
from diffalign.config.reward_gradient import (
    AlignPropConfig,
    AlignPropRun,
    DRaFTConfig,
    DRaFTRun,
    ReFLConfig,
    ReFLRun,
    RewardGradientConfig,
    RewardGradientRun,
)
from diffalign.config.run import AlgorithmConfig, Run
from diffalign.config.spin import SPINConfig, SPINRun
from diffalign.config.supervised import (
    DenoisingConfig,
    PriorConfig,
    RAFTConfig,
    RAFTRun,
    RWRConfig,
    RWRRun,
    SelfTrainingConfig,
    SFTConfig,
    SFTRun,
)
from diffalign.config.training import EvaluationConfig, TrackingConfig, TrainingConfig
from diffalign.config.trajectory_preference import (
    D3POConfig,
    D3PORun,
    OnlineDPOConfig,
    OnlineDPORun,
    PRDPConfig,
    PRDPRun,
    SPOConfig,
    SPORun,
)
from diffalign.config.unpaired import KTOConfig, KTORun, LabelledConfig

RUNS: dict[str, type[Run]] = {
    "sft": SFTRun,
    "rwr": RWRRun,
    "raft": RAFTRun,
    "dpo": DPORun,
    "kto": KTORun,
    "rankdpo": RankDPORun,
    "spin": SPINRun,
    "ddpo": DDPORun,
    "grpo": GRPORun,
    "dpok": DPOKRun,
    "nft": NFTRun,
    "awm": AWMRun,
    "refl": ReFLRun,
    "draft": DRaFTRun,
    "alignprop": AlignPropRun,
    "d3po": D3PORun,
    "prdp": PRDPRun,
    "spo": SPORun,
    "online_dpo": OnlineDPORun,
}
"""Algorithm name -> configuration class. A new algorithm adds one line."""

__all__ = [
    "RUNS",
    "AWMConfig",
    "AWMRun",
    "AdapterConfig",
    "AlgorithmConfig",
    "AlignPropConfig",
    "AlignPropRun",
    "D3POConfig",
    "D3PORun",
    "DDPOConfig",
    "DDPORun",
    "DPOConfig",
    "DPOKConfig",
    "DPOKRun",
    "DPORun",
    "DRaFTConfig",
    "DRaFTRun",
    "DenoisingConfig",
    "EvaluationConfig",
    "GRPOConfig",
    "GRPORun",
    "GuardsConfig",
    "ImagesConfig",
    "KTOConfig",
    "KTORun",
    "LabelledConfig",
    "LoRAConfig",
    "ModelConfig",
    "NFTConfig",
    "NFTRun",
    "OnlineDPOConfig",
    "OnlineDPORun",
    "OnlineRun",
    "Options",
    "PRDPConfig",
    "PRDPRun",
    "PairsConfig",
    "PicturesConfig",
    "PriorConfig",
    "PromptsConfig",
    "RAFTConfig",
    "RAFTRun",
    "RWRConfig",
    "RWRRun",
    "RankDPOConfig",
    "RankDPORun",
    "RankedConfig",
    "ReFLConfig",
    "ReFLRun",
    "RewardConfig",
    "RewardGradientConfig",
    "RewardGradientRun",
    "Run",
    "SFTConfig",
    "SFTRun",
    "SPINConfig",
    "SPINRun",
    "SPOConfig",
    "SPORun",
    "SamplerConfig",
    "SelfTrainingConfig",
    "TrackingConfig",
    "TrainingConfig",
    "TrajectoryRLConfig",
    "TrajectoryRLRun",
    "ValueConfig",
    "WindowConfig",
]
