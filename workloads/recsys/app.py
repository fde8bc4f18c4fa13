"""Two-tier recommender: CPU ingress replicas make feature vectors, one ranker replica scores them in batches.

The ingress synthesises a candidate set a request, which stands for the feature store; the ranker runs DLRM
on a GPU where the cluster gives it one, else on the CPU.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle

from workloads.recsys.model import DLRM, NUM_DENSE, NUM_SPARSE

api = FastAPI()


@serve.deployment
class Ranker:
    def __init__(self, model: Mapping[str, Any], max_batch_size: int, batch_wait_timeout_s: float) -> None:
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        self._model = DLRM(**model).to(self._device).eval()
        self.rank.set_max_batch_size(max_batch_size)
        self.rank.set_batch_wait_timeout_s(batch_wait_timeout_s)

    @serve.batch
    async def rank(self, requests: list[tuple[np.ndarray, np.ndarray]]) -> list[list[float]]:
        """Scores every candidate of every request of the batch in one forward pass."""
        dense = torch.from_numpy(np.concatenate([dense for dense, _ in requests])).to(self._device)
        sparse = torch.from_numpy(np.concatenate([sparse for _, sparse in requests])).to(self._device)
        with torch.inference_mode():
            scores = self._model(dense, sparse).cpu().numpy()
        ends = np.cumsum([len(dense) for dense, _ in requests])[:-1]
        return [part.tolist() for part in np.split(scores, ends)]


@serve.deployment
@serve.ingress(api)
class Ingress:
    def __init__(self, ranker: DeploymentHandle, num_candidates: int, cardinality: int) -> None:
        self._ranker = ranker
        self._num_candidates = num_candidates
        self._cardinality = cardinality
        self._rng = np.random.default_rng(0)

    @api.get("/rank")
    async def rank(self) -> dict[str, list[float]]:
        dense = self._rng.random((self._num_candidates, NUM_DENSE), dtype=np.float32)
        sparse = self._rng.integers(0, self._cardinality, (self._num_candidates, NUM_SPARSE))
        return {"scores": await self._ranker.rank.remote((dense, sparse))}


def build(args: Mapping[str, Any]) -> Application:
    """`model` (DLRM's arguments), `num_candidates` (rows a request), `max_batch_size` (requests) and its wait."""
    ranker = Ranker.bind(args["model"], int(args["max_batch_size"]), float(args["batch_wait_timeout_s"]))
    return Ingress.bind(ranker, int(args["num_candidates"]), int(args["model"]["cardinality"]))
