"""The built-in components and a registry for each kind. Rows name definitions, which are imported when needed."""

from __future__ import annotations

from typing import Any

from fmg.core.errors import UsageError, suggestion
from fmg.core.protocols import (
    BackendSource,
    FeatureExtractor,
    ModelSource,
    Objective,
    OptimizerFactory,
    PromptSet,
    Reward,
    Stochasticizer,
    Tracker,
)
from fmg.registry.config import ComponentConfig, ModelConfig, ObjectiveConfig, StochasticizerConfig, TrackerConfig
from fmg.registry.registry import Registry, Row

LIVE_GRAPH = "fmg.export.live:live_graph"
"""Replaces a network in training by its exported graph (`rollout.branch.backend: onnxruntime`)."""

# fmt: off
ROWS: tuple[Row, ...] = (
    Row("model", "meanflow-shapes", "fmg.models.embedded:MeanFlowShapesConfig", "fmg.models.embedded:EmbeddedSource",
        "Embedded two-time flow map that generates coloured shapes (32 px, CPU, no download)"),
    Row("model", "scm-shapes", "fmg.models.embedded:ScmShapesConfig", "fmg.models.embedded:EmbeddedSource",
        "Embedded single-time consistency model that generates coloured shapes (32 px, CPU, no download)"),
    Row("model", "meanflow-text", "fmg.models.embedded:MeanFlowTextConfig", "fmg.models.embedded:EmbeddedSource",
        "Embedded two-time flow map that writes three letters on a sign (24 px, CPU, no download)"),
    Row("model", "meanflow-flux", "fmg.models.flux.configs:MeanFlowFluxConfig", "fmg.models.published:PublishedSource",
        "MeanFlow student of FLUX.1-lite-8B, a two-time flow map (512 px, GPU; T2I-Distill)"),
    Row("model", "scm-flux", "fmg.models.flux.configs:ScmFluxConfig", "fmg.models.published:PublishedSource",
        "sCM student of FLUX.1-lite-8B, a single-time consistency model (512 px, GPU; T2I-Distill)"),
    Row("model", "flux-fewstep", "fmg.models.flux.configs:FluxFewStepConfig", "fmg.models.published:PublishedSource",
        "Any few-step FLUX-class flow map in a diffusers folder; you state its conventions (default FLUX.1 [schnell])"),
    Row("model", "sana-sprint", "fmg.models.sana.configs:SanaSprintConfig", "fmg.models.published:PublishedSource",
        "SANA-Sprint 0.6B or 1.6B, a single-time consistency model on the trig path (1024 px, GPU)"),
    Row("model", "flux2-klein", "fmg.models.flux2.configs:Flux2KleinConfig", "fmg.models.published:PublishedSource",
        "FLUX.2 [klein] 4B or 9B, a velocity network distilled for four Euler steps (1024 px, GPU)"),
    Row("model", "sd35-meanflow", "fmg.models.sd3.configs:SD35MeanFlowConfig", "fmg.models.published:PublishedSource",
        "SD3.5-Medium with AnyFlow's second time and MeanFlowNFT's adapters, a two-time flow map (512 px, GPU)"),
    Row("model", "flux3-klein", "fmg.models.flux3.configs:Flux3KleinConfig", "fmg.models.published:PublishedSource",
        "FLUX.3 [klein], a two-time flow map, from any folder of diffusers' own class (1024 px, GPU)"),
    Row("model", "z-image-turbo", "fmg.models.zimage.configs:ZImageTurboConfig", "fmg.models.published:PublishedSource",
        "Z-Image-Turbo 6B, a velocity network distilled for eight Euler steps (1024 px, GPU)"),
    Row("stochasticizer", "asfmc", "fmg.stochasticizers.configs:AsfmcConfig", "fmg.stochasticizers.asfmc:Asfmc",
        "Anchored stochastic flow map composition, exact, interior anchor (two-time maps)"),
    Row("stochasticizer", "asfmc-endpoint",
        "fmg.stochasticizers.configs:AsfmcEndpointConfig", "fmg.stochasticizers.asfmc:AsfmcEndpoint",
        "Anchor at the clean endpoint: multistep consistency sampling as a policy (any flow map)"),
    Row("stochasticizer", "asfmc-euler",
        "fmg.stochasticizers.configs:AsfmcEulerConfig", "fmg.stochasticizers.asfmc:AsfmcEuler",
        "The paper's local anchor in first-order form (two-time maps, linear path)"),
    Row("stochasticizer", "flow-sde",
        "fmg.stochasticizers.configs:FlowSdeConfig", "fmg.stochasticizers.velocity:FlowSde",
        "Baseline: Flow-GRPO's Euler-Maruyama sampler on the diagonal velocity"),
    Row("stochasticizer", "dance-sde",
        "fmg.stochasticizers.configs:DanceSdeConfig", "fmg.stochasticizers.velocity:DanceSde",
        "Baseline: DanceGRPO's constant-noise SDE on the diagonal velocity"),
    Row("stochasticizer", "cps", "fmg.stochasticizers.configs:CpsConfig", "fmg.stochasticizers.velocity:Cps",
        "Baseline: Flow-CPS, coefficients-preserving sampling on the diagonal velocity"),
    Row("stochasticizer", "naive-noise",
        "fmg.stochasticizers.configs:NaiveNoiseConfig", "fmg.stochasticizers.velocity:NaiveNoise",
        "Control: noise added on top of the map, which leaves the probability path"),
    Row("reward", "shapes", "fmg.worlds.configs:ShapesRewardConfig", "fmg.worlds.shapes.rewards:ShapesReward",
        "Rule-based verifier of the shapes world: soft and strict prompt adherence from pixels"),
    Row("reward", "shapes-quality", "fmg.worlds.configs:ShapesQualityConfig", "fmg.worlds.shapes.rewards:ShapesQuality",
        "Held-out image quality of the shapes world: one recognisable object, sharpness, palette fidelity"),
    Row("reward", "shapes-clip", "fmg.worlds.configs:ShapesClipConfig", "fmg.worlds.shapes.clip:ShapesClip",
        "Cosine of image and prompt under a small CLIP that was trained on renders of the shapes world"),
    Row("reward", "text-fidelity", "fmg.worlds.configs:TextFidelityConfig", "fmg.worlds.text.fidelity:TextFidelity",
        "Likeness to a printed sign of the text world: palette, contrast, clean margins"),
    Row("reward", "jpeg-compressibility", "fmg.rewards.configs:JpegConfig", "fmg.rewards.jpeg:compressibility",
        "Minus the size of the JPEG file, kB / 500"),
    Row("reward", "jpeg-incompressibility", "fmg.rewards.configs:JpegConfig", "fmg.rewards.jpeg:incompressibility",
        "The size of the JPEG file in kB"),
    Row("reward", "python", "fmg.rewards.configs:PythonRewardConfig", "fmg.rewards.python:PythonReward",
        "Your own function, module:function (images, prompts) -> one score per image"),
    Row("reward", "function", "fmg.rewards.configs:FunctionRewardConfig", "fmg.rewards.python:FunctionReward",
        "A function passed to a Python call: fmg.train(..., rewards=[my_function])"),
    Row("reward", "hpsv2", "fmg.rewards.configs:Hpsv2Config", "fmg.rewards.clip:hpsv2",
        "HPSv2.1 (or v2.0): cosine of image and prompt under a CLIP ViT-H/14 tuned to human preferences"),
    Row("reward", "pickscore", "fmg.rewards.configs:PickScoreConfig", "fmg.rewards.clip:pickscore",
        "PickScore: CLIP ViT-H/14 tuned to the choices of Pick-a-Pic users, by default divided by 26"),
    Row("reward", "clipscore", "fmg.rewards.configs:ClipScoreConfig", "fmg.rewards.clip:clipscore",
        "CLIPScore in one of its published forms: cosine, DiffusionNFT, Hessel et al., torchmetrics"),
    Row("reward", "aesthetic", "fmg.rewards.configs:AestheticConfig", "fmg.rewards.clip:aesthetic",
        "LAION's aesthetic score of the image alone, about 1 to 10 (affine head on CLIP ViT-L/14)"),
    Row("reward", "imagereward", "fmg.rewards.configs:ImageRewardConfig", "fmg.rewards.imagereward:imagereward",
        "ImageReward: a BLIP that reads prompt and image together, standardised"),
    Row("reward", "hpsv3", "fmg.rewards.configs:Hpsv3Config", "fmg.rewards.hpsv3:hpsv3",
        "HPSv3: mean of the preference score that a tuned Qwen2-VL-7B predicts"),
    Row("reward", "deqa", "fmg.rewards.configs:DeqaConfig", "fmg.rewards.deqa:deqa",
        "DeQA-Score: expected rating of an image's quality, by an mPLUG-Owl2; does not see the prompt"),
    Row("reward", "geneval", "fmg.rewards.configs:GenEvalConfig", "fmg.rewards.geneval:GenEval",
        "GenEval's object rules (count, colour, position) over a Mask2Former detector and CLIP"),
    Row("reward", "geneval2", "fmg.rewards.configs:GenEval2Config", "fmg.rewards.geneval2:GenEval2",
        "GenEval 2 (Soft-TIFA): probability that Qwen3-VL answers each question about the prompt as expected"),
    Row("reward", "unifiedreward", "fmg.rewards.configs:UnifiedRewardConfig", "fmg.rewards.unifiedreward:UnifiedReward",
        "UnifiedReward 2.0: ratings from 1 to 5 that a tuned Qwen3-VL-8B writes"),
    Row("reward", "ocr", "fmg.rewards.configs:OcrConfig", "fmg.rewards.ocr:Ocr",
        "Quoted text against all text read in the image, by edit distance (Flow-GRPO)"),
    Row("reward", "ocr-logp", "fmg.rewards.configs:OcrLogpConfig", "fmg.rewards.ocr:OcrLogp",
        "Log-probability per character that a recogniser reads the quoted text: dense, for one-line strips"),
    Row("reward", "vlm-judge", "fmg.rewards.configs:VlmJudgeConfig", "fmg.rewards.vlm_judge:VlmJudge",
        "A vision-language model behind an OpenAI-compatible endpoint as the judge"),
    Row("reward", "remote", "fmg.rewards.configs:RemoteConfig", "fmg.rewards.remote:remote",
        "Rewards computed by a running `fmg reward-server`"),
    Row("objective", "grpo", "fmg.rl.configs:GrpoConfig", "fmg.rl.grpo:Grpo",
        "Clipped policy ratio on transition densities with group advantages and optional KL"),
    Row("objective", "grpo-guard", "fmg.rl.configs:GrpoGuardConfig", "fmg.rl.grpo:grpo_guard",
        "GRPO whose ratio has the same scale at every step (ratio-norm)"),
    Row("objective", "rwfm", "fmg.rl.configs:RwfmConfig", "fmg.rl.rwfm:RewardWeightedFlowMatching",
        "Reward-weighted flow matching on finished samples of the map's own sampler"),
    Row("objective", "reward-gradient", "fmg.rl.configs:RewardGradientConfig",
        "fmg.rl.reward_gradient:RewardGradient",
        "Backpropagation of differentiable rewards through the last jumps and the decoder (DRaFT-K, ReFL)"),
    Row("objective", "diffusion-nft", "fmg.rl.configs:DiffusionNftConfig", "fmg.rl.forward:DiffusionNft",
        "DiffusionNFT: contrasts good and bad samples on the forward process, without a likelihood"),
    Row("objective", "meanflow-nft", "fmg.rl.configs:MeanFlowNftConfig", "fmg.rl.forward:MeanFlowNft",
        "MeanFlowNFT: DiffusionNFT on the average velocities of a two-time map"),
    Row("objective", "mean-flow-advantage",
        "fmg.rl.configs:MeanFlowAdvantageConfig", "fmg.rl.forward:MeanFlowAdvantage",
        "MeanFlowAdvantage: signed least squares on the average velocities of a two-time map"),
    Row("objective", "awm", "fmg.rl.configs:AwmConfig", "fmg.rl.forward:AdvantageWeightedMatching",
        "Advantage weighted matching: clipped policy ratio of matching errors on noised samples"),
    Row("objective", "reinforce", "fmg.rl.configs:ReinforceConfig", "fmg.rl.reinforce:Reinforce",
        "REINFORCE with a leave-one-out baseline on transition densities, one update per rollout"),
    Row("optimizer", "adamw", "fmg.training.configs:AdamWConfig", "fmg.training.optimizers:adamw",
        "AdamW (decoupled weight decay)"),
    Row("optimizer", "adamw8bit", "fmg.training.configs:AdamW8bitConfig", "fmg.training.optimizers:adamw8bit",
        "AdamW with 8-bit moments (bitsandbytes)"),
    Row("optimizer", "sgd", "fmg.training.configs:SgdConfig", "fmg.training.optimizers:sgd",
        "SGD with momentum"),
    Row("optimizer", "muon", "fmg.training.configs:MuonConfig", "fmg.training.optimizers:muon",
        "Muon on matrices, AdamW on everything else"),
    Row("optimizer", "adafactor", "fmg.training.configs:AdafactorConfig", "fmg.training.optimizers:adafactor",
        "Adafactor: factored second moments, little memory"),
    Row("prompt-set", "shapes-train",
        "fmg.worlds.configs:ShapesPromptsConfig", "fmg.worlds.shapes.prompts:shapes_train",
        "Training prompts of the shapes world"),
    Row("prompt-set", "shapes-heldout",
        "fmg.worlds.configs:ShapesPromptsConfig", "fmg.worlds.shapes.prompts:shapes_heldout",
        "Prompts of the shapes world with attribute combinations that training never sees"),
    Row("prompt-set", "shapes-hard",
        "fmg.worlds.configs:ShapesPromptsConfig", "fmg.worlds.shapes.prompts:shapes_hard",
        "Two objects, counts and relations: a fixed sample, for evaluation only"),
    Row("prompt-set", "shapes-hard-train",
        "fmg.worlds.configs:ShapesPromptsConfig", "fmg.worlds.shapes.prompts:shapes_hard_train",
        "Training prompts with two objects, counts and relations"),
    Row("prompt-set", "shapes-hard-heldout",
        "fmg.worlds.configs:ShapesPromptsConfig", "fmg.worlds.shapes.prompts:shapes_hard_heldout",
        "Two objects, counts and relations in combinations that training never sees"),
    Row("prompt-set", "text-train", "fmg.worlds.configs:TextPromptsConfig", "fmg.worlds.text.prompts:text_train",
        "Training prompts of the text world: signs that quote a word of three letters"),
    Row("prompt-set", "text-heldout",
        "fmg.worlds.configs:TextPromptsConfig", "fmg.worlds.text.prompts:text_heldout",
        "Prompts of the text world that quote words which training never sees"),
    Row("prompt-set", "everyday-train",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:everyday_train",
        "Everyday scenes in four styles, written for fmg: for training"),
    Row("prompt-set", "everyday-heldout",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:everyday_heldout",
        "Everyday scenes whose combination of subject and setting training never sees"),
    Row("prompt-set", "geneval-train",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:geneval_train",
        "GenEval's six templates with combinations chosen for fmg: for training"),
    Row("prompt-set", "geneval-heldout",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:geneval_heldout",
        "GenEval's six templates with combinations that training never sees"),
    Row("prompt-set", "lettering-train",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:lettering_train",
        "Words on signs, mugs and posters, written for fmg: for training"),
    Row("prompt-set", "lettering-heldout",
        "fmg.data.builtin_prompts:BuiltinPromptsConfig", "fmg.data.builtin_prompts:lettering_heldout",
        "Words on signs, mugs and posters that training never sees"),
    Row("prompt-set", "file", "fmg.data.prompt_sets:FilePromptsConfig", "fmg.data.prompt_sets:file_prompts",
        "Prompts from a .txt (one per line) or .jsonl file, GenEval's metadata among them"),
    Row("backend", "torch", "fmg.inference.configs:TorchBackendConfig", "fmg.inference.openers:TorchOpener",
        "A model or a run in torch, eager"),
    Row("backend", "torch-compile",
        "fmg.inference.configs:TorchCompileConfig", "fmg.inference.openers:TorchCompileOpener",
        "A model or a run in torch, compiled; on a GPU with a CUDA graph per shape"),
    Row("backend", "onnxruntime",
        "fmg.inference.configs:OnnxRuntimeConfig", "fmg.inference.openers:onnxruntime_backend",
        "An exported artifact in ONNX Runtime, on a CPU or with its CUDA and TensorRT providers"),
    Row("backend", "tensorrt", "fmg.inference.configs:TensorRtConfig", "fmg.inference.openers:tensorrt_backend",
        "TensorRT engines of an exported artifact, built on this kind of GPU"),
    Row("backend", "tensorrt-rtx", "fmg.inference.configs:TensorRtConfig", "fmg.inference.openers:tensorrt_rtx_backend",
        "TensorRT-RTX engines of an exported artifact, built ahead of time for GeForce and RTX GPUs"),
    Row("feature-extractor", "pixels", "fmg.eval.configs:PixelsConfig", "fmg.eval.extractors:Pixels",
        "The image itself, scaled down: for small synthetic images; needs no weights"),
    Row("feature-extractor", "clip", "fmg.eval.configs:ClipFeaturesConfig", "fmg.eval.extractors:clip",
        "Image embedding and patch tokens of CLIP ViT-L/14"),
    Row("feature-extractor", "dinov2", "fmg.eval.configs:Dinov2Config", "fmg.eval.extractors:dinov2",
        "Class and patch tokens of DINOv2 ViT-L/14, trained without labels or captions"),
    Row("tracker", "tensorboard", "fmg.trackers.configs:TensorBoardConfig", "fmg.trackers.services:TensorBoard",
        "Event files in the run folder, for TensorBoard"),
    Row("tracker", "wandb", "fmg.trackers.configs:WandbConfig", "fmg.trackers.services:Wandb",
        "Weights & Biases; offline without a login"),
    Row("tracker", "trackio", "fmg.trackers.configs:TrackioConfig", "fmg.trackers.services:Trackio",
        "Trackio, a dashboard on this computer or a Space"),
    Row("tracker", "swanlab", "fmg.trackers.configs:SwanLabConfig", "fmg.trackers.services:SwanLab",
        "SwanLab; offline without a login"),
    Row("tracker", "mlflow", "fmg.trackers.configs:MlflowConfig", "fmg.trackers.services:Mlflow",
        "MLflow, a server or its local store"),
)
# fmt: on


models: Registry[ModelSource] = Registry("model", ROWS, ModelConfig)
stochasticizers: Registry[Stochasticizer] = Registry("stochasticizer", ROWS, StochasticizerConfig)
rewards: Registry[Reward] = Registry("reward", ROWS, ComponentConfig)
objectives: Registry[Objective] = Registry("objective", ROWS, ObjectiveConfig)
optimizers: Registry[OptimizerFactory] = Registry("optimizer", ROWS, ComponentConfig)
prompt_sets: Registry[PromptSet] = Registry("prompt-set", ROWS, ComponentConfig)
backends: Registry[BackendSource] = Registry("backend", ROWS, ComponentConfig)
feature_extractors: Registry[FeatureExtractor] = Registry("feature-extractor", ROWS, ComponentConfig)
trackers: Registry[Tracker] = Registry("tracker", ROWS, TrackerConfig)

REGISTRIES: tuple[Registry[Any], ...] = (
    models,
    stochasticizers,
    rewards,
    objectives,
    optimizers,
    prompt_sets,
    backends,
    feature_extractors,
    trackers,
)


def registry_for(kind: str) -> Registry[Any]:
    """The registry of a kind named in singular or plural (`reward`, `rewards`, `prompt-set`, `prompt_sets`).

    Raises:
        UsageError: for any other kind, with a suggestion and the list.
    """
    wanted = kind.strip().lower().replace("_", "-")
    for registry in REGISTRIES:
        if wanted in (registry.kind, registry.plural):
            return registry
    raise UsageError(
        f"There is no kind of component named '{kind}'", suggestion(wanted, [r.plural for r in REGISTRIES])
    )


def registry_of(name: str) -> Registry[Any]:
    """The registry that has a component called `name`.

    Raises:
        UsageError: no registry has one, or several do.
    """
    having = [registry for registry in REGISTRIES if name in registry.names()]
    if len(having) == 1:
        return having[0]
    if having:
        kinds = " and ".join(registry.kind for registry in having)
        raise UsageError(f"'{name}' is the name of a {kinds}", f"Name the kind: fmg show {having[0].kind} {name}.")
    wanted = name.strip().lower().replace("_", "-")
    if wanted in {word for registry in REGISTRIES for word in (registry.kind, registry.plural)}:
        raise UsageError(f"'{name}' is a kind of component", f"Add a name; `fmg list {name}` prints them.")
    known = [known for registry in REGISTRIES for known in registry.names()]
    raise UsageError(f"There is no component named '{name}'", suggestion(name, known))
