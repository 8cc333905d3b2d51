"""Wrong uses: each ends with one clear line on stderr and an exit code, and nothing has been written."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from fmg.data.run_folder import RunFolder
from tests.support.cli import fmg

Prepare = Callable[[Path], object]


@dataclass(frozen=True)
class Misuse:
    """A command, a part of its error line, and what the working directory must contain."""

    command: str
    says: str
    prepare: Prepare = lambda folder: None

    def args(self) -> list[str]:
        """The words of the command; `''` is an empty word, `+` a blank inside one."""
        return ["" if word == "''" else word.replace("+", " ") for word in self.command.split(" ")]


def text(name: str, content: str) -> Prepare:
    return lambda folder: (folder / name).write_text(content, encoding="utf-8")


def binary(name: str, content: bytes) -> Prepare:
    return lambda folder: (folder / name).write_bytes(content)


def folder_with_a_file(folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "thesis.tex").write_text("mine")


def finished_run(folder: Path) -> None:
    run = RunFolder.create(folder / "taken", "meanflow-shapes")
    run.set_state("finished")
    # without it the run was killed before its end, and resuming it writes the report
    run.report.write_text("")


def interrupted_run(folder: Path) -> None:
    RunFolder.create(folder / "taken", "meanflow-shapes").set_state("interrupted")


def artifact_of_tomorrow(folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "manifest.json").write_text('{"schema": 99}')


def artifact_with_half_a_manifest(folder: Path) -> None:
    (folder / "taken").mkdir()
    (folder / "taken" / "manifest.json").write_text('{"schema": 1, "files": {}}')


def damaged_metrics(folder: Path) -> None:
    finished_run(folder)
    (folder / "taken" / "recipe.yaml").write_text("model: {name: meanflow-shapes}\n")
    (folder / "taken" / "metrics.jsonl").write_text(f'{{"iteration": 1{"0" * 400}}}\n')


def jsonl(value: str) -> Prepare:
    return text("p.jsonl", f'{{"prompt": "a red circle", "metadata": {{"x": {value}}}}}\n')


def picture(name: str, kind: str, *, side: int = 32, keep: int | None = None) -> Prepare:
    """A picture file of any format, or its first bytes."""

    def prepare(folder: Path) -> None:
        content = BytesIO()
        Image.effect_noise((side, side), 64).convert("RGB").save(content, kind)
        (folder / name).write_bytes(content.getvalue()[:keep])

    return prepare


def both(first: Prepare, second: Prepare) -> Prepare:
    return lambda folder: (first(folder), second(folder))


LONG = "x" * 300
SCORE = "score --reward jpeg-compressibility --prompt x"
EXPORT = "export meanflow-shapes"
BENCH = "bench meanflow-shapes"
GENERATE = "generate a+red+circle --from meanflow-shapes"

MISUSES = (
    # words
    Misuse("trian", "Did you mean 'train'"),
    Misuse("--verbose", "No such option: --verbose"),
    Misuse("train --stepz 3", "--steps"),
    Misuse("train now", "unexpected extra argument"),
    Misuse("train --lr", "--lr"),
    Misuse("list modelz", "'models'"),
    Misuse("show reward", "'reward' is a kind of component. Add a name"),
    # resuming a run
    Misuse("train --resume", "--resume"),
    Misuse("train --resume ''", "--resume is empty"),
    Misuse("train --resume nowhere", "'nowhere' is not a run folder"),
    Misuse("train --resume taken", "'taken' is not a run folder", folder_with_a_file),
    Misuse("train --resume taken", "The run 'taken' is finished", finished_run),
    Misuse("train --resume taken", "has no saved state to resume from", interrupted_run),
    Misuse("train --resume taken --lr 1e-3", "--lr would change it", interrupted_run),
    Misuse("train --resume taken --set lora.rank=4", "--set would change it", interrupted_run),
    Misuse("train --resume taken --run other", "--run would change it", interrupted_run),
    Misuse("train --resume taken --dry-run", "--dry-run would change it", interrupted_run),
    # what is trained
    Misuse("train --set train.trainable=everything", "'lora+duration'"),
    Misuse(
        "train --config r.yaml",
        "has no second-time embedder",
        text("r.yaml", "model: scm-shapes\ntrain: {trainable: lora+duration}\n"),
    ),
    Misuse("train --set train.ema_decay=1", "train.ema_decay"),
    Misuse("train --set train.state_every=0", "train.state_every"),
    Misuse("train --optimizer adamw8bit", "pip install bitsandbytes"),
    Misuse("show reward shapez", "'shapes'"),
    Misuse("runs notes.txt", "'notes.txt' is a file", text("notes.txt", "")),
    Misuse("pretrain shape", "Did you mean 'shapes'"),
    Misuse("pretrain texts", "Did you mean 'text'"),
    Misuse("runs nowhere", "no folder 'nowhere'"),
    Misuse("runs ''", "DIR is empty"),
    Misuse(f"runs {LONG}", "File name too long"),
    Misuse(f"runs {LONG * 300}", "(90,000 characters)': File name too long"),
    Misuse(f"train --lr {LONG * 300}", "--lr"),
    Misuse(f"--{LONG * 300}", "No such option"),
    Misuse("show reward a\nb\x1b[31m", r"'a\nb\x1b[31m'"),
    Misuse("train --offline=yes", "--offline"),
    Misuse(
        "eval sana-sprint --offline --device cpu --reward jpeg-compressibility",
        "Fetch it with `fmg fetch sana-sprint`",
    ),
    Misuse("train --model sana-sprint --stochasticizer asfmc", "asfmc"),
    Misuse("train --model sana-sprint --set model.resolution=100", "resolution"),
    # numbers
    Misuse("train --steps abc", "--steps"),
    Misuse("train --steps 0", "--steps"),
    Misuse("train --steps -1", "--steps"),
    Misuse("train --iterations 0", "--iterations"),
    Misuse("train --iterations 1.5", "--iterations"),
    Misuse("train --lr nan", "--lr"),
    Misuse("train --lr inf", "--lr"),
    Misuse("train --lr -1", "--lr"),
    Misuse("train --lr fast", "--lr"),
    Misuse("train --seed -1", "--seed"),
    Misuse("eval meanflow-shapes --num 0", "--num"),
    Misuse("eval meanflow-shapes --num many", "--num"),
    Misuse("eval meanflow-shapes --steps 1,two", "'two'"),
    Misuse("eval meanflow-shapes --steps 4,4", "twice"),
    Misuse("eval meanflow-shapes --batch-size 0", "--batch-size"),
    Misuse(f"{GENERATE} --num 0", "--num"),
    Misuse(f"{GENERATE} --steps 0", "--steps"),
    Misuse(f"{GENERATE} --seed -3", "--seed"),
    Misuse("pretrain shapes --seed -1", "--seed"),
    Misuse("pretrain text --seed -1", "--seed"),
    # names
    Misuse("train --model meanflow-shape", "Did you mean 'meanflow-shapes'"),
    Misuse("train --model meanflow-txt", "Did you mean 'meanflow-text'"),
    Misuse("train --model meanflow-text --prompts shapes-train", "quotes no text"),
    Misuse("train --model meanflow-text --reward shapes", "The shapes world cannot read the prompt"),
    Misuse("train --stochasticizer asfcm", "Did you mean 'asfmc'"),
    Misuse("train --objective grop", "Did you mean 'grpo'"),
    Misuse("train --optimizer adamx", "Did you mean 'adamw'"),
    Misuse("train --prompts shapes-trian", "Did you mean 'shapes-train'"),
    Misuse("train --device tpu", "tpu"),
    Misuse("train --device cuda:99", "cuda:99"),
    Misuse("train --dtype fp8", "fp8"),
    Misuse("eval nowhere", "neither a model nor a run folder"),
    Misuse("eval", "no run"),
    Misuse("eval meanflow-shapes --against nowhere", "'nowhere'"),
    Misuse("eval meanflow-shapes --grid unifrom", "Did you mean 'uniform'"),
    Misuse("eval meanflow-shapes --reward shapez", "Did you mean 'shapes'"),
    Misuse("eval meanflow-shapes --device tpu", "tpu"),
    Misuse("generate a+red+circle", "no run"),
    Misuse(f"{GENERATE} --dtype fp8", "fp8"),
    # rewards and prompts
    Misuse("train --reward shapez", "Did you mean 'shapes'"),
    Misuse("train --reward shapes=heavy", "'heavy'"),
    Misuse("train --reward shapes=nan", "'nan'"),
    Misuse("train --reward shapes=0", "weight 0"),
    Misuse("train --reward shapes --reward shapes", "shapes"),
    Misuse("train --reward python:no.such.module:fn", "no.such.module"),
    Misuse("train --reward python:json", "module:function"),
    Misuse("train --reward python:json:no_such_function", "no_such_function"),
    Misuse("train --prompts nowhere.txt", "nowhere.txt"),
    Misuse("train --prompts p.txt", "p.txt", text("p.txt", "")),
    Misuse("train --prompts p.txt", "p.txt:2", text("p.txt", "a red circle\n\na blue square\n")),
    Misuse("train --prompts p.txt", "p.txt:2", text("p.txt", "a red circle\n\u200b\ufeff\u2060\n")),
    Misuse("train --prompts p.txt", "p.txt:1", text("p.txt", "x" * 2_000_000)),
    Misuse("train --prompts p.txt", "characters", text("p.txt", "x" * 100_000)),
    Misuse("train --prompts p.jsonl", "p.jsonl:1: it is nested", jsonl("[" * 100_000 + "]" * 100_000)),
    Misuse("train --prompts p.jsonl", "p.jsonl:1: an integer has 5000 digits", jsonl("9" * 5000)),
    Misuse("train --prompts p.jsonl", "p.jsonl:1: the number 1e999", jsonl("1e999")),
    Misuse("train --prompts p.jsonl", "p.jsonl:1: NaN", jsonl("NaN")),
    Misuse("train --prompts p.jsonl", "unpaired surrogate", jsonl(r'"\ud83d"')),
    Misuse("train --prompts p.jsonl", "the key 'a' is given twice", jsonl('{"a": 1, "a": 2}')),
    Misuse(
        "train --prompts p.jsonl",
        "on line 1 with another tag",
        text("p.jsonl", '{"prompt": "a red circle"}\n{"prompt": "a red circle", "tag": "x"}\n'),
    ),
    Misuse("eval meanflow-shapes --prompts p.jsonl --reward geneval", "p.jsonl", binary("p.jsonl", b"\xff\xfe{")),
    Misuse("train --prompts p.txt", "a nice dog", text("p.txt", "a nice dog\n")),
    Misuse("eval meanflow-shapes --prompts p.jsonl", "p.jsonl:1", text("p.jsonl", '{"text": "a red circle"}\n')),
    Misuse("generate", "PROMPT"),
    Misuse("generate ''", "prompt is empty"),
    Misuse("generate \u200b\u2060", "prompt is empty"),
    Misuse("generate \udcff", "not UTF-8"),
    Misuse("train --dry-run --prompts nowhere.txt", "nowhere.txt"),
    Misuse("train --dry-run --prompts p.jsonl", "p.jsonl:1", text("p.jsonl", "{\n")),
    Misuse("train --dry-run --reward python:no.such.module:fn", "no.such.module"),
    Misuse("train --reward python:leave:fn", "SystemExit", text("leave.py", "raise SystemExit(0)\nfn = len\n")),
    # recipes
    Misuse("train --set lr", "PATH=VALUE"),
    Misuse("train --set optimizer.lrr=1", "'lr'"),
    Misuse("train --set lora.rank=zero", "lora.rank"),
    Misuse("train --set lora.rank=[", "--set lora.rank=["),
    Misuse("train --set trian.seed=1", "'train'"),
    Misuse("eval meanflow-shapes --resolution 64 --num 2", "have one size"),
    Misuse("train --config r.yaml", "no shipped recipe named 'scm-shape'", text("r.yaml", "extends: scm-shape\n")),
    Misuse("train --config nowhere.yaml", "nowhere.yaml"),
    Misuse("train --config meanflow-shape", "'meanflow-shapes'"),
    Misuse("train --config r.yaml", "r.yaml is empty", text("r.yaml", "")),
    Misuse("train --config r.yaml", "r.yaml:2", text("r.yaml", "train: {seed: 1}\nlora: {rank: [}\n")),
    Misuse("train --config r.yaml", "r.yaml:3", text("r.yaml", "lora:\n  rank: 4\n  rnak: 4\n")),
    Misuse("train --config r.yaml", "given twice", text("r.yaml", "lora: {rank: 4}\nlora: {rank: 8}\n")),
    Misuse("train --config r.yaml", "r.yaml:1: 'x' is not true or false", text("r.yaml", "train: {seed: !!bool x}")),
    Misuse("train --config r.yaml", "r.yaml:1: '' is not a whole number", text("r.yaml", 'train: {seed: !!int ""}')),
    Misuse("train --config r.yaml", "r.yaml:1: '' is not a number", text("r.yaml", 'optimizer: {lr: !!float ""}')),
    Misuse("train --config r.yaml", "r.yaml: values are nested too deeply", text("r.yaml", "train: " + "[" * 9999)),
    Misuse("train --config r.yaml", "unpaired surrogate", text("r.yaml", r'prompts: "\ud800.txt"')),
    Misuse("train --config r.yaml", "too many for a recipe", text("r.yaml", "#" * 300_000)),
    Misuse("train --config ~nobody-here/r.yaml", "~nobody-here/r.yaml"),
    Misuse("train --config r.yaml", "mapping", text("r.yaml", "- shapes\n")),
    Misuse("train --config r.yaml", "--allow-code", text("r.yaml", "rewards: ['python:json:loads']\n")),
    Misuse("train --config r.yaml", "UTF-8", binary("r.yaml", b"train: {seed: 1} # \xff\n")),
    Misuse("train --config .", "folder"),
    Misuse("train --model scm-shapes --stochasticizer asfmc", "asfmc"),
    Misuse("train --stochasticizer asfmc --set stochasticizer.gap=0.1 --set stochasticizer.ratio=0.5", "gap"),
    Misuse("train --steps 1", "steps"),
    Misuse("train --set rollout.group_size=1", "rollout.group_size"),
    Misuse("train --set rollout.groups=1000000000", "rollout.groups"),
    Misuse("train --steps 100000", "rollout.steps"),
    Misuse("train --set rollout.grid=[1,.nan,0.5,0.2,0]", "finite times"),
    Misuse("train --set lora.dropout=0.5", "lora.dropout"),
    Misuse("train --stochasticizer asfmc --set stochasticizer.ratio=0.9999999", "ratio"),
    Misuse("train --config r.yaml", "--allow-code", text("r.yaml", "rewards: {name: remote, url: 'http://h'}\n")),
    Misuse("train --config ''", "--config is empty"),
    Misuse(f"train --config {LONG}", "File name too long"),
    Misuse("train --model scm-shapes --set rollout.kind=chain --set rollout.window={size:+1}", "needs a two-time map"),
    Misuse("train --set rollout.kind=chain --set rollout.window={size:+9}", "does not fit"),
    Misuse("train --set rollout.window.mode=random", "rollout.window.size"),
    Misuse("train --set rollout.window={size:+1}", "belongs to chains"),
    Misuse("train --objective rwfm", "does not support branched rollouts"),
    Misuse("train --set rollout.kind=tree", "'chain' or 'branch'"),
    Misuse("train --set rollout.branch.floor=2", "less than or equal to 1"),
    Misuse("train --set rollout.branch.antithetic=true --set rollout.group_size=5", "in pairs"),
    Misuse("train --objective grpo-gaurd", "Did you mean 'grpo-guard'"),
    Misuse("train --set objective.reward_combination=mean", "'per-reward'"),
    Misuse("train --set objective.target_kl=0", "target_kl"),
    # folders
    Misuse("train --run ''", "--run is empty"),
    Misuse(f"train --run {LONG}", "File name too long"),
    Misuse("eval ''", "TARGET is empty"),
    Misuse(f"eval {LONG}", "File name too long"),
    Misuse(f"{GENERATE} --out ''", "--out is empty"),
    Misuse(f"{GENERATE} --num 100001", "--num"),
    Misuse("eval meanflow-shapes --num 1000001", "--num"),
    Misuse("train --run taken", "taken", folder_with_a_file),
    Misuse("train --run taken", "taken", finished_run),
    Misuse("train --run notes.txt", "notes.txt", text("notes.txt", "")),
    Misuse("eval taken", "taken", folder_with_a_file),
    Misuse("eval taken", "taken", finished_run),
    Misuse(f"{GENERATE} --out notes.txt", "'notes.txt' is a file", text("notes.txt", "")),
    Misuse("pretrain shapes --out notes.txt", "'notes.txt' is a file", text("notes.txt", "")),
    # exports
    Misuse("export nowhere", "neither a model nor a run folder"),
    Misuse("export", "no run"),
    Misuse("export ''", "TARGET is empty"),
    Misuse(f"{EXPORT} --precision fp4", "'fp4' is not a precision"),
    Misuse(f"{EXPORT} --precision stored", "'stored' is not a precision"),
    Misuse(f"{EXPORT} --precision bf16 --int8", "8-bit weights are for a CPU"),
    Misuse(f"{EXPORT} --verify fast", "'fast' is not a level"),
    Misuse(f"{EXPORT} --diffusers --verify quick", "--verify cannot be used with --diffusers"),
    Misuse(f"{EXPORT} --onnx --diffusers", "cannot be used together"),
    Misuse(f"{EXPORT} --diffusers --int8", "--int8 cannot be used with --diffusers"),
    Misuse(f"{EXPORT} --diffusers out", "has no adapter to merge"),
    Misuse(f"{EXPORT} --swap-weights taken --batch 1:1:1", "--batch cannot be used with --swap-weights"),
    Misuse(f"{EXPORT} --swap-weights taken", "is not an artifact", folder_with_a_file),
    Misuse(f"{EXPORT} --swap-weights ''", "--swap-weights is empty"),
    Misuse(f"{EXPORT} --swap-weights taken", "upgrade fmg", artifact_of_tomorrow),
    Misuse(f"{EXPORT} --resolutions 33", "not a multiple of 8"),
    Misuse(f"{EXPORT} --resolutions 32,big", "'big'"),
    Misuse(f"{EXPORT} --kohya --precision fp16", "--precision cannot be used with --kohya"),
    Misuse(f"{EXPORT} --kohya", "has no LoRA"),
    Misuse(f"{EXPORT} --batch 4", "is not three increasing numbers"),
    Misuse(f"{EXPORT} --batch 4:2:8", "is not three increasing numbers"),
    Misuse(f"{EXPORT} --batch 0:1:2", "'0'"),
    Misuse(f"{EXPORT} out --out other", "given twice"),
    Misuse(f"{EXPORT} --out taken", "taken exists already", folder_with_a_file),
    Misuse(f"{EXPORT} --out notes.txt", "'notes.txt' is a file", text("notes.txt", "")),
    Misuse(f"{EXPORT} --out ''", "--out is empty"),
    # artifacts
    Misuse("verify", "ARTIFACT"),
    Misuse("verify ''", "ARTIFACT is empty"),
    Misuse("verify nowhere", "nowhere"),
    Misuse("verify taken", "is not an artifact", folder_with_a_file),
    Misuse("verify taken", "upgrade fmg", artifact_of_tomorrow),
    Misuse("verify taken", "cannot be used", artifact_with_half_a_manifest),
    Misuse("verify taken --quick --full", "cannot be used together", artifact_of_tomorrow),
    Misuse("verify taken --alone --num 3", "--alone compares with nothing", artifact_of_tomorrow),
    Misuse("verify taken --against ''", "--against is empty", artifact_of_tomorrow),
    Misuse("verify taken --num 0", "--num", artifact_of_tomorrow),
    Misuse("generate x --from taken", "upgrade fmg", artifact_of_tomorrow),
    Misuse("generate x --from ''", "--from is empty"),
    Misuse(f"{GENERATE} --backend onyxruntime", "Did you mean 'onnxruntime'"),
    Misuse(f"{GENERATE} --backend onnxruntime", "runs exported artifacts"),
    Misuse(f"{GENERATE} --int8", "not an exported artifact"),
    Misuse(f"{GENERATE} --resolution 64", "not an exported artifact"),
    Misuse(f"{GENERATE} --threads 0", "--threads"),
    Misuse(f"{GENERATE} --release-text --time", "--release-text frees the text encoders, which --time needs again"),
    # timings
    Misuse("bench", "no run"),
    Misuse("bench nowhere", "neither a model nor a run folder"),
    Misuse("bench ''", "TARGET is empty"),
    Misuse("bench taken", "upgrade fmg", artifact_of_tomorrow),
    Misuse(f"{BENCH} meanflow-shapes", "named twice"),
    Misuse(f"{BENCH} --compare torch,onyxruntime", "Did you mean 'onnxruntime'"),
    Misuse(f"{BENCH} --compare torch,torch", "names a backend twice"),
    Misuse(f"{BENCH} --compare torch:int8", "does not support int8"),
    Misuse(f"{BENCH} --compare onnxruntime:int4", "'int4' is not an option"),
    Misuse(f"{BENCH} --compare torch,onnxruntime", "fmg export meanflow-shapes"),
    Misuse(f"{BENCH} --steps 1,2", "--frontier"),
    Misuse(f"{BENCH} --steps 0", "'0'"),
    Misuse(f"{BENCH} --repeats 0", "--repeats"),
    Misuse(f"{BENCH} --warmup -1", "--warmup"),
    Misuse(f"{BENCH} --batch-size 0", "--batch-size"),
    Misuse(f"{BENCH} --prompt ''", "--prompt is empty"),
    Misuse(f"{BENCH} --out f.png", "--frontier"),
    Misuse(f"{BENCH} --frontier --num 1", "--num"),
    Misuse(f"{BENCH} --frontier --out f.jpg", "Use one of .png, .svg, .pdf"),
    Misuse(f"{BENCH} --frontier --out taken.png", "exists already", binary("taken.png", b"mine")),
    Misuse(f"{BENCH} --frontier --out no/f.png", "there is no folder 'no'"),
    Misuse(f"{BENCH} scm-shapes --frontier", "takes one target"),
    # engines
    Misuse(f"{EXPORT} --flavour rtx", "--flavour is an option of TensorRT engines"),
    Misuse(f"{EXPORT} --refittable", "--refittable is an option of TensorRT engines"),
    Misuse(f"{EXPORT} --trt --flavour rtxx", "Did you mean 'rtx'"),
    Misuse(f"{EXPORT} --trt --hardware turing", "'turing' is unknown"),
    Misuse(f"{EXPORT} --trt --builder-level 6", "--builder-level"),
    Misuse(f"{EXPORT} --trt --workspace 0", "--workspace 0 is not a size"),
    Misuse(f"{EXPORT} --trt --workspace nan", "--workspace nan is not a size"),
    Misuse(f"{EXPORT} --trt --build-memory -1", "--build-memory -1 is not a size"),
    Misuse(f"{EXPORT} --trt --diffusers", "--trt cannot be used with --diffusers"),
    Misuse(f"{EXPORT} --trt --swap-weights taken", "--trt cannot be used with --swap-weights"),
    Misuse(f"{EXPORT} --trt --precision int8", "'int8' is not a precision"),
    Misuse("export taken --trt --flavour rtx", "upgrade fmg", artifact_of_tomorrow),
    Misuse(
        "export taken --trt --int8", "--int8 cannot be used with --trt for an existing artifact", artifact_of_tomorrow
    ),
    *(
        Misuse(f"export taken {options}", "'taken' is an exported artifact. Name the run", artifact_of_tomorrow)
        for options in (
            "out --int8",
            "--precision fp8",
            "out --fused --resolutions 8 --batch 1:1:1",
            "--diffusers",
            "out.safetensors --kohya",
            "--lora-scale 0.5 --trt",
        )
    ),
    Misuse("eval taken", "'taken' is an exported artifact", artifact_of_tomorrow),
    Misuse(f"{GENERATE} --allow-code", "'meanflow-shapes' is not an exported artifact"),
    Misuse(f"{GENERATE} --backend tensorrt-rtxx", "Did you mean 'tensorrt-rtx'"),
    Misuse(f"{GENERATE} --backend tensorrt", "Export it first"),
    # evaluation of sets, pictures, reports
    Misuse("list feature-extractor pixels", "unexpected extra argument"),
    Misuse("show feature-extractor pixel", "Did you mean 'pixels'"),
    Misuse("fetch feature-extractor clop", "Did you mean 'clip'"),
    Misuse("eval meanflow-shapes --features pixel", "Did you mean 'pixels'"),
    Misuse("eval meanflow-shapes --reference world", "--features"),
    Misuse("eval meanflow-shapes --features pixels --reference nowhere", "no folder 'nowhere'"),
    Misuse("eval meanflow-shapes --reference ''", "--reference is empty"),
    Misuse("eval meanflow-shapes --features clip --set clip.weights=nowhere.bin --reference world", "nowhere.bin"),
    Misuse("eval meanflow-shapes --features pixels --set pixels.side=0", "side"),
    Misuse("eval meanflow-shapes --set shape.score=strict", "Did you mean 'shapes'"),
    Misuse("eval meanflow-shapes --set shapes=strict", "NAME.OPTION=VALUE"),
    Misuse("eval meanflow-shapes --dump geneval", "--dump"),
    Misuse("eval meanflow-shapes --dump coco out", "no dump format 'coco'"),
    Misuse("eval meanflow-shapes --prompts shapes-hard --dump geneval out --num 999", "divided evenly"),
    Misuse("eval meanflow-shapes --dump geneval taken", "exists already", folder_with_a_file),
    Misuse("eval meanflow-shapes --report ''", "--report is empty"),
    Misuse("eval meanflow-shapes --report r.html", "exists already", text("r.html", "")),
    # the path of a model
    Misuse("eval meanflow-shapes --path-check ''", "--path-check is empty"),
    Misuse("eval meanflow-shapes --path-check path", "does not end in a figure format"),
    Misuse("eval meanflow-shapes --path-check nowhere/p.png", "no folder 'nowhere'"),
    Misuse("eval meanflow-shapes --path-check p.png", "p.png exists already", text("p.png", "")),
    Misuse("eval meanflow-shapes --path-check p.png", "p.json exists already", text("p.json", "")),
    Misuse("eval meanflow-shapes --path-check p.png --steps 2,4", "one number of steps"),
    Misuse("eval meanflow-shapes --path-check p.png --steps 1", "no interior time"),
    Misuse("eval meanflow-shapes --path-check p.png --against base", "--against cannot be used with --path-check"),
    Misuse("eval nowhere --path-check p.png", "neither a model nor a run folder"),
    # components and the doctor
    Misuse("check-component", "PATH|KIND"),
    Misuse("check-component ''", "PATH|KIND is empty"),
    Misuse("check-component warmth", "neither a kind with a name nor module:attribute"),
    Misuse("check-component rewardz shapes", "'rewards'"),
    Misuse("check-component reward shapez", "Did you mean 'shapes'"),
    Misuse("check-component reward shapes --set score=loud", "score"),
    Misuse("check-component reward shapes --set scor=soft", "score"),
    Misuse("check-component no.such.module:Thing", "cannot be imported"),
    Misuse("check-component fmg.flow:Gaussian", "is not registered"),
    Misuse("check-component backend torch", "no rules for a backend"),
    Misuse("doctor rewardz", "Did you mean 'rewards'"),
    Misuse("doctor --fast", "No such option: --fast"),
    Misuse("doctor --quick rewards", "--quick cannot be used with `doctor rewards`"),
    Misuse("doctor --json run taken", "Write `fmg doctor run ... --json`", finished_run),
    Misuse("doctor run", "RUN"),
    Misuse("doctor run ''", "RUN is empty"),
    Misuse("doctor run nowhere", "'nowhere'"),
    Misuse("doctor run taken", "has no lines yet", finished_run),
    Misuse("train --stop-on-hacking=yes", "--stop-on-hacking"),
    Misuse("train --resume taken --stop-on-hacking", "--stop-on-hacking would change it", interrupted_run),
    Misuse("train --set eval.hacking_tolerance=-1", "eval.hacking_tolerance"),
    Misuse("train --set eval.min_diversity=1", "eval.min_diversity"),
    Misuse("score", "PATH"),
    Misuse("score nowhere.png --reward shapes", "no image or folder 'nowhere.png'"),
    Misuse("score . --reward shapes", "contains no images"),
    Misuse("score notes.png --reward jpeg-compressibility --prompt x", "not an image file", text("notes.png", "no")),
    Misuse("score notes.png --reward jpeg-compressibility", "There is no prompt for", text("notes.png", "no")),
    Misuse(f"{SCORE} a.png", "not an image file", picture("a.png", "DDS")),
    Misuse(f"{SCORE} a.png", "'a.png'", picture("a.png", "AVIF", keep=300)),
    Misuse(f"{SCORE} a.png", "cannot be decoded", picture("a.png", "PNG", keep=60)),
    Misuse(f"{SCORE} a.png", "more than 33,554,432 pixels", picture("a.png", "PNG", side=5800)),
    Misuse(f"{SCORE} .", "a.png' is a broken link", lambda folder: (folder / "a.png").symlink_to("gone.png")),
    Misuse(
        "score . --reward jpeg-compressibility",
        "not a path within",
        both(picture("a.png", "PNG"), text("metadata.jsonl", '\ufeff{"file_name": "../a.png", "prompt": "x"}\n')),
    ),
    Misuse(
        "score . --reward jpeg-compressibility",
        "metadata.jsonl:1",
        both(picture("a.png", "PNG"), text("metadata.jsonl", "[" * 100_000)),
    ),
    Misuse("score notes.png", "nothing to measure", text("notes.png", "no")),
    Misuse("report", "no run under 'runs'"),
    Misuse("report nowhere", "not a run folder"),
    Misuse("report taken taken", "named twice", finished_run),
    Misuse("report taken --out r.html", "exists already", text("r.html", "")),
    Misuse("report ''", "RUN is empty"),
    Misuse("report taken", "metrics.jsonl:1: the line is damaged: an integer has 401 digits", damaged_metrics),
    Misuse("doctor run taken", "metrics.jsonl:1: the line is damaged: an integer has 401 digits", damaged_metrics),
    Misuse("pretrain text --out notes.txt", "'notes.txt' is a file", text("notes.txt", "")),
    Misuse("pretrain text --out ''", "--out"),
)


def contents(folder: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_there_are_at_least_forty() -> None:
    assert len(MISUSES) >= 40


@pytest.mark.parametrize("misuse", MISUSES, ids=lambda misuse: misuse.command)
def test_a_wrong_use_is_one_clear_line(misuse: Misuse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # it may well be installed here
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    misuse.prepare(tmp_path)
    before = contents(tmp_path)
    done = fmg(*misuse.args())
    assert done.code in (1, 2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert misuse.says in done.stderr
    assert len(done.stderr) < 3000
    assert contents(tmp_path) == before
