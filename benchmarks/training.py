"""A training step on one GPU: how exact its operations are, how fast against floor and peers, and all of it together.

    python benchmarks/training.py [--only losses,experts,...]

Needs what attention.py needs. Parts, each with the ceilings measured as the command starts:

    accuracy    router, experts, hyper-connections, losses, Muon against float64, values and gradients, with bounds
    losses      log-probs and divergences over a vocabulary of 129,280, forward and backward, beside torch's and others'
    experts     grouped products with SwiGLU, forward and backward, beside torch._grouped_mm and Liger
    hyper       hyper-connections at V4-Flash's width against the bytes they move, forward and backward
    muon        Newton-Schulz on 256 matrices of 2048 x 4096
    step        a whole step of a model of 729 million parameters, beside transformers', and where its time goes
    layer       a layer at V4-Flash's width with 32 experts, forward and backward, beside transformers'
    waits       whether forward, backward or update wait for the device
    bits        gradients in 5 runs; the model's forward in training, prefill and decoding
    curves      losses of 200 steps, with the kernels and with their definition, at three precisions

Liger and cut-cross-entropy run where liger_kernel and cut_cross_entropy are installed. The result is one file
(parts.py). Exit code 1 if a part failed or a goal was missed.
"""

import sys
from collections.abc import Callable

import parts
import training_accuracy
import training_kernels
import training_layer
import training_losses
import training_step
import training_whole
from parts import Rows
from training_setting import Setting, whole

PARTS: dict[str, Callable[[Setting], Rows]] = {
    "accuracy": training_accuracy.accuracy,
    "losses": training_losses.losses,
    "experts": training_kernels.experts,
    "hyper": training_kernels.hyper,
    "muon": training_kernels.muon,
    "step": training_step.step,
    "layer": training_layer.layer,
    "waits": training_whole.waits,
    "bits": training_whole.same_bits,
    "curves": training_whole.curves,
}


def main() -> int:
    _, names = parts.asked(parts.parser_of(__doc__, PARTS), PARTS)
    return parts.run("training", PARTS, names, whole)


if __name__ == "__main__":
    sys.exit(main())
