"""The one table of built-in components. Paths are imported only when a component is shown or built."""

from __future__ import annotations

from fmg.registry.registry import Row

LORA_PRESETS = "fmg.models.lora_presets:LORA_PRESETS"
GRID_NAMES = "fmg.flow.grids:grid_names"
GRID_RULE = "fmg.flow.grids:make_grid"
"""Words of a recipe that later rooms define, in torch-free modules that are imported when a recipe is checked."""


def _row(kind: str, name: str, room: str, config: str, factory: str, summary: str) -> Row:
    path = config if ":" in config else f"configs:{config}"
    return Row(kind, name, f"fmg.{room}.{path}", f"fmg.{room}.{factory}", summary)


# fmt: off
ROWS: tuple[Row, ...] = (
    _row("model", "meanflow-shapes", "models", "MeanFlowShapesConfig", "embedded:meanflow_shapes",
         "Embedded two-time flow map that draws coloured shapes (32 px, CPU, no download)"),
    _row("model", "scm-shapes", "models", "ScmShapesConfig", "embedded:scm_shapes",
         "Embedded single-time consistency model that draws coloured shapes (32 px, CPU, no download)"),
    _row("model", "meanflow-flux", "models", "flux_configs:MeanFlowFluxConfig", "full_size:meanflow_flux",
         "MeanFlow student of FLUX.1-lite-8B, a two-time flow map (512 px, GPU; T2I-Distill)"),
    _row("model", "scm-flux", "models", "flux_configs:ScmFluxConfig", "full_size:scm_flux",
         "sCM student of FLUX.1-lite-8B, a single-time consistency model (512 px, GPU; T2I-Distill)"),
    _row("model", "flux-fewstep", "models", "flux_configs:FluxFewStepConfig", "full_size:flux_fewstep",
         "Any few-step FLUX-class flow map in a diffusers folder, by stated conventions (default: FLUX.1 [schnell])"),
    _row("stochasticizer", "asfmc", "stochasticizers", "AsfmcConfig", "asfmc:Asfmc",
         "Anchored stochastic flow map composition, exact, interior anchor (two-time maps)"),
    _row("stochasticizer", "asfmc-endpoint", "stochasticizers", "AsfmcEndpointConfig", "asfmc:AsfmcEndpoint",
         "Anchor at the clean endpoint: multistep consistency sampling as a policy (any flow map)"),
    _row("stochasticizer", "asfmc-euler", "stochasticizers", "AsfmcEulerConfig", "asfmc_euler:AsfmcEuler",
         "The paper's local anchor in first-order form (two-time maps, linear path)"),
    _row("stochasticizer", "flow-sde", "stochasticizers", "FlowSdeConfig", "velocity:FlowSde",
         "Baseline: Flow-GRPO's Euler-Maruyama sampler on the diagonal velocity"),
    _row("stochasticizer", "dance-sde", "stochasticizers", "DanceSdeConfig", "velocity:DanceSde",
         "Baseline: DanceGRPO's constant-noise SDE on the diagonal velocity"),
    _row("stochasticizer", "cps", "stochasticizers", "CpsConfig", "velocity:Cps",
         "Baseline: Flow-CPS, coefficients-preserving sampling on the diagonal velocity"),
    _row("stochasticizer", "naive-noise", "stochasticizers", "NaiveNoiseConfig", "naive:NaiveNoise",
         "Control: noise added on top of the map, which leaves the probability path"),
    _row("reward", "shapes", "worlds", "ShapesRewardConfig", "shapes.rewards:ShapesReward",
         "Rule-based verifier of the shapes world: soft and strict prompt adherence from pixels"),
    _row("reward", "shapes-quality", "worlds", "ShapesQualityConfig", "shapes.rewards:ShapesQuality",
         "Held-out picture quality of the shapes world: one recognisable object, sharpness, palette fidelity"),
    _row("reward", "jpeg-compressibility", "rewards", "JpegConfig", "jpeg:compressibility",
         "Minus the size of the JPEG file, kB / 500"),
    _row("reward", "jpeg-incompressibility", "rewards", "JpegConfig", "jpeg:incompressibility",
         "The size of the JPEG file in kB"),
    _row("reward", "python", "rewards", "PythonRewardConfig", "python:PythonReward",
         "Your own function, module:function (images, prompts) -> one score an image"),
    _row("reward", "hpsv2", "rewards", "model_configs:Hpsv2Config", "hpsv2:hpsv2",
         "HPSv2.1 (or v2.0): cosine of image and prompt under a CLIP ViT-H/14 tuned to human preferences"),
    _row("reward", "pickscore", "rewards", "model_configs:PickScoreConfig", "pickscore:pickscore",
         "PickScore: CLIP ViT-H/14 tuned to the choices of Pick-a-Pic users, by default divided by 26"),
    _row("reward", "clipscore", "rewards", "model_configs:ClipScoreConfig", "clipscore:clipscore",
         "CLIPScore in one of its published forms: cosine, DiffusionNFT, Hessel et al., torchmetrics"),
    _row("reward", "aesthetic", "rewards", "model_configs:AestheticConfig", "aesthetic:aesthetic",
         "LAION's aesthetic score of the image alone, about 1 to 10 (affine head on CLIP ViT-L/14)"),
    _row("reward", "imagereward", "rewards", "model_configs:ImageRewardConfig", "imagereward:imagereward",
         "ImageReward: a BLIP that reads prompt and image together, standardised"),
    _row("reward", "hpsv3", "rewards", "model_configs:Hpsv3Config", "hpsv3:hpsv3",
         "HPSv3: mean of the preference score that a tuned Qwen2-VL-7B predicts"),
    _row("reward", "geneval", "rewards", "service_configs:GenEvalConfig", "geneval:GenEval",
         "GenEval's object rules (count, colour, position) over a Mask2Former detector and CLIP"),
    _row("reward", "ocr", "rewards", "service_configs:OcrConfig", "ocr:Ocr",
         "Quoted text against all text read in the picture, by edit distance (Flow-GRPO)"),
    _row("reward", "ocr-logp", "rewards", "service_configs:OcrLogpConfig", "ocr_ctc:OcrLogp",
         "Log-probability per character that a recogniser reads the quoted text: dense, for one-line strips"),
    _row("reward", "vlm-judge", "rewards", "service_configs:VlmJudgeConfig", "vlm_judge:VlmJudge",
         "A vision-language model behind an OpenAI-compatible endpoint as the judge"),
    _row("reward", "remote", "rewards", "service_configs:RemoteConfig", "remote:remote",
         "Rewards computed by a running `fmg reward-server`"),
    _row("objective", "grpo", "rl", "GrpoConfig", "grpo:Grpo",
         "Clipped policy ratio on transition densities with group advantages and optional KL"),
    _row("objective", "grpo-guard", "rl", "GrpoGuardConfig", "grpo:grpo_guard",
         "GRPO whose ratio has the same scale at every step (ratio-norm)"),
    _row("objective", "rwfm", "rl", "RwfmConfig", "rwfm:RewardWeightedFlowMatching",
         "Reward-weighted flow matching on the samples of a deterministic or stochastic rollout"),
    _row("optimizer", "adamw", "training", "AdamWConfig", "optimizers:adamw",
         "AdamW (decoupled weight decay)"),
    _row("optimizer", "sgd", "training", "SgdConfig", "optimizers:sgd",
         "SGD with momentum"),
    _row("optimizer", "muon", "training", "MuonConfig", "optimizers:muon",
         "Muon on matrices, AdamW on everything else"),
    _row("optimizer", "adafactor", "training", "AdafactorConfig", "optimizers:adafactor",
         "Adafactor: factored second moments, little memory"),
    _row("prompt-set", "shapes-train", "worlds", "ShapesPromptsConfig", "shapes.prompt_sets:shapes_train",
         "Prompts of the shapes world that training draws from"),
    _row("prompt-set", "shapes-heldout", "worlds", "ShapesPromptsConfig", "shapes.prompt_sets:shapes_heldout",
         "Prompts of the shapes world with attribute combinations that training never sees"),
    _row("prompt-set", "shapes-hard", "worlds", "ShapesPromptsConfig", "shapes.prompt_sets:shapes_hard",
         "Two objects, counts and relations: evaluated only"),
    _row("prompt-set", "everyday-train", "data", "EverydayPromptsConfig", "everyday:everyday_train",
         "Everyday scenes in four styles, of our own making: training draws from them"),
    _row("prompt-set", "everyday-heldout", "data", "EverydayPromptsConfig", "everyday:everyday_heldout",
         "Everyday scenes whose combination of subject and setting training never sees"),
    _row("prompt-set", "file", "data", "FilePromptsConfig", "files:file_prompts",
         "Prompts from a .txt (one a line) or .jsonl file"),
    _row("feature-extractor", "pixels", "eval", "PixelsConfig", "pixels:Pixels",
         "The picture itself, scaled down: for small synthetic pictures; needs no weights"),
    _row("feature-extractor", "clip", "eval", "ClipFeaturesConfig", "network_extractors:clip",
         "Image embedding and patch tokens of CLIP ViT-L/14"),
    _row("feature-extractor", "dinov2", "eval", "Dinov2Config", "network_extractors:dinov2",
         "Class and patch tokens of DINOv2 ViT-L/14, trained without labels or captions"),
)
# fmt: on
