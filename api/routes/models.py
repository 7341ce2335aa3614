"""Models, as OpenAI lists them."""

from __future__ import annotations

from fastapi import APIRouter, Response

from api.presentation import model_object
from api.replies import ERRORS, json_reply
from api.schemas import ModelList, ModelObject
from api.services import Ready

router = APIRouter(prefix="/v1/models", tags=["models"])


@router.get("", response_model=ModelList, responses={**ERRORS})
async def list_models(services: Ready) -> Response:
    """Every model that was ever announced, with the number of live workers."""
    created = int(services.started_at)
    models = await services.catalog.models()
    return json_reply(ModelList(data=[model_object(model, created=created) for model in models]))


@router.get("/{name:path}", response_model=ModelObject, responses={**ERRORS})
async def read_model(name: str, services: Ready) -> Response:
    """One model, by its name or an alias; names may hold slashes."""
    model = await services.catalog.known(name)
    return json_reply(model_object(model, created=int(services.started_at)))
