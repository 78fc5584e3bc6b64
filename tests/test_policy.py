"""Models whose logits are not hidden states times one matrix: the token KL of such a one would be wrong."""

from __future__ import annotations

import pytest
import torch

from sgpo_lib import policy as module
from sgpo_lib import tiny
from sgpo_lib.policy import Policy


class Scaled(torch.nn.Linear):
    """Logits that are scaled, as Cohere's are, with a matrix as everywhere."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(input)


def with_head(head: torch.nn.Module) -> Policy:
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, 1)
    model.set_output_embeddings(head)
    return Policy(model, tokenizer, torch.device("cpu"), False, 512)


@pytest.mark.parametrize(("make", "message"), [
    (Scaled, "logits are not hidden states times the output matrix"),
    (lambda *sizes, bias: torch.nn.Sequential(torch.nn.Linear(*sizes, bias=bias), torch.nn.Tanh()),
     r"output layer of Qwen3ForCausalLM is a Sequential, expected a linear layer.*Use another base")])
def test_a_head_that_is_not_linear_is_refused(make, message):
    model = tiny.build_model(tiny.build_tokenizer(), 1)
    matrix = model.get_output_embeddings().weight
    with pytest.raises(ValueError, match=message):
        module._check_head(with_head(make(matrix.shape[1], matrix.shape[0], bias=False)))


def test_a_linear_head_is_taken():
    model = tiny.build_model(tiny.build_tokenizer(), 1)
    matrix = model.get_output_embeddings().weight
    module._check_head(with_head(torch.nn.Linear(matrix.shape[1], matrix.shape[0], bias=True)))
