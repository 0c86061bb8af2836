"""An endpoint is one record: routes, keys, metrics, load and the OpenAPI document follow from it."""

from __future__ import annotations

from typing import Any

import pytest
from fake_client import FakeClient
from http_tools import in_process
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from microvllm.openai_compat import app
from microvllm.openai_compat.api.endpoint import Endpoint, Switch
from microvllm.openai_compat.api.requests import DetokenizeRequest
from microvllm.openai_compat.state import ServerState

pytestmark = pytest.mark.asyncio


async def count(request: Request, state: ServerState, body: DetokenizeRequest) -> Response:
    """Counts tokens.

    Those of a list.
    """
    return JSONResponse({"tokens": len(body.tokens), "load": state.num_generations})


async def ask(monkeypatch: pytest.MonkeyPatch, args: dict[str, Any], **record: Any) -> list[Any]:
    """The answers to a good body, a wrong body and a wrong method, then the document and the metrics."""
    endpoint = Endpoint(path="/count", methods=("POST",), handler=count, body=DetokenizeRequest, **record)
    monkeypatch.setattr(app, "ENDPOINTS", (*app.ENDPOINTS, endpoint))
    async with in_process(FakeClient(), **args) as http:
        good = await http.post("/count", json={"tokens": [1, 2]})
        wrong = await http.post("/count", json={"tokens": 1})
        method = await http.get("/count")
        document = (await http.get("/openapi.json")).json()
        metrics = (await http.get("/metrics")).text
    return [good, wrong, method, document["paths"].get("/count"), '/count"' in metrics]


async def test_a_record_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    good, wrong, method, described, counted = await ask(monkeypatch, {}, generates=True, answer="Success")
    assert good.json() == {"tokens": 2, "load": 1}
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "body.tokens"
    assert method.status_code == 405 and counted
    operation = described["post"]
    assert (operation["summary"], operation["description"]) == ("Counts tokens.", "Those of a list.")
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith(
        "DetokenizeRequest"
    )
    assert "security" not in operation


@pytest.mark.parametrize("needs_key", [True, False])
async def test_keys(monkeypatch: pytest.MonkeyPatch, needs_key: bool) -> None:
    good, _, _, described, _ = await ask(monkeypatch, {"api_keys": ("k",)}, needs_key=needs_key)
    assert good.status_code == (401 if needs_key else 200)
    assert ("security" in described["post"]) == needs_key


async def test_it_may_stay_out_of_metrics_and_document(monkeypatch: pytest.MonkeyPatch) -> None:
    good, _, _, described, counted = await ask(monkeypatch, {}, in_http_metrics=False, documented=False)
    assert good.json() == {"tokens": 2, "load": 0} and described is None and not counted


@pytest.mark.parametrize(("remedy", "status"), [("--count", 400), (None, 404)])
async def test_a_switch_turns_it_off(
    monkeypatch: pytest.MonkeyPatch, remedy: str | None, status: int
) -> None:
    switch = Switch(lambda args: args.dev_mode, remedy)
    good, _, _, described, _ = await ask(monkeypatch, {}, switch=switch)
    assert good.status_code == status and (remedy is None or remedy in good.text) and described is None
    good, _, _, described, _ = await ask(monkeypatch, {"dev_mode": True}, switch=switch)
    assert good.status_code == 200 and described
