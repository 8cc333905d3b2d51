"""OCR post-training of the embedded text model with chains: three seeds against shuffled advantages, on held-out words.

`default` is the recipe (ocr-logp and the world's own text-fidelity, advantages per reward); `jpeg` takes the JPEG size
for fidelity; `logp-only` has no second reward; `shuffled` is the recipe with the advantages of a rollout permuted.
Needs flow-map-grpo[ocr]. Finished arms are read from the result file, so it can be interrupted.

    python benchmarks/text.py [--arms default,shuffled] [--seeds 0,1,2] [--jobs 1] [--num 800]
"""

from __future__ import annotations

from embedded import Arm, Study, asfmc, chain, main, settings

TEXT = "meanflow-text"
JPEG = ("--reward", "ocr-logp=0.8", "--reward", "jpeg-incompressibility=0.2")
CHAIN = chain(*asfmc("ratio", 0.9), every=20)
STUDY = Study(
    "text",
    {
        "default": Arm(TEXT, CHAIN, "ocr-logp and text-fidelity"),
        "shuffled": Arm(
            TEXT, (*CHAIN, *settings(train__shuffle_advantages="true")), "the default with shuffled advantages"
        ),
        "jpeg": Arm(TEXT, (*CHAIN, *JPEG), "ocr-logp and jpeg-incompressibility"),
        "logp-only": Arm(TEXT, (*CHAIN, "--reward", "ocr-logp"), "ocr-logp alone"),
    },
    "4",
    (("ocr-logp", "exact"), ("ocr-logp", "probability"), ("text-fidelity", "total")),
    num=800,
)

if __name__ == "__main__":
    main(STUDY, __doc__)
