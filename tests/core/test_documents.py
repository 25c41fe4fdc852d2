"""Documents of packed rows, and which models read them."""

import pytest
import torch
from torch import nn

from tokenyard import PADDING, Model, MoE, Workload, pack_documents, why_no_documents

IDS = torch.tensor([[0, 0, 0, 1, PADDING], [4, 2, 2, 2, 2]])


def test_documents_of_ids():
    documents = pack_documents(IDS)
    assert documents.positions.tolist() == [[0, 1, 2, 0, 0], [0, 0, 1, 2, 3]]
    assert documents.offsets.tolist() == [0, 3, 4, 5, 6, 10]
    assert documents.longest == 4
    assert documents.padding.tolist() == [[False] * 4 + [True], [False] * 5]


def test_equal_numbers_in_two_rows_are_two_documents():
    assert pack_documents(torch.zeros(2, 3, dtype=torch.int64)).offsets.tolist() == [0, 3, 6]


def test_given_counts_make_shapes_static():
    documents = pack_documents(IDS, count=8, longest=5)
    assert documents.offsets.tolist() == [0, 3, 4, 5, 6, 10, 10, 10, 10]
    assert documents.longest == 5


def test_too_small_a_count_is_refused():
    with pytest.raises(ValueError, match="count is 4, and there are 5 documents"):
        pack_documents(IDS, count=4)


class Old(nn.Module):
    """A model as it was before packed documents."""

    def forward(self, ids, cache=None, targets=None): ...


class New(Model):
    """A model that reads documents, with a layer of experts."""

    def __init__(self, router: type[nn.Module] | None = None):
        super().__init__()
        self.moe = MoE(Workload(8, 8, 4, 2))
        if router is not None:
            self.moe.router = router()

    def forward(self, ids, cache=None, targets=None, documents=None): ...
    def new_cache(self, batch, length): ...
    def init_weights(self, seed): ...
    def flops_per_token(self, seq_len): ...
    def saved_bytes_per_token(self, seq_len, width): ...


class OldRouter(nn.Module):
    """A router as it was before packed documents."""

    def forward(self, x, topk_ids=None): ...


def test_who_reads_documents():
    assert why_no_documents(New()) is None
    assert "Old does not read packed documents" in why_no_documents(Old())
    reason = why_no_documents(New(OldRouter))
    assert "OldRouter does not leave padding out: its method forward lacks" in reason


def test_padding_reaches_no_expert():
    moe = MoE(Workload(8, 8, 4, 2))
    x = torch.randn(2, 5, 8)
    padding = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    y, routing = moe(x, padding=padding)
    assert not y[padding].any()
    assert torch.equal(y[~padding], moe(x[~padding])[0])
    assert (routing.topk_ids[padding.flatten()] == 4).all()
