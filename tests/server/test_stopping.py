"""How a server ends: what is in hand is answered, nobody holds it up, and nothing is left behind."""

from __future__ import annotations

import queue
from typing import Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc


def test_an_idle_stream_is_answered_and_then_ended(mortal: Any) -> None:
    request = service_pb2.ModelInferRequest(model_name="sr3_stream", raw_input_contents=[bytes(40 * 40 * 3)])
    request.inputs.add(name="pixels", datatype="UINT8", shape=(40, 40, 3))
    request.parameters["steps"].int64_param = 12
    asked, told = queue.Queue[Any](), list[str]()
    asked.put(request)
    with grpc.insecure_channel(f"{mortal.address.host}:{mortal.address.grpc}") as channel:
        answers = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(iter(asked.get, None))
        next(answers)
        mortal.guard.triton = None
        mortal.server.stop(patience=30)
        assert mortal.server.ill(timeout=1) == "the server ended with status 0"  # and was not killed
        with pytest.raises(grpc.RpcError) as ended:
            told.extend(str(answer) for answer in answers)
        assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        assert "the server is shutting down, and has answered what came before" in ended.value.details()
        assert r'\"seed\"' in told[-1]
        asked.put(None)
