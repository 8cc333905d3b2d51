"""Writes, reads and samples a model in a diffusers-style pipeline folder, with its flow-map facts and its card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from jaxtyping import Float
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from fmg.models.conventions import FlowMapConventions, read_conventions
from fmg.models.flux.pipeline_files import write_pipeline_files
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from pretraining.flow import ConditionalNet
from pretraining.networks import PromptTable, TextEncoders, Tokenizers, decode
from pretraining.settings import DistillSettings, PretrainSettings
from pretraining.world import World


@dataclass(frozen=True)
class Model:
    """Everything that turns prompts into images."""

    net: ConditionalNet
    autoencoder: AutoencoderTiny
    tokenizers: Tokenizers
    resolution: int

    @property
    def parameters(self) -> int:
        """Number of parameters of all components."""
        modules = (self.net.transformer, self.net.encoders, self.autoencoder)
        return sum(p.numel() for module in modules for p in module.parameters())


def save_model(model: Model, folder: Path) -> None:
    """Write all components with fp16 weights and the flow-map facts; `model` itself is left in fp32."""
    folder.mkdir(parents=True, exist_ok=True)
    transformer = model.net.transformer
    weights = {
        "transformer": transformer,
        "text_encoder": model.net.encoders.clip,
        "text_encoder_2": model.net.encoders.t5,
        "vae": model.autoencoder,
    }
    for name, component in weights.items():
        component.half().save_pretrained(folder / name)
        component.float()
    for name in ("vae", "transformer"):
        _clean_config(folder / name / "config.json")
    model.tokenizers.clip.save_pretrained(folder / "tokenizer")
    model.tokenizers.t5.save_pretrained(folder / "tokenizer_2")
    second_time = transformer.config.second_time
    conventions = FlowMapConventions(
        schema=1,
        map="single-time" if second_time == "none" else "two-time",
        path="linear",
        time_scale=transformer.config.time_scale,
        second_time=second_time,
        resolution=model.resolution,
        max_sequence_length=model.tokenizers.t5.model_max_length,
        default_steps=4,
        default_grid="uniform",
    )
    write_pipeline_files(folder, conventions)


def load_model(folder: Path) -> Model:
    """Read a folder of `save_model` back, in fp32."""
    resolution = read_conventions(folder).resolution
    tokenizers = Tokenizers(
        CLIPTokenizer.from_pretrained(folder / "tokenizer"), T5Tokenizer.from_pretrained(folder / "tokenizer_2")
    )
    encoders = TextEncoders(
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        T5EncoderModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
    )
    transformer = FlowMapFluxTransformer2DModel.from_pretrained(folder / "transformer", torch_dtype=torch.float32)
    autoencoder = AutoencoderTiny.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    net = ConditionalNet(transformer, encoders, resolution, tokenizers.t5.model_max_length).eval()
    return Model(net, autoencoder.eval().to(memory_format=torch.channels_last), tokenizers, resolution)


@dataclass(frozen=True)
class CardFacts:
    """Contents of a model card beyond the settings: how the map was made, and its figures by number of steps."""

    title: str
    method: str
    seed: int
    distillation: DistillSettings
    parameters: int
    figures: Mapping[int, Mapping[str, float]]


def write_card(folder: Path, world: World, facts: CardFacts, settings: PretrainSettings) -> None:
    """Write the model card."""
    figures = facts.figures
    names = list(next(iter(figures.values())))
    header = f"| steps | {' | '.join(names)} |\n|---|{'---|' * len(names)}"
    rows = [f"| {n} | {' | '.join(f'{v:.3f}' for v in f.values())} |" for n, f in figures.items()]
    flow = settings.flow
    text = _CARD.format(
        title=facts.title,
        world=world.name,
        **asdict(world.card),
        method=facts.method,
        seed=facts.seed,
        parameters=facts.parameters / 1e6,
        teacher=_EXACT if flow is None else _TRAINED.format(**asdict(flow)),
        distill=facts.distillation.steps,
        distill_batch=facts.distillation.batch,
        images=settings.evaluation_images,
        table="\n".join([header, *rows]),
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _clean_config(path: Path) -> None:
    """Remove what diffusers adds: an entry that `AutoencoderTiny` sets itself (and warns about at every load), and the
    folder that the weights were last read from."""
    config = json.loads(path.read_text(encoding="utf-8"))
    _write_json(path, {k: v for k, v in config.items() if k not in ("block_out_channels", "_name_or_path")})


def _write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


_CARD = """---
license: apache-2.0
pipeline_tag: text-to-image
---
# {title}

{summary}

{method}

The components are stock classes in the layout of a FLUX pipeline (autoencoder with factor 4 and 4 channels, pooled
CLIP, T5 token states, FLUX transformer), {parameters:.2f} million parameters in all, stored in fp16.
`fmg_flow_map.json` states the map kind, the time convention and the sampling. In diffusers, with the Python package
`flow-map-grpo` (imported as `fmg`):

```python
from fmg import FlowMapPipeline

pipe = FlowMapPipeline.from_pretrained("FOLDER")  # this one
pipe('{example}', seeds=0).images[0].save("image.png")
```

{disobeys}

Training: `fmg pretrain {world} --seed {seed}` trains the weights from scratch on a CPU: autoencoder, {teacher},
solved teacher trajectories, distillation ({distill} steps of {distill_batch}).

## Figures

Held-out prompts, {images} images, uniform grid, after the fp16 round trip. {figures}

{table}

Licence: Apache-2.0. Training data: generated procedurally by this project.
"""
_TRAINED = """flow matching
(the first {steps} steps of a {schedule_steps}-step cosine schedule, batches of {batch}, Muon and AdamW, averaged
weights)"""
_EXACT = """the flow of
all possible images and their captions, which is known in closed form"""


@torch.no_grad()
def sample(
    net: ConditionalNet, condition: tuple[Tensor, Tensor], steps: int, generator: torch.Generator
) -> Float[Tensor, "b tokens channels"]:
    """Deterministic flow-map sampling on the uniform grid, or multistep consistency sampling of a single-time map."""
    count = len(condition[0])
    single_time = net.transformer.config.second_time == "none"
    x = net.noise(count, generator)
    for k in range(steps, 0, -1):
        t, s = torch.full((count,), k / steps), torch.full((count,), (k - 1) / steps)
        if single_time:
            clean = x - k / steps * net(x, t, None, condition)
            x = torch.lerp(clean, torch.randn(x.shape, generator=generator), (k - 1) / steps)
        else:
            x = x - net(x, t, s, condition) / steps
    return x


@torch.no_grad()
def sample_images(
    net: ConditionalNet,
    autoencoder: AutoencoderTiny,
    tokenizers: Tokenizers,
    prompts: Sequence[str],
    steps: int,
    seed: int,
) -> Float[Tensor, "b 3 h w"]:
    """Images in [0, 1] for prompts."""
    table = PromptTable.of(prompts, tokenizers)
    generator = torch.Generator().manual_seed(seed)
    images = []
    for rows in torch.split(table.index(prompts), 500):
        images.append(decode(autoencoder, sample(net, net.encode(table, rows), steps, generator)))
    return torch.cat(images)
