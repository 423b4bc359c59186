"""A recipe: everything one run does, as one TOML file, checked whole before any model loads."""

from __future__ import annotations

import copy
import re
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ondol.engines.base import Sampling
from ondol.envs.base import Env
from ondol.errors import OndolError, nearest
from ondol.methods.base import ActorCritic, Method
from ondol.methods.documented import refuse
from ondol.models.lora import LoraSettings
from ondol.parts import Part, explain, make, names
from ondol.records import Message
from ondol.rollout.masking import Masking
from ondol.tasks.base import Task


class ModelSettings(Part):
    """Which model, and how it is held."""

    path: str = Field(
        default="smollm2-135m-instruct", description="bundled name, 'tiny:...', a folder in HF layout, or a hub id"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = Field(
        default="auto", description="auto: float32 on CPU, bfloat16 on GPU"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:0 ...")
    chat: str | None = Field(default=None, description="chat format, where the tokenizer's template does not tell")
    lora: LoraSettings | None = Field(default=None, description="train adapters instead of all weights")
    fused: bool = Field(default=True, description="norms and MLPs that need less memory; off is the plain path")


class RolloutSettings(Masking):
    """How episodes are run, and what of them is trained on."""

    max_batch: int = Field(default=64, ge=1, description="most sequences in the engine at once")
    timeout_s: float = Field(default=600.0, gt=0, description="deadline of one trajectory")
    processes: int = Field(
        default=0,
        ge=0,
        le=256,
        description="training rollouts by so many processes beside this one, each with a thread and the model; 0: here",
    )
    lease_s: float = Field(
        default=60.0,
        gt=0,
        description="with processes: a worker that gives no sign for so long is replaced, and its episodes go on elsewhere",
    )
    cluster: str | None = Field(
        default=None,
        description="the processes are workers on a Ray cluster: 'local' (one begun here), 'auto' (the one that runs), or its address, such as "
        "ray://head:10001",
    )
    reward_workers: int = Field(
        default=0,
        ge=0,
        le=256,
        description="processes that score responses, for each process that plays episodes; for slow verifiers and judges. 0: who plays an episode "
        "scores it, and holds up the others",
    )
    reward_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="with reward workers: deadline of one scoring, after which its worker is replaced",
    )
    overlap_tools: bool = Field(
        default=False, description="decode others while tools run; for slow tools. Off: exactly repeatable"
    )
    turn_barrier: bool = Field(
        default=False, description="run no tool before every turn is sampled: a baseline, also exactly repeatable"
    )
    max_response_tokens: int | None = Field(
        default=None, ge=1, description="most tokens of a trajectory after its prompt, observations included"
    )
    share_prefixes: bool = Field(default=True, description="compute common beginnings of prompts once")
    pack_weights: bool = Field(
        default=True,
        description="CPU: sample with a copy of the weights that is quicker to multiply; off is the plain path",
    )
    cuda_graphs: bool = Field(
        default=False,
        description="GPU: decode by replaying CUDA graphs of fixed shapes; off is the plain path. Not tried on a GPU so far",
    )

    @model_validator(mode="after")
    def _one_way(self) -> RolloutSettings:
        if self.overlap_tools and self.turn_barrier:
            raise ValueError("overlap_tools and turn_barrier are two ways to run tools: give one of them")
        return self


class Example(Part):
    """One message of a worked example."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="who says it")
    content: str = Field(description="what is said")


class WarmStart(Part):
    """SFT before reinforcement. The default is rejection sampling: sample with worked examples in the prompt, keep what
    the verifier accepts, and imitate it on the plain prompt; the traces are the model's own. For what is not the model's
    own there are `trajectories` (recorded ones) and `from_task` (demonstrations that the task makes)."""

    problems: int = Field(default=32, ge=1, description="problems sampled, or demonstrated")
    samples_per_problem: int = Field(default=4, ge=1, description="tries at each, or demonstrations of each")
    temperature: float = Field(default=1.0, ge=0, description="of that sampling")
    examples: tuple[Example, ...] = Field(
        default=(), description="messages of worked conversations, put before the question"
    )
    keep_per_problem: int = Field(
        default=2, ge=1, description="most traces kept of one problem (the first accepted ones)"
    )
    trajectories: str | None = Field(
        default=None, description="imitate recorded trajectories (JSONL or a run) instead of sampling"
    )
    from_task: bool = Field(
        default=False,
        description="imitate answers that the task makes itself: for a model from scratch, which never answers",
    )
    gold_share: float = Field(
        default=1.0, ge=0, le=1, description="from_task: share of right answers; the others are wrong"
    )
    epochs: int = Field(default=1, ge=1, description="passes over the kept traces")
    traces_per_update: int = Field(default=8, ge=1, description="traces in one SFT update")
    learning_rate: float = Field(default=1e-5, gt=0, description="of the SFT updates")

    @model_validator(mode="after")
    def _one_source(self) -> WarmStart:
        if self.from_task and self.trajectories is not None:
            raise ValueError("from_task and trajectories are two sources: give one of them")
        if self.examples and not self.samples:
            raise ValueError("examples are for sampling, which from_task and trajectories replace: leave them out")
        if self.gold_share != 1 and not self.from_task:
            raise ValueError("gold_share is for demonstrations: set from_task = true as well, or leave it out")
        return self

    @property
    def samples(self) -> bool:
        """Whether the traces are sampled in this run."""
        return not self.from_task and self.trajectories is None

    @property
    def messages(self) -> list[Message]:
        return [Message(e.role, e.content) for e in self.examples]


class OptimizerSettings(Part):
    """AdamW. A stage may override the learning rate."""

    learning_rate: float = Field(default=1e-5, gt=0, description="peak learning rate")
    warmup_steps: int = Field(default=0, ge=0, description="linear warm-up, in optimiser updates")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="decay of the mean of gradients")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="decay of the mean of their squares")
    eps: float = Field(default=1e-8, gt=0, description="added to the root of the latter")
    max_gradient_norm: float = Field(default=1.0, gt=0, description="gradients are scaled down to this L2 norm")


class TrainSettings(Part):
    """The loop."""

    steps: int = Field(
        default=10, ge=0, description="batches of rollouts; 0 trains nothing (evaluation and warm start only)"
    )
    prompts_per_step: int = Field(default=8, ge=1, description="problems per batch of rollouts")
    samples_per_prompt: int = Field(default=8, ge=1, description="trajectories per problem: the group size")
    tokens_per_microbatch: int = Field(
        default=1024, ge=1, description="memory of the learner follows this, results do not"
    )
    staleness: int = Field(
        default=0,
        ge=0,
        le=64,
        description="batches sampled ahead while the learner works: samples lag behind its weights by at most so many steps; needs rollout.processes",
    )
    in_flight: bool = Field(
        default=False,
        description="with staleness: rollouts that are under way take up new weights between two tokens, and go on. Not exactly repeatable",
    )
    learners: int = Field(
        default=1,
        ge=1,
        le=64,
        description="processes on this machine that share each update's micro-batches; under torchrun: as many as it has started",
    )
    fsdp: bool = Field(
        default=False,
        description="with several learners: each holds its share of the decoder layers' weights, gradients and optimiser state (FSDP2), not all of them",
    )
    off_policy: Literal["ratio", "decoupled"] = Field(
        default="ratio",
        description="samples of older weights: corrected for by the method's own ratio, or decoupled (arXiv 2505.24298): the ratio is taken to the "
        "weights that the step begins with, and what lies between those and the ones that sampled weighs each token",
    )
    importance_cap: float = Field(
        default=2.0, ge=1, description="decoupled: most that a token is weighted with (truncated importance sampling)"
    )
    share_prompts: bool = Field(default=True, description="compute each group's prompt once in the learner")
    flex_attention: bool = Field(
        default=False,
        description="GPU: the learner's attention over a micro-batch in one kernel; off is the plain path. Not tried on a GPU so far",
    )
    gradient_checkpointing: bool = Field(default=False, description="less memory for more compute")
    checkpoint_every_steps: int = Field(
        default=5, ge=1, description="steps between checkpoints; the last step has one too"
    )
    keep_checkpoints: int = Field(default=2, ge=1, description="newest checkpoints that stay")
    mismatch_warning: float = Field(
        default=1e-3, gt=0, description="warn when learner and sampler log-probs differ by more; float32"
    )


class EvaluateSettings(Part):
    """Held-out problems, greedy and sampled."""

    problems: int = Field(default=32, ge=0, description="held-out problems; 0 turns evaluation off")
    samples: int = Field(default=1, ge=1, description="sampled answers per problem, at the training temperature")
    without_tools: bool = Field(
        default=False, description="also measure, once at the start, what the model can do in its head"
    )
    every_steps: int = Field(
        default=0, ge=0, description="also during training, every so many steps; 0: before and after only"
    )


class Recipe(Part):
    """Everything one run does."""

    name: str = Field(default="run", min_length=1, description="of the run, and the end of its folder's name")
    seed: int = Field(default=0, ge=0, description="of everything that is drawn at random")
    model: ModelSettings = ModelSettings()
    task: Any = Field(description="a task by name or as a table")
    env: Any = Field(default="tool", validate_default=True, description="an environment by name or as a table")
    sampling: Sampling = Sampling()
    rollout: RolloutSettings = RolloutSettings()
    warm_start: WarmStart | None = None
    method: Any = Field(default="grpo", validate_default=True, description="a method by name or as a table")
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings = TrainSettings()
    evaluate: EvaluateSettings = EvaluateSettings()

    @field_validator("task", "env", "method", mode="before")
    @classmethod
    def _make(cls, value: Any, info: Any) -> Any:
        if isinstance(value, (Task, Env, Method)):
            return value
        if not isinstance(value, (str, dict)):
            raise ValueError("this is a name, or a table with a name")
        if info.field_name == "env" and isinstance(value, dict):
            value = {"name": "tool", **value}
        name = value if isinstance(value, str) else value.get("name")
        if info.field_name == "method" and isinstance(name, str) and name not in names("methods"):
            refuse(name)
        part = make(f"{info.field_name}s", value, info.field_name)
        if not isinstance(part, base := {"task": Task, "env": Env, "method": Method}[info.field_name]):
            raise OndolError(
                f"{info.field_name}: {type(part).__module__}:{type(part).__qualname__} is no {info.field_name}",
                f"derive it from {base.__module__}.{base.__name__}",
            )
        return part

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        self.env.takes(self.task)
        if self.train.steps:
            _check_complete(self.method)
        group, least = self.train.samples_per_prompt, self.method.least_samples
        if self.train.steps and group < least:
            why = " with these settings" if least > self.method.min_samples else ""
            raise ValueError(
                f"{type(self.method).__name__} compares samples of one prompt{why}: train.samples_per_prompt must be at "
                f"least {least}, not {group}"
            )
        if self.train.steps and self.method.minibatches > self.train.prompts_per_step:
            raise ValueError(
                f"method.minibatches ({self.method.minibatches}) cannot exceed train.prompts_per_step ({self.train.prompts_per_step})"
            )
        if self.rollout.cluster is not None and not self.rollout.processes:
            raise ValueError("rollout.cluster needs workers: set rollout.processes to their number")
        if self.train.in_flight and not self.train.staleness:
            raise ValueError(
                "train.in_flight is for rollouts that go on while the learner works: set train.staleness to at least 1"
            )
        if self.train.staleness and not self.rollout.processes:
            raise ValueError("train.staleness samples ahead in other processes: set rollout.processes to at least 1")
        coupled = self.train.off_policy == "ratio"
        if self.train.steps and self.train.staleness and self.method.on_policy and coupled:
            raise ValueError(
                f'{type(self.method).__name__} has no ratio that corrects for samples of older weights: set train.off_policy to "decoupled", or '
                "train.staleness to 0, or take a method that has one, such as grpo"
            )
        if self.train.steps and self.sampling.temperature == 0:
            raise ValueError(
                "sampling.temperature is 0: all samples of a prompt would be the same and nothing could be learned"
            )
        if (self.train.steps or self.warm_start) and self.task.size("train") == 0:
            raise ValueError("task: it has no training problems")
        if self.model.lora is not None and self.model.dtype == "float64":
            raise ValueError("lora with float64 is not supported")
        return self


def _check_complete(method: Method) -> None:
    """A method of a user's own may lack something that would be missed only after the first rollouts."""
    cls, actor = type(method), isinstance(method, ActorCritic)
    if not actor and (hasattr(cls, "token_advantages") or hasattr(cls, "lambdas")):
        raise ValueError(
            f"method: {cls.__name__} needs a critic (it has token_advantages or lambdas) and says of none: derive it from "
            "ondol.methods.base.ActorCritic, which has the critic's settings"
        )
    own_way = actor and cls.token_advantages is not ActorCritic.token_advantages  # type: ignore[attr-defined]
    critic_parts = () if own_way else ("lambdas",)
    base = ActorCritic if actor else Method
    for part in (*(critic_parts if actor else ("advantages",)), "token_weights", "token_loss"):
        if getattr(cls, part) is getattr(base, part):
            raise ValueError(f"method: {cls.__name__} does not define {part}(), which every run with it needs")


def load_recipe(source: str | Path | dict[str, Any], overrides: Iterable[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        source: a TOML file, the name of a recipe that comes with the package, or a table.
        overrides: "a.b=value" settings; the value is TOML, or a bare string.
    Raises:
        OndolError: with the path of the wrong key, and what would be right.
    """
    table = copy.deepcopy(source) if isinstance(source, dict) else read_table(source)
    for text in overrides:
        override(table, text)
    try:
        return Recipe(**table)
    except ValidationError as e:
        raise explain(e, "", Recipe) from e


_OF_TASK = {"two-addends": "tiny-addends", "widgets": "tiny-widgets"}


def read_table(source: str | Path) -> dict[str, Any]:
    """The raw table of a TOML file, or of a recipe that comes with the package, by its name or that of its task."""
    path = Path(source)
    if not path.exists() and str(source) in _OF_TASK:
        source = path = Path(_OF_TASK[str(source)])
    if not path.is_file() and path.suffix == "" and (built_in := _folder() / f"{path.name}.toml").exists():
        path = built_in
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as e:
        known = [p.stem for p in _folder().glob("*.toml")]
        raise OndolError(
            f"there is no recipe '{source}'",
            f"give a TOML file, or one that comes with Ondol: {nearest(path.stem, known)}",
        ) from e
    except IsADirectoryError as e:
        raise OndolError(f"'{source}' is a folder", "give a TOML file") from e
    except (OSError, UnicodeDecodeError) as e:
        raise OndolError(f"{path} cannot be read: {e}", "a recipe is a text file in TOML, UTF-8") from e
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as e:
        at = re.search(r"line (\d+)", str(e))
        # errors at the end of the document have no number; the last line that says anything is the one
        number = int(at[1]) if at else len(text.rstrip().splitlines())
        line = text.splitlines()[number - 1 : number] or [""]
        raise OndolError(f"{path}:{number}: not valid TOML: {e}\n    {line[0].strip()[:120]}") from e


def _folder() -> Path:
    return Path(__file__).parent / "recipes"


def override(table: dict[str, Any], text: str) -> None:
    """Apply one "a.b=value" to a raw table, in place."""
    key, sign, raw = text.partition("=")
    if not sign or not key.strip():
        raise OndolError(f"--set {text}: not of the form key=value", "for example --set train.steps=20")
    try:
        value = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw
    *path, last = [part.strip() for part in key.split(".")]
    if not all((*path, last)):
        raise OndolError(f"--set {text}: '{key}' is not a key", "for example --set train.steps=20")
    for part in path:
        inner = table.setdefault(part, {})
        if isinstance(inner, str):  # a bare name stands for a table with that name
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise OndolError(
                f"--set {text}: '{part}' is not a table", "see the recipe's own keys with: ondol check RECIPE --json"
            )
        table = inner
    table[last] = value


def to_table(recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe as a plain table: every setting, also those left at their defaults."""

    def plain(value: Any) -> Any:
        if isinstance(value, Part):
            fields = {k: plain(getattr(value, k)) for k in type(value).model_fields}
            fields = {k: v for k, v in fields.items() if v is not None}
            name = _name_of(value)
            return {"name": name, **fields} if name and "name" not in fields else fields
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items() if v is not None}
        # absolute, so that a run can be resumed from any folder
        return str(value.absolute()) if isinstance(value, Path) else value

    return plain(recipe)


def _name_of(part: Part) -> str | None:
    """What a recipe calls this part."""
    from ondol.parts import BUILT_IN

    reference = f"{type(part).__module__}:{type(part).__qualname__}"
    for table in BUILT_IN.values():
        for name, known in table.items():
            if known == reference:
                return name
    rooms = ("ondol.tasks.base", "ondol.envs.base", "ondol.methods.base", "ondol.tools.base", "ondol.rewards.base")
    return reference if any(c.__module__ in rooms for c in type(part).__mro__) else None
