"""DLRM, the recommender the study serves (Naumov et al. 2019, arXiv:1906.00091), with random weights.

Serving cost depends on the shapes and not on the weights, so nothing is trained or downloaded.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import nn

NUM_DENSE = 13  # the Criteo click logs' integer features
NUM_SPARSE = 26  # and their categorical ones


def _mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size_in, size_out in itertools.pairwise(sizes):
        layers += [nn.Linear(size_in, size_out), nn.ReLU()]
    return nn.Sequential(*layers)


class DLRM(nn.Module):
    """Dense features [rows, 13] float and sparse ids [rows, 26] int64 -> click probabilities [rows].

    `bottom_mlp` must end in `embedding_dim`: the dot interaction multiplies its output with the embeddings.
    """

    offsets: torch.Tensor  # [26]: where each feature's rows begin
    pairs: torch.Tensor  # [2, 351]: the lower triangle of the interaction matrix

    def __init__(self, embedding_dim: int, cardinality: int, bottom_mlp: Sequence[int], top_mlp: Sequence[int]) -> None:
        super().__init__()
        if bottom_mlp[-1] != embedding_dim:
            raise ValueError(f"bottom_mlp must end in embedding_dim: got {list(bottom_mlp)} and {embedding_dim}")
        # One table with an offset a feature looks up the same rows as 26 tables would, in one kernel.
        self.embedding = nn.Embedding(NUM_SPARSE * cardinality, embedding_dim)
        self.register_buffer("offsets", torch.arange(NUM_SPARSE) * cardinality)
        self.bottom = _mlp([NUM_DENSE, *bottom_mlp])
        num_vectors = NUM_SPARSE + 1
        self.register_buffer("pairs", torch.tril_indices(num_vectors, num_vectors, offset=-1))
        self.top = nn.Sequential(_mlp([embedding_dim + self.pairs.shape[1], *top_mlp]), nn.Linear(top_mlp[-1], 1))

    def forward(self, dense: torch.Tensor, sparse: torch.Tensor) -> torch.Tensor:
        bottom = self.bottom(dense)
        vectors = torch.cat([bottom.unsqueeze(1), self.embedding(sparse + self.offsets)], dim=1)
        products = torch.bmm(vectors, vectors.transpose(1, 2))
        interactions = products[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([bottom, interactions], dim=1))).squeeze(1)
