"""`fmg train`, `fmg eval` and `fmg generate` as Python calls, on the embedded model.

Run it with `python examples/train_in_python.py [ITERATIONS]`; 60 iterations take a few minutes on two cores.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fmg import Recipe, evaluate, load, train
from fmg.core.events import Evaluated, Event, IterationDone
from fmg.data.pictures import to_pil


def show(event: Event) -> None:
    if isinstance(event, IterationDone):
        print(f"iteration {event.iteration}: reward {event.metrics['reward/mean']:.3f}")
    elif isinstance(event, Evaluated):
        print(f"held-out strict accuracy: {event.metrics['eval/shapes_strict_mean']:.3f}")


def main(iterations: int = 60, num: int = 1000) -> Path:
    recipe = Recipe.default(
        model="meanflow-shapes",
        **{"train.iterations": iterations, "eval.every": max(1, iterations // 3), "eval.num": num},
    )
    result = train(recipe, observer=show)

    report = evaluate(result.run.path, against="base", num=num)
    for row in report.differences:
        if row.reward == "shapes" and row.part == "strict":
            low, high = row.ci95
            print(f"strict accuracy: {row.mean:+.3f} (95 % interval {low:+.3f} to {high:+.3f})")

    generated = load(result.run.path).generate(["a red circle on the left"], seeds=[0])
    picture = result.run.path / "red_circle.png"
    to_pil(generated.images[0]).save(picture)
    print(f"one image in {generated.timings_ms['total']:.0f} ms: {picture}")
    return result.run.path


if __name__ == "__main__":
    main(*(int(argument) for argument in sys.argv[1:]))
