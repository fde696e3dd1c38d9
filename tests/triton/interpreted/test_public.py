"""The Triton kernels through the public functions, against the NumPy oracle."""

import pytest
import torch
from hypothesis import given, settings

import flexmsa
from flexmsa.testing import oracle
from flexmsa.testing.strategies import cases

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@settings(max_examples=12, derandomize=True, deadline=None, database=None)
@given(
    case=cases(dtypes=("float32", "float16"), head_dims=(16, 80), block_sizes=(16, 48), max_tokens=120, warmup=False)
)
def test_selection_agrees_with_the_oracle(case):
    inputs, arguments = case.inputs("cpu")
    expected = oracle.attention(*(x.double().numpy() for x in inputs), **arguments)
    found = flexmsa.select_blocks(*inputs[3:], **arguments, backend="triton")
    assert torch.equal(found.long(), torch.from_numpy(expected.block_indices))


def test_decode_agrees_with_the_cpu_kernels():
    generator = torch.Generator().manual_seed(0)
    cache = flexmsa.MSACache(2, 2, 16, 16, capacity=90, kv_starts=torch.tensor([0, 7]))
    cache.append(*(torch.randn(2, h, 75, 16, generator=generator) for h in (2, 2, 1)))
    q, index_q = (torch.randn(2, h, 3, 16, generator=generator) for h in (6, 2))
    aux = flexmsa.AuxRequest(lse=True, block_indices=True)
    found, expected = (
        flexmsa.decode(q, cache, index_q, block_size=16, topk=3, backend=backend, return_aux=aux)
        for backend in ("triton", "cpu")
    )
    assert torch.equal(found[1].block_indices, expected[1].block_indices)
    torch.testing.assert_close((found[0], found[1].lse), (expected[0], expected[1].lse))
