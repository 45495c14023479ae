"""A model's tensors, each once."""

from torch import Tensor, nn


def distinct(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without second names: of tied tensors (an embedding that is the head too) the first name stays."""
    found: dict[str, Tensor] = {}
    seen = set()
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape, tensor.dtype)
        if tensor.numel() == 0 or place not in seen:
            found[name] = tensor
            seen.add(place)
    return found
