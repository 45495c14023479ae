"""The base of every settings class, and the settings that the model itself takes. No torch is imported."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """Base of every settings class: frozen, no unknown keys, and no silent conversions ("5" is not 5)."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Precision(Settings):
    """What learners, rollout workers, teachers and evaluations compute in, all alike.

    DeepSeek-V4's quantization-aware training is `{experts: fp4, indexer: fp4}` (paper 5.2.1); its inference code also
    has `linear: fp8` and `kv: fp8`. Learners and checkpoints keep the weights in full, and gradients pass straight
    through; models that only run forward hold the codes alone.
    """

    compute: Literal["auto", "bfloat16", "float32"] = "auto"
    """The model's weights, but for what V4 keeps in fp32; auto: bfloat16 on a GPU, float32 on a CPU. The learner's
    optimizer has fp32 masters of them, which its saved state holds; checkpoints hold the weights."""
    experts: Literal["full", "fp8", "fp4"] = "full"
    """Weights of the routed experts: FP8 with a scale for each 128 x 128, or FP4 with a scale for each 32 columns.
    Either way they multiply FP8, with a scale for each token and 128 channels."""
    linear: Literal["full", "fp8"] = "full"
    """The products of attention, the shared expert and the MTP block's entry: as `experts: fp8`. Attention's grouped
    product multiplies what it gets, in full, as DeepSeek's code does."""
    indexer: Literal["full", "fp4"] = "full"
    """The indexer's queries and keys, rotated by a Hadamard matrix, then FP4; its scores are bf16 before the top-k."""
    kv: Literal["full", "fp8"] = "full"
    """Attention's rows, but for their rotary channels, FP8 with a scale for each 64."""

    def dtype(self, device: str) -> Literal["bfloat16", "float32"]:
        """torch's name of what is computed in on a device such as "cuda" or "cpu"."""
        if self.compute != "auto":
            return self.compute
        return "bfloat16" if device.startswith("cuda") else "float32"

    @property
    def rounds(self) -> bool:
        """Whether values take part as low precision stores them."""
        return {self.experts, self.indexer, self.kv} != {"full"}


FULL = Precision()
