"""What travels over HTTP: requests, replies, and the OpenAPI document made from them."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

import ondol

Id = Annotated[str, Field(max_length=512)]
Text = Annotated[str, Field(max_length=4 << 20)]


class ObservationRequest(BaseModel):
    """VerlTool's batch: entry i of every list belongs together."""

    model_config = ConfigDict(extra="ignore", strict=True)

    trajectory_ids: list[Id] = Field(min_length=1, description="whose turn it is; state is kept by this id")
    actions: list[Text] = Field(min_length=1, description="the text of each turn, up to the end of its call")
    extra_fields: list[dict[str, Any]] | None = Field(
        default=None, description='of each entry; {"finish": true} is read, the rest is ignored'
    )
    finish: list[bool] | None = Field(default=None, description="true: forget the trajectory instead of acting")
    is_last_step: list[bool] | None = Field(default=None, description="accepted, and ignored")

    @model_validator(mode="after")
    def _same_lengths(self) -> Self:
        n = len(self.trajectory_ids)
        for name in ("actions", "extra_fields", "finish", "is_last_step"):
            value = getattr(self, name)
            if value is not None and len(value) != n:
                raise ValueError(f"there are {n} trajectory_ids but {len(value)} {name}; give one for each")
        return self


class ObservationReply(BaseModel):
    """One entry for each of the request, in its order."""

    observations: list[str | dict[str, Any]] = Field(description="what the model reads, or {obs, invalid_reason ...}")
    dones: list[bool] = Field(description="the trajectory is over")
    valids: list[bool] = Field(description="the action was understood and carried out")
    processing_time_ms: float
    queue_time_ms: float = Field(description="longest wait for a turn among the entries")


class CallRequest(BaseModel):
    """One call of a tool by name."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trajectory_id: Id = Field(description="state is kept by this id, within `client`")
    tool: Id
    arguments: dict[str, Any] = Field(default={}, description="as the tool's `parameters` say")
    client: Id = Field(default="", description="keeps apart clients whose trajectory ids are the same")
    call_id: Id = Field(default="", description="of this call: asking again while it runs gets the same answer")


class CallReply(BaseModel):
    """What came of it. A tool's failure is a reply, too."""

    text: str = Field(description="what the model reads")
    ok: bool
    kind: str = Field(description="ok, error, timeout, memory, unknown_tool, bad_arguments or crashed")
    seconds: float = Field(description="the tool's own time")
    waited_s: float = Field(description="time until it was its turn")


class FinishRequest(BaseModel):
    """Trajectories to forget."""

    model_config = ConfigDict(extra="forbid", strict=True)

    trajectory_ids: list[Id] = Field(min_length=1)
    client: Id = ""


class FinishReply(BaseModel):
    finished: int = Field(description="how many of them there were")


class ToolDescription(BaseModel):
    name: str
    description: str
    parameters: dict[str, Any] = Field(description="JSON Schema of the arguments")
    main_argument: str = Field(description="what a call in tags or a code block fills")
    timeout_s: float
    deadline_s: float = Field(description="when the server gives a call up")


class ToolsReply(BaseModel):
    tools: list[ToolDescription]


class HealthReply(BaseModel):
    """VerlTool's keys, then ours."""

    status: str
    concurrent_requests: int
    thread_pool_size: int
    active_tasks: int
    max_concurrent: int
    tools: list[str]
    uptime_seconds: float
    waiting: int
    trajectories: int
    sessions: int
    served: int
    left_behind: int = Field(description="calls that did not come back at their deadline, nor when cancelled")
    sandbox: dict[str, str] = Field(default={}, description="tool -> the isolation level that its calls run behind")


class Problem(BaseModel):
    """Why a request was refused. `detail` is a text, or for a body that does not fit, a list of places."""

    detail: str | list[dict[str, Any]]
    remedy: str = ""


_PATHS: dict[str, tuple[str, str, type[BaseModel] | None, type[BaseModel]]] = {
    "/get_observation": ("post", "VerlTool's batch of actions", ObservationRequest, ObservationReply),
    "/call": ("post", "One call of a tool", CallRequest, CallReply),
    "/finish": ("post", "Forget trajectories", FinishRequest, FinishReply),
    "/tools": ("get", "The tools", None, ToolsReply),
    "/health": ("get", "State of the server", None, HealthReply),
}
_REFUSALS = {
    "400": "the body is not JSON",
    "401": "the token is missing or wrong",
    "403": "the request comes from a web page of another origin, or names another host",
    "408": "the request took longer than the server's limit",
    "413": "the body, or the batch, is too large",
    "415": "the body is not application/json",
    "422": "the body does not fit",
    "429": "the server is full; Retry-After says when to ask again",
    "503": "the server is closing",
}


def openapi(token: bool) -> dict[str, Any]:
    """The document at /openapi.json. `token`: requests need one."""
    schemas: dict[str, Any] = {}

    def reference(model: type[BaseModel]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        schemas[model.__name__] = schema
        return {"$ref": f"#/components/schemas/{model.__name__}"}

    def content(model: type[BaseModel]) -> dict[str, Any]:
        return {"application/json": {"schema": reference(model)}}

    paths: dict[str, Any] = {}
    for path, (method, summary, body, reply) in _PATHS.items():
        codes = [c for c in _REFUSALS if body is not None or c in ("401", "403")]
        operation: dict[str, Any] = {
            "summary": summary,
            "operationId": path.strip("/"),
            "responses": {
                "200": {"description": "done", "content": content(reply)},
                **{c: {"description": _REFUSALS[c], "content": content(Problem)} for c in codes},
            },
        }
        if body is not None:
            operation["requestBody"] = {"required": True, "content": content(body)}
        paths[path] = {method: operation}
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Ondol tool server", "version": ondol.__version__},
        "paths": paths,
        "components": {"schemas": schemas},
    }
    if token:
        document["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"token": []}]
    return document
