"""minibupo_hf/adapter.py: other people's models, files and texts. Each is read right, or refused.

All models are tiny and random. Nothing is downloaded.
"""

# ruff: noqa: E402 - imports come after the check that the extra is there

import pytest
import torch

pytest.importorskip("trl", reason='trl is not installed: pip install -e ".[hf]"')

from minibupo_hf.adapter import check_for_trl, remove_dropout
from tests.test_hf import OPEN, build

# ---- models that TRL can train -------------------------------------------------------------------

DEEP = {family: OPEN[family] for family in ("Llama", "Phi3", "Olmo2", "Qwen3", "Gemma", "Qwen3Moe")}


@pytest.mark.parametrize("family", DEEP)
def test_rounding_is_not_taken_for_missing_positions(family):
    """24 layers in bfloat16, in which rounding adds up."""
    check_for_trl(build(family, **(DEEP[family] | dict(num_hidden_layers=24))).bfloat16())


def test_missing_positions_are_found_in_bfloat16():
    lm = build("GPT2", n_layer=24, n_head=4, n_embd=32).bfloat16()
    remove_dropout(lm)
    with pytest.raises(ValueError, match="padding on the left changes its logits"):
        check_for_trl(lm)
