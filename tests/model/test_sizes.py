"""Published sizes: parameters of the presets."""

import pytest

from amalgam.model import DeepseekV4
from amalgam.model.config import config_of
from amalgam.model.sizes import parameter_counts

from .. import tiny


@pytest.mark.parametrize(
    ("name", "main", "active", "mtp"), [("flash", "284.33", "13.3", "6.61"), ("pro", "1573.0", "48.85", "25.8")]
)
def test_parameters_of_the_presets(name: str, main: str, active: str, mtp: str):
    counts = parameter_counts(config_of(name))
    for count, published in ((counts.main, main), (counts.active, active), (counts.mtp, mtp)):
        assert f"{count / 1e9:.{len(published.partition('.')[2])}f}" == published
    assert parameter_counts(config_of(f"{name}-base")) == counts


def test_a_count_is_what_a_real_model_holds():
    model = DeepseekV4(tiny.config())
    total = sum(p.numel() for p in model.parameters())
    experts = sum(p.numel() for name, p in model.named_parameters() if ".mlp.experts." in name)
    counts = parameter_counts(tiny.config())
    assert (counts.main, counts.mtp) == (total, 0)
    assert counts.active == total - model.model.embed_tokens.weight.numel() - experts // 2  # 2 of 4 experts
