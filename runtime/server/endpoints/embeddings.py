"""`POST /v1/embeddings`: a vector for each text, pooled as the embed command does."""

import base64

import numpy as np
from numpy.typing import NDArray
from starlette.requests import Request
from starlette.responses import Response

from runtime.decoding.pooling import pooled
from runtime.server.answers.given_texts import separate_texts
from runtime.server.answers.whole_texts import encoded, opened_head
from runtime.server.api.heads import MOST_TEXTS, Embedding, EmbeddingRequest, EmbeddingResponse, TextUsage
from runtime.server.http.bodies import json_answer
from runtime.server.http.event_stream import unless_client_leaves
from runtime.server.http.failures import refused
from runtime.server.service import Service


async def answer(service: Service, request: Request, asked: EmbeddingRequest) -> Response:
    """Answer a request; raises `RequestFailure` for one that cannot be answered."""
    return json_answer(await unless_client_leaves(request, _embed(service, asked)))


async def _embed(service: Service, asked: EmbeddingRequest) -> EmbeddingResponse:
    opened = opened_head(service.model(asked.model), ("embedding",))
    config = opened.model
    if asked.dimensions not in (None, config.dim):
        raise refused(
            f"dimensions is {asked.dimensions}, expected {config.dim}, which this model's vectors have; leave it out",
            param="dimensions",
        )
    rows = await encoded(service, opened, separate_texts(asked.input, MOST_TEXTS, "input"))
    outputs = await service.heads.outputs(opened.engine, rows)
    vectors = [pooled(states, config.pool, normalize=config.normalize) for states in outputs]
    data = [Embedding(index, _shown(vector, asked)) for index, vector in enumerate(vectors)]
    tokens = sum(map(len, rows))
    return EmbeddingResponse(data=data, model=service.name, usage=TextUsage(tokens, tokens))


def _shown(vector: NDArray[np.float32], asked: EmbeddingRequest) -> list[float] | str:
    if asked.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    numbers: list[float] = vector.tolist()
    return numbers
